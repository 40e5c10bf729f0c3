"""A pool for threads in the thread of an event loop: who waits there holds everybody up, and is told so."""

from __future__ import annotations

import asyncio
import sys
import threading
import types

import pytest

from penstock import MisuseError, PoolTimeout
from penstock._process import stacks

PATIENCE = 20.0  # seconds: the price of a failure


async def hold_over_an_await(pool, asked):
    with pool.connection():
        await asked.wait()


def test_where_the_loops_thread_holds_all_of_them_the_next_one_is_refused_at_once(make_pool):
    pool = make_pool(max_size=2)

    async def serve():
        asked = asyncio.Event()
        endpoints = [asyncio.create_task(hold_over_an_await(pool, asked)) for _ in range(2)]
        await asyncio.sleep(0)
        assert pool.stats().in_use == 2
        with pytest.raises(MisuseError) as caught:
            pool.execute("select 1")
        asked.set()
        await asyncio.gather(*endpoints)
        return caught.value

    error = asyncio.run(serve())
    assert "this thread runs an event loop (asyncio)" in error.what
    assert "2 of 2 in use" in error.what
    assert "AsyncConnectionPool" in (error.next_step or "")
    assert "asyncio.to_thread" in (error.next_step or "")
    assert pool.stats().refused == 1
    assert pool.execute("select 1") is not None


def test_one_that_never_holds_over_an_await_works_on_a_loop(make_pool):
    pool = make_pool(max_size=1)

    async def serve():
        for _ in range(3):
            pool.execute("select 1")
            await asyncio.sleep(0)

    async def crowd():
        await asyncio.gather(*(serve() for _ in range(5)))

    asyncio.run(crowd())
    assert pool.stats().refused == 0


def test_where_another_thread_holds_one_the_loops_thread_waits_for_it(make_pool, until):
    pool = make_pool(max_size=2)
    has = threading.Event()

    def work():
        with pool.connection():
            has.set()
            until(lambda: pool.stats().waiting == 1)

    async def serve():
        with pool.connection() as mine, pool.connection() as second:
            return second is not mine

    thread = threading.Thread(target=work)
    thread.start()
    assert has.wait(PATIENCE)
    assert asyncio.run(serve())
    thread.join(PATIENCE)
    assert pool.stats().refused == 0


def test_in_vain_its_error_names_the_loop_and_the_other_pool(make_pool):
    pool = make_pool(max_size=1)
    has, may_end = threading.Event(), threading.Event()

    def work():
        with pool.connection():
            has.set()
            may_end.wait(PATIENCE)

    async def serve():
        with pytest.raises(PoolTimeout) as caught:
            pool.execute("select 1", timeout=0.05)
        return caught.value

    thread = threading.Thread(target=work)
    thread.start()
    assert has.wait(PATIENCE)
    error = asyncio.run(serve())
    may_end.set()
    thread.join(PATIENCE)
    assert error.loop == "asyncio"
    assert "this thread runs an event loop (asyncio), which stood still" in str(error)
    assert "next step: use AsyncConnectionPool in `async def`" in str(error)


def test_what_getconn_has_lent_on_a_loop_a_thread_may_give_back(make_pool, until):
    pool = make_pool(max_size=1)

    def give_back(conn):
        until(lambda: pool.stats().waiting == 1)
        pool.putconn(conn)

    async def serve():
        worker = threading.Thread(target=give_back, args=(pool.getconn(),))
        worker.start()
        pool.execute("select 1")
        worker.join(PATIENCE)

    asyncio.run(serve())
    assert pool.stats().refused == 0


def test_one_that_takes_only_what_is_free_holds_no_loop_up(make_pool):
    pool = make_pool(max_size=1)

    async def serve():
        with pool.connection():
            with pytest.raises(PoolTimeout) as caught:
                await asyncio.create_task(try_once())
            return caught.value

    async def try_once():
        pool.execute("select 1", timeout=0)

    assert asyncio.run(serve()).loop == ""


def test_threads_of_a_loops_program_hold_no_loop_up(make_pool):
    pool = make_pool(max_size=1)

    def wait_in_vain():
        with pytest.raises(PoolTimeout) as caught:
            pool.execute("select 1", timeout=0.05)
        return caught.value

    async def fail():
        conn = pool.getconn()
        error = await asyncio.to_thread(wait_in_vain)
        pool.putconn(conn)
        return error

    error = asyncio.run(fail())
    assert error.loop == ""
    assert "event loop" not in str(error)


def test_no_loop_is_seen_where_none_runs_and_asyncio_is_not_imported_for_it(monkeypatch):
    assert stacks.event_loop() == ""
    monkeypatch.delitem(sys.modules, "asyncio")
    assert stacks.event_loop() == ""
    assert "asyncio" not in sys.modules


@pytest.mark.parametrize("runs", [True, False])
def test_a_loop_of_trios_is_seen(runs, monkeypatch):
    trio = types.SimpleNamespace(lowlevel=types.SimpleNamespace(in_trio_run=lambda: runs))
    monkeypatch.setitem(sys.modules, "trio", trio)
    assert stacks.event_loop() == ("trio" if runs else "")
