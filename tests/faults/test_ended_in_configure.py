"""A server that ends the session while `configure` runs is a server that goes, not a bug of `configure`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.forks import PATIENCE

from penstock import AsyncConnectionPool, ConnectionPool, ServerUnavailable

if TYPE_CHECKING:
    from pytest_penstock.postgres import Server

ENDING = "select pg_terminate_backend(pg_backend_pid())"
# The server's words alone: what libpq and asyncpg make of a session that is gone differs.
GOES = "do $$ begin raise exception 'going down' using errcode = '57P01'; end $$"

either = pytest.mark.parametrize("going", [ENDING, GOES], ids=["ended", "told"])


@either
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_session_that_ends_in_configure_is_opened_again(
    server: Server, driver: str, going: str
) -> None:
    seen: list[Any] = []

    def configure(conn: Any) -> None:
        seen.append(conn)
        if len(seen) == 1:
            conn.cursor().execute(going)

    pool = ConnectionPool(server.conninfo(), driver=driver, configure=configure)  # type: ignore[call-overload]
    with pool:
        assert pool.execute("select 1", timeout=PATIENCE).fetchone() == (1,)
    assert len(seen) == 2


@either
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_one_of_an_asyncio_pool_is_opened_again(server: Server, driver: str, going: str) -> None:
    seen: list[Any] = []

    async def configure(conn: Any) -> None:
        seen.append(conn)
        if len(seen) == 1:
            await conn.execute(going)

    async def main() -> None:
        pool: Any = AsyncConnectionPool(server.conninfo(), driver=driver, configure=configure)  # type: ignore[call-overload]
        async with pool:
            assert tuple((await pool.execute("select 1", timeout=PATIENCE)).fetchone()) == (1,)

    asyncio.run(main())
    assert len(seen) == 2


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_as_long_as_it_goes_on_the_servers_code_is_told(server: Server, driver: str) -> None:
    def configure(conn: Any) -> None:
        conn.cursor().execute(GOES)

    pool = ConnectionPool(server.conninfo(), driver=driver, configure=configure)  # type: ignore[call-overload]
    with pool, pytest.raises(ServerUnavailable) as caught:
        pool.execute("select 1", timeout=0.3)
    assert (caught.value.sqlstate, caught.value.heals) == ("57P01", True)


def test_as_long_as_it_goes_on_asyncpg_tells_it_too(server: Server) -> None:
    async def configure(conn: Any) -> None:
        await conn.execute(GOES)

    async def main() -> None:
        async with AsyncConnectionPool(
            server.conninfo(), driver="asyncpg", configure=configure
        ) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                await pool.execute("select 1", timeout=0.3)
        assert (caught.value.sqlstate, caught.value.heals) == ("57P01", True)

    asyncio.run(main())
