"""What a driver raises is gone when it was handled, without the garbage collector.

One job: an error whose traceback ends in a frame that has the error itself is a cycle, and keeps every frame
of those who called: the connection, the pool. Where collections are rare or off, it stays for good.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg2
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from penstock import AsyncConnectionPool, ConnectionPool, StatementTimeout
from penstock._drivers.asyncpg.driver import driver as asyncpg_driver
from penstock._drivers.psycopg2.driver import driver as psycopg2_driver
from penstock._drivers.psycopg3 import connect as psycopg3_connect
from penstock._drivers.psycopg3.aio_driver import driver as async_driver
from penstock._drivers.psycopg3.driver import driver
from penstock.drivers import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Seconds.
LIMIT, PATIENCE = 0.2, 20.0
NO_SUCH = "there is no such name here"


@pytest.fixture(autouse=True)
def no_collections() -> Iterator[None]:
    """Only reference counting frees anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    def failed() -> weakref.ref[Exception]:
        try:
            driver.open(Recipe(conninfo=f"host={tmp_path} dbname=shop"), PATIENCE)
        except psycopg.OperationalError as error:
            return weakref.ref(error)
        raise AssertionError("it is there")

    assert failed()() is None


def test_a_socket_that_is_not_there_asynchronously(tmp_path: Path) -> None:
    async def failed() -> weakref.ref[Exception]:
        try:
            await async_driver.open(Recipe(conninfo=f"host={tmp_path} dbname=shop"), PATIENCE)
        except psycopg.OperationalError as error:
            return weakref.ref(error)
        raise AssertionError("it is there")

    assert asyncio.run(failed())() is None


def test_two_addresses_where_nobody_listens() -> None:
    def failed() -> weakref.ref[Exception]:
        params = {"host": "127.0.0.1,127.0.0.1", "port": f"{free},{free}", "dbname": "shop"}
        try:
            psycopg3_connect.connect(params, float("inf"))
        except psycopg.OperationalError as error:
            return weakref.ref(error)
        raise AssertionError("somebody listens")

    with socket.socket() as bound:  # and it does not listen
        bound.bind(("127.0.0.1", 0))
        free = bound.getsockname()[1]
        assert failed()() is None


@pytest.fixture
def one_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "unknown.invalid":
            raise socket.gaierror(socket.EAI_NONAME, NO_SUCH)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def unknown_and(conninfo: str) -> Recipe:
    """The server's address behind a name that nobody knows."""
    host, port = (conninfo_to_dict(conninfo)[key] for key in ("host", "port"))
    return Recipe(
        conninfo=make_conninfo(conninfo, host=f"unknown.invalid,{host}", port=f"{port},{port}")
    )


def errors_alive() -> list[BaseException]:
    """Those that are about the name; other tests' errors may be kept with good reason."""
    kinds = (psycopg.Error, psycopg2.Error, OSError)
    # By type(): proxies of frameworks say no class outside of a request.
    errors = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    return [each for each in errors if NO_SUCH in str(each)]


@pytest.mark.usefixtures("one_name_is_unknown")
@pytest.mark.parametrize("threaded", [driver, psycopg2_driver], ids=["psycopg", "psycopg2"])
def test_a_name_that_is_unknown_beside_one_that_works(tcp_dsn: str, threaded: Any) -> None:
    threaded.open(unknown_and(tcp_dsn), PATIENCE).close()
    assert not errors_alive()


@pytest.mark.usefixtures("one_name_is_unknown")
@pytest.mark.parametrize("awaited", [async_driver, asyncpg_driver], ids=["psycopg", "asyncpg"])
def test_a_name_that_is_unknown_beside_one_that_works_asynchronously(
    tcp_dsn: str, awaited: Any
) -> None:
    async def main() -> None:
        await (await awaited.open(unknown_and(tcp_dsn), PATIENCE)).close()

    asyncio.run(main())
    assert not errors_alive()


def test_a_commit_that_took_too_long(tcp_dsn: str) -> None:
    def failed() -> weakref.ref[Exception]:
        try:
            with pool.connection() as conn:
                conn.execute("create temporary table late (i int)")
                conn.execute(
                    "create function pg_temp.sleep() returns trigger language plpgsql as"
                    " 'begin perform pg_sleep(60); return null; end'"
                )
                conn.execute(
                    "create constraint trigger late after insert on late deferrable initially deferred"
                    " for each row execute function pg_temp.sleep()"
                )
                conn.execute("insert into late values (1)")
                conn.commit()
        except StatementTimeout as error:
            return weakref.ref(error)
        raise AssertionError("it was answered")

    with ConnectionPool(tcp_dsn, max_size=1, statement_timeout_client=LIMIT) as pool:
        assert failed()() is None


def test_a_statement_that_took_too_long(tcp_dsn: str) -> None:
    def failed() -> weakref.ref[Exception]:
        try:
            with pool.connection() as conn:
                conn.execute("select pg_sleep(60)")
        except StatementTimeout as error:
            return weakref.ref(error)
        raise AssertionError("it was answered")

    with ConnectionPool(tcp_dsn, max_size=1, statement_timeout_client=LIMIT) as pool:
        assert failed()() is None


def test_a_statement_that_took_too_long_asynchronously(tcp_dsn: str) -> None:
    async def failed() -> weakref.ref[Exception]:
        pool = AsyncConnectionPool(tcp_dsn, max_size=1, statement_timeout_client=LIMIT)
        async with pool:
            try:
                async with pool.connection() as conn:
                    await conn.execute("select pg_sleep(60)")
            except StatementTimeout as error:
                return weakref.ref(error)
        raise AssertionError("it was answered")

    assert asyncio.run(failed())() is None
