"""A borrower's own statements on asyncio: a cancellation is heard at once, and the connection stays usable."""

from __future__ import annotations

import asyncio
import os
import signal
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from tests.drivers.async_links import (
    LOOPS,
    SECONDS,
    CancelledAt,
    async_test,
    one,
    opened,
    registered,
    run,
    suspensions_of,
    until,
)

from penstock._drivers.psycopg3 import aio_cancellation, aio_exchange
from penstock.drivers import Activity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from penstock._drivers.psycopg3.aio_driver import AsyncPsycopg3Link
    from pytest_penstock.postgres import Server

on_both_loops = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(params=["unix", "tls"])
def dsn(request: pytest.FixtureRequest) -> str:
    running: Server = request.getfixturevalue("tls_server" if request.param == "tls" else "server")
    return running.conninfo(over=request.param)


async def cut_off(link: AsyncPsycopg3Link, seconds: float = 0.02) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await link.conn.execute("select pg_sleep(60)")


@on_both_loops
@async_test
async def test_a_statement_that_was_cut_off_is_stopped_before_the_next(dsn: str, loop: str) -> None:
    async with opened(dsn) as link:
        await link.conn.execute("create temp table kept (a int)")
        await link.conn.commit()
        await cut_off(link)
        assert link.activity() is Activity.ACTIVE
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await link.conn.execute("select 1")
        await link.conn.rollback()
        cursor = await link.conn.execute("select count(*) from kept")
        assert await cursor.fetchone() == (0,)
        await link.commit()
        assert link.park()


@on_both_loops
@async_test
async def test_one_that_was_cut_off_at_the_end_is_stopped_by_the_pool(dsn: str, loop: str) -> None:
    async with opened(dsn) as link:
        await cut_off(link)
        assert not link.park()
        assert await link.tidy(SECONDS)
        assert link.park()
        link.lend()
        assert await one(link, "select 1") == 1


@async_test
async def test_transaction_blocks_end_as_they_do_with_psycopg(unix_dsn: str) -> None:
    async with opened(unix_dsn, autocommit=True) as link:
        await link.conn.execute("create temp table t (a int)")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), link.conn.transaction():
                await link.conn.execute("insert into t values (1)")
                await link.conn.execute("select pg_sleep(60)")
        assert link.activity() is Activity.IDLE
        async with link.conn.transaction():
            await link.conn.execute("insert into t values (2)")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), link.conn.transaction():
                    await link.conn.execute("insert into t values (3)")
                    await link.conn.execute("select pg_sleep(60)")
        cursor = await link.conn.execute("select array_agg(a) from t")
        assert await cursor.fetchone() == ([2],)
        assert link.park()


@async_test
async def test_a_commit_after_it_ends_the_failed_transaction(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.conn.execute("create table never (a int)")
        await cut_off(link)
        await link.commit()
        assert link.activity() is Activity.IDLE
        assert link.park()
        link.lend()
        assert await one(link, "select to_regclass('never')") is None


async def copy_early(link: AsyncPsycopg3Link) -> None:
    async with link.conn.cursor().copy("copy (select pg_sleep(60)) to stdout") as copied:
        await copied.read()


async def copy_late(link: AsyncPsycopg3Link) -> None:
    rows = "select repeat('x', 20000) from generate_series(1, 3)"
    query = f"copy ({rows} union all select pg_sleep(60)::text) to stdout"
    async with link.conn.cursor().copy(query) as copied:
        while await copied.read():
            pass


async def copy_in(link: AsyncPsycopg3Link) -> None:
    async with link.conn.cursor().copy("copy cut_in from stdin") as copied:
        await copied.write_row((1,))
        await asyncio.sleep(60)


async def copy_in_early(link: AsyncPsycopg3Link) -> None:
    async with opened(link.conn.info.dsn) as other:
        await other.conn.execute("lock table cut_in")
        async with link.conn.cursor().copy("copy cut_in from stdin") as copied:
            await copied.write_row((1,))


async def stream(link: AsyncPsycopg3Link) -> None:
    async for _ in link.conn.cursor().stream("select 1 union all select 2 from pg_sleep(60)"):
        pass


async def pipeline(link: AsyncPsycopg3Link) -> None:
    async with link.conn.pipeline():
        await link.conn.execute("select 1")
        await link.conn.execute("select pg_sleep(60)")


async def many(link: AsyncPsycopg3Link) -> None:
    await link.conn.cursor().executemany("select pg_sleep(%s)", [(60,)])


@pytest.fixture(scope="module")
def table(server: Server) -> Iterator[str]:
    server.execute("create table cut_in (a int)")
    yield server.conninfo(over="unix")
    assert server.execute("select count(*) from cut_in") == [("0",)]
    server.execute("drop table cut_in")


@pytest.mark.parametrize(
    "work", [copy_early, copy_late, copy_in, copy_in_early, stream, pipeline, many]
)
@async_test
async def test_copies_streams_and_pipelines_are_cut_off_too(
    table: str, work: Callable[[AsyncPsycopg3Link], Awaitable[None]]
) -> None:
    async with opened(table, autocommit=True) as link:
        started = monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await work(link)
        if not link.park():
            assert await link.tidy(SECONDS)
        link.lend()
        assert await one(link, "select 1") == 1
        assert monotonic() - started < 4


@async_test
async def test_a_user_whose_class_waits_in_a_way_of_its_own_keeps_it(unix_dsn: str) -> None:
    waited: list[str] = []

    class Mine(psycopg.AsyncConnection[Any]):
        async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            waited.append("waited")
            return await super().wait(gen, *args, **kwargs)

    async with opened(unix_dsn, connection_class=Mine) as link:
        await link.conn.execute("select 1")
        assert waited
        assert aio_cancellation.HearsCancellation not in type(link.conn).__mro__


@on_both_loops
@async_test
async def test_of_a_frozen_server_a_cancellation_is_heard_at_once_and_the_next_statement_gives_up(
    server: Server, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio_cancellation, "_STOP_SECONDS", 0.1)
    async with opened(server.conninfo()) as link:
        pid = link.handle.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            started = monotonic()
            await cut_off(link)
            with pytest.raises(psycopg.OperationalError, match="cut off"):
                await link.conn.execute("select 1")
            assert monotonic() - started < 4
            assert link.activity() is Activity.BROKEN
            assert link.fd not in registered()
        finally:
            os.kill(pid, signal.SIGCONT)


def test_anyio_which_cancels_again_and_again_costs_no_connection(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            with anyio.move_on_after(0.05):
                await link.conn.execute("select pg_sleep(60)")
            assert link.activity() is Activity.ACTIVE
            link.park()
            assert await link.tidy(SECONDS)

    anyio.run(main, backend="asyncio")


async def used(link: AsyncPsycopg3Link) -> None:
    await link.conn.execute("select pg_sleep(0.003)")
    await link.conn.execute("select %s::int", (1,))
    if not psycopg.__version__.startswith(
        "3.2."
    ):  # which does not leave a block cut off at its begin
        async with link.conn.transaction():
            await link.conn.execute("select 2")


@on_both_loops
def test_cut_off_anywhere_a_borrower_can_go_on_or_the_pool_can(unix_dsn: str, loop: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            points = await suspensions_of(used(link))
        for goes_on in (True, False):
            for nth in range(1, points + 1):
                async with opened(unix_dsn) as link:
                    task = asyncio.ensure_future(as_coroutine(CancelledAt(used(link), nth)))
                    await asyncio.wait({task})
                    if goes_on:
                        await link.conn.rollback()
                        cursor = await link.conn.execute("select 'the answer to this'")
                        assert await cursor.fetchone() == ("the answer to this",)
                    if not link.park():
                        assert await link.tidy(SECONDS)
                    link.lend()
                    assert await one(link, "select 'and to this'") == "and to this"

    run(main(), loop)


async def as_coroutine(awaitable: Any) -> Any:
    return await awaitable


@async_test
async def test_stopping_can_be_cut_off_as_well(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await cut_off(link)
        going_on = asyncio.ensure_future(link.conn.execute("select 1"))
        await until(lambda: aio_exchange.CUT_OFF in link.touched)
        going_on.cancel()
        await asyncio.wait({going_on})
        assert link.activity() is Activity.ACTIVE
        link.park()
        await link.tidy(SECONDS)  # or not: the request may be on its way
        if link.activity() is Activity.IDLE:
            link.lend()
            assert await one(link, "select 1") == 1
