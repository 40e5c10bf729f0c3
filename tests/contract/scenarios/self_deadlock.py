"""When a borrower that holds a connection is refused at once, and when it waits: only on proof."""

from __future__ import annotations

import contextlib

import pytest

from penstock import MisuseError, PoolTimeout
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


# -- what a borrower that has waited in vain is told -----------------------------------------------------


async def told(pool):
    """The error of a borrower that waits in vain."""
    with pytest.raises(PoolTimeout) as caught:
        await pool.execute("select 1", timeout=0.05)
    return caught.value


@scenario
async def a_borrower_that_holds_one_of_those_that_it_waits_for_is_told_so_first(w):
    pool = w.pool(max_size=1)
    async with pool.connection():  # no variable: nothing proves who gives it back
        error = await told(pool)
    (own,) = error.own
    assert own.file is None
    assert own.kind == {"threads": "thread", "gevent": "greenlet"}.get(w.runtime.name, "task")
    first, second, *_ = str(error).splitlines()
    assert "1 of 1 in use" in first
    assert second.startswith(f"  this {own.kind} itself holds one of them, since ")
    assert "borrowed at a place that was not noted" in second
    assert "next step: use the connection that it has, or give it back first" in str(error)
    assert "end transactions" not in str(error)


@scenario
async def the_place_of_what_getconn_has_lent_is_where_its_variable_is(w):
    pool = w.pool(max_size=1)
    conn = await pool.getconn()
    error = await told(pool)
    await pool.putconn(conn)
    (own,) = error.own
    assert own.function == "the_place_of_what_getconn_has_lent_is_where_its_variable_is"
    assert f"in a variable of {own.function}() at scenarios/self_deadlock.py:{own.line}" in str(
        error
    )


@scenario
async def what_getconn_has_lent_and_no_variable_names_is_told_with_its_door(w):
    pool = w.pool(max_size=1)
    request = [await pool.getconn()]  # as `g`, or an object of the program's
    error = await told(pool)
    await pool.putconn(request.pop())
    assert len(error.own) == 1
    assert "itself holds one of them, since " in str(error)
    assert "borrowed by getconn() at a place that was not noted" in str(error)


@scenario
async def where_a_with_has_bound_it_its_line_is_where_it_was_borrowed(w):
    pool = w.pool(max_size=2)
    other = await w.borrow(pool).wait()
    async with pool.connection() as conn:
        error = await told(pool)
        assert conn is not None
    await other.end()
    (own,) = error.own
    begins = where_a_with_has_bound_it_its_line_is_where_it_was_borrowed.__code__.co_firstlineno
    assert (own.line or 0) - begins == 4
    assert own.function is None
    assert f"borrowed at scenarios/self_deadlock.py:{own.line}" in str(error)


@scenario
async def a_borrower_that_holds_none_is_told_nothing_of_the_kind(w):
    pool = w.pool(max_size=1)
    other = await w.borrow(pool).wait()
    error = await told(pool)
    await other.end()
    assert error.own == ()
    assert "itself" not in str(error)


@scenario
async def what_a_borrower_holds_of_another_pool_is_no_deadlock(w):
    one, two = w.pool(max_size=1), w.pool(max_size=1)
    async with one.connection() as conn:
        await two.execute("select 1")
        other = await w.borrow(two).wait()
        error = await told(two)
        await other.end()
        assert conn is not None
    assert error.own == ()
