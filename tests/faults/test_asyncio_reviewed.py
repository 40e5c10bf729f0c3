"""What a review of the asyncio pool found on a real server, and must not come back.

One job: each finding as a promise, over both drivers and loops where these differ. Nothing is slept for:
what races is brought to its window, and awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop

from penstock import (
    AsyncConnectionPool,
    MisuseError,
    PenstockError,
    ServerUnavailable,
)
from penstock._pool.aio import executor, opener

PATIENCE = 30.0  # seconds; a failure's price

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=["psycopg", "asyncpg"])
def driver(request):
    return request.param


@pytest.fixture(params=LOOPS)
def run(request):
    """Run a coroutine as `asyncio.run` does, on one loop or the other."""

    def run(coroutine):
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(within(coroutine))

    return run


async def within(coroutine):
    async with asyncio.timeout(PATIENCE):
        return await coroutine


async def until(condition):
    while not condition():  # noqa: ASYNC110  it is no event
        await asyncio.sleep(0.001)


async def gone(server, name):
    """Until the server has no session of this pool: one needs 2 to 3 ms to end."""
    query = f"select count(*) from pg_stat_activity where application_name like '%/{name}/{os.getpid()}'"
    async with asyncio.timeout(PATIENCE):
        while int(server.psql(query)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# -- loops that end -------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not closed"])
def test_a_loop_that_has_ended_is_freed_while_its_pool_lives_on(unix_dsn, driver, run, closed):
    """Each loop that a pool had ever watched on stayed for good, and made closing slower."""
    pool = AsyncConnectionPool(unix_dsn, driver=driver)

    async def use():
        assert (await pool.execute("select 1")).fetchone() == (1,)
        if closed:
            await pool.close()
        return weakref.ref(asyncio.get_running_loop())

    ended = run(use())
    run(pool.close())
    gc.collect()
    assert ended() is None


def test_a_loop_that_is_closed_without_a_word_leaves_no_descriptor(unix_dsn, driver, recwarn):
    def use_and_leave(pool):
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(pool.execute("select 1"))
        finally:
            loop.close()

    def once():
        pool = AsyncConnectionPool(unix_dsn, driver=driver)
        use_and_leave(pool)
        del pool
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = once()
    assert [once() for _ in range(3)] == [before] * 3
    assert not recwarn.list


def test_what_is_lent_beyond_close_ends_with_its_loop_in_silence(server, driver, run, caplog):
    """The pool had left the loop, and brought the slot back in a task that nobody awaited."""
    name = f"beyond-{driver}"
    pool = AsyncConnectionPool(server.conninfo(over="unix"), driver=driver, name=name, max_size=2)
    tasks = []

    async def hold(holding):
        async with pool.connection(transaction=True) as conn:
            holding.set()
            await conn.execute("select pg_sleep(300)")

    async def leave():
        holding = asyncio.Event()
        tasks.append(asyncio.create_task(hold(holding)))
        await holding.wait()
        await pool.close(timeout=0)

    run(leave())
    caplog.clear()  # that it was lent still is said
    tasks.clear()
    gc.collect()
    assert pool.stats().size == 0
    run(gone(server, name))
    assert not caplog.text


# -- the garbage collector, in another thread -----------------------------------------------------


def collect_elsewhere():
    """The garbage collector, in another thread."""
    thread = threading.Thread(target=gc.collect)
    thread.start()
    return thread


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def test_a_task_that_is_destroyed_in_another_thread_gives_its_connection_back_at_home(
    unix_dsn, driver, run, no_gc
):
    """It was brought back in the other thread, which did not wake the loop."""
    homes = []

    async def configure(conn):
        homes.append(asyncio.get_running_loop())

    pool = AsyncConnectionPool(
        unix_dsn,
        driver=driver,
        max_size=1,
        timeout=10 * PATIENCE,  # whose end would wake the loop
        configure=configure,
    )

    async def hold(holding):
        async with pool.connection(transaction=True) as conn:
            await conn.execute("select 1")
            holding.set()
            await asyncio.get_running_loop().create_future()

    async def use():
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # it was pending
        holding = asyncio.Event()
        asyncio.create_task(hold(holding))  # noqa: RUF006  nobody keeps it, for once
        await holding.wait()
        waiting = asyncio.create_task(pool.execute("select 1"))
        await until(lambda: pool.stats().waiting == 1)
        thread = collect_elsewhere()
        assert (await waiting).fetchone() == (1,)
        await until(lambda: not thread.is_alive())
        assert set(homes) == {asyncio.get_running_loop()}
        assert len(homes) == 2
        await pool.close()

    run(use())


def test_a_borrower_who_is_destroyed_in_another_thread_leaves_the_queue(
    unix_dsn, driver, run, no_gc
):
    pool = AsyncConnectionPool(unix_dsn, driver=driver, max_size=1, timeout=PATIENCE)

    def begin_to_wait():
        borrower: list[Any] = [pool.connection().__aenter__()]
        borrower[0].send(None)
        borrower.append(borrower)  # only the garbage collector finds it

    async def use():
        async with pool.connection():
            begin_to_wait()
            assert pool.stats().waiting == 1
            thread = collect_elsewhere()
            await until(lambda: not thread.is_alive())
            assert pool.stats().waiting == 0
        assert (await pool.execute("select 1")).fetchone() == (1,)
        await pool.close()
        assert pool.stats().size == 0

    run(use())


# -- callables that never come to an end ----------------------------------------------------------


@pytest.mark.parametrize("option", ["conninfo", "kwargs"])
def test_a_token_service_that_does_not_answer_keeps_no_connection_opening_for_ever(
    unix_dsn, driver, monkeypatch, option
):
    """No time limit held for it: when max_size connects hung like this the pool was dead."""
    monkeypatch.setattr(executor, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr("penstock._pool.aio.dedicated.CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(opener, "DIAGNOSE_SECONDS", 0.05)
    is_hanging = [True]

    async def token():
        if is_hanging:
            await asyncio.Event().wait()
        return unix_dsn if option == "conninfo" else {"application_name": "token"}

    options = {"conninfo": unix_dsn, option: token}
    pool = AsyncConnectionPool(
        options.pop("conninfo"), driver=driver, max_size=1, timeout=0.5, **options
    )

    async def use():
        with pytest.raises(ServerUnavailable, match=f"{option}=.*token has not returned for"):
            await pool.execute("select 1")
        with pytest.raises(ServerUnavailable, match=f"{option}=.*token has not returned for"):
            async with pool.dedicated():
                pass
        is_hanging.clear()
        while True:
            with suppress(PenstockError):
                await pool.execute("select 1")
                break
        await pool.close()

    asyncio.run(within(use()))


# -- closing --------------------------------------------------------------------------------------


def test_a_pool_that_is_opened_while_it_is_being_closed_stays_open_on_its_loop(
    unix_dsn, driver, run
):
    """The close that had waited took the loop from it: what came back was nobody's to replace."""
    pool = AsyncConnectionPool(unix_dsn, driver=driver, min_size=2, max_size=2)

    async def use():
        await pool.open(wait=True)
        async with pool.connection():
            closing = asyncio.create_task(pool.close())
            await until(lambda: pool.closed)
            await pool.open()
        await closing
        await until(lambda: pool.stats().idle == 2)
        intruder = asyncio.to_thread(asyncio.run, pool.drain())
        with pytest.raises(MisuseError, match="another event loop"):
            await intruder
        await pool.close()

    run(use())


def test_close_ends_the_connects_that_are_under_way(unix_dsn, driver, run, caplog):
    """They went on, and a loop that was closed after the pool destroyed their tasks."""
    configuring = asyncio.Event()

    async def configure(conn):
        configuring.set()
        await asyncio.Event().wait()

    pool = AsyncConnectionPool(unix_dsn, driver=driver, configure=configure)

    async def use():
        await pool.open()
        await configuring.wait()
        await pool.close()
        assert pool.stats().size == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(use())
    assert not caplog.text


# -- dedicated connections ------------------------------------------------------------------------


def test_a_dedicated_connection_that_cannot_be_as_asked_is_closed(server):
    pool = AsyncConnectionPool(server.conninfo(over="unix"), driver="asyncpg", name="not-as-asked")

    async def use():
        with pytest.raises(asyncpg.InterfaceError, match="autocommit"):
            async with pool.dedicated(autocommit=False):
                pass
        await gone(server, "not-as-asked")

    asyncio.run(within(use()))


def test_a_block_that_ends_well_after_a_timeout_it_caught_is_told_of_its_rollback(server, caplog):
    async def scenario():
        async with AsyncConnectionPool(server.conninfo(over="unix")) as pool:
            async with pool.connection() as conn:
                await conn.execute("create table not_committed (n int)")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await conn.execute("select pg_sleep(30)")
            return (await pool.execute("select to_regclass('not_committed')")).fetchone()

    assert asyncio.run(scenario()) == (None,)
    assert any("is rolled back" in record.message for record in caplog.records)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_dedicated_connection_that_is_never_left_ends_with_its_loop(server, driver):
    pool = AsyncConnectionPool(server.conninfo(over="unix"), driver=driver, name="never-left")
    kept = []

    async def scenario():
        kept.append(await pool.dedicated().__aenter__())

    asyncio.run(scenario())
    asyncio.run(gone(server, "never-left"))
