"""When a borrower that holds a connection is refused at once, and when it waits: only on proof."""

from __future__ import annotations

import contextlib

import pytest

from penstock import MisuseError
from tests.contract.scenarios import scenario


@contextlib.asynccontextmanager
async def span():
    """A `with` of somebody else's, a tracer's for example."""
    yield "span"


async def end_once_waited_for(w, pool, lease):
    """What a framework does: it ends a block in another thread, or task, than it has begun it in."""
    await w.until(lambda: pool.stats().waiting == 1)
    await lease.__aexit__(None, None, None)


@scenario
async def a_borrower_inside_the_with_of_another_library_waits_for_what_others_give_back(w):
    pool = w.pool(max_size=1)
    lease = pool.connection()
    await lease.__aenter__()
    other = w.spawn(end_once_waited_for(w, pool, lease))
    async with span() as conn, pool.connection() as second:
        assert conn != second
    assert (await other.join()).error is None
    assert pool.stats().refused == 0


@scenario
async def a_variable_that_still_names_what_others_give_back_is_no_proof(w):
    pool = w.pool(max_size=1)
    lease = pool.connection()
    stale = await lease.__aenter__()  # as a worker's loop keeps the last call's result
    other = w.spawn(end_once_waited_for(w, pool, lease))
    async with span() as conn, pool.connection() as second:
        assert conn != second
    assert stale is not None
    assert (await other.join()).error is None
    assert pool.stats().refused == 0


@scenario
async def a_borrower_waits_while_one_that_waits_too_may_have_its_connection_given_back_by_others(w):
    pool = w.pool(min_size=2, max_size=2)
    await pool.open(wait=True)
    lease, keeps = pool.connection(), w.event()

    async def go_on_in_the_same_worker():
        await w.wait_for(keeps)
        await lease.__aenter__()
        async with pool.connection() as conn:
            return conn is not None

    async def end_the_block():
        await w.until(lambda: pool.stats().waiting == 2)
        await lease.__aexit__(None, None, None)

    async def keep_one_and_ask():
        async with pool.connection() as mine:
            keeps.set()
            await w.until(lambda: pool.stats().waiting == 1)
            async with pool.connection() as second:
                return second is not mine

    flights = [w.spawn(keep_one_and_ask()), w.spawn(go_on_in_the_same_worker())]
    assert (await w.spawn(end_the_block()).join()).error is None
    assert [(await flight.join()).error for flight in flights] == [None, None]
    assert pool.stats().refused == 0


@scenario
async def a_function_that_was_given_its_callers_connection_is_refused_at_once(w):
    pool = w.pool(max_size=1)

    async def report(conn):
        with pytest.raises(MisuseError, match="wait for itself"):
            await pool.execute("select 1")
        return await w.ask(conn, "select 2")

    async with pool.connection() as held:
        assert await report(held) == [(2,)]


@scenario
async def of_two_that_it_holds_both_must_be_kept(w):
    pool = w.pool(max_size=2)
    lease = pool.connection()
    await lease.__aenter__()
    async with pool.connection() as mine:
        other = w.spawn(end_once_waited_for(w, pool, lease))
        async with pool.connection() as second:
            assert second is not mine
        await other.join()
    assert pool.stats().refused == 0
