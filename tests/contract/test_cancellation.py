"""Cancelled at each of its suspension points, nothing that a pool does loses anything.

One job: for each case the suspension points are counted, and it is run once for each of them and for
each way to be struck there. Afterwards the pool is idle, full and right every time: all of its
connections can be borrowed at once and each answers for itself, and the server has no other sessions.

A case is an asynchronous generator: it prepares, yields the coroutine that is struck, and looks at
what has become of it. Each runs on one pool for all points, so what one leaves behind the next one finds.
"""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import pytest

from tests.contract.cancelling import CANCEL, LEAVE, WAYS, Stepped
from tests.contract.databases import pool_name
from tests.contract.runtimes import PATIENCE, Asyncio
from tests.contract.world import COMBINATIONS, play

CASES: dict[str, Any] = {}

#: Where another loop may differ.
BY_THE_LOOP = ("cancelled", "cancelled late")


def case(suspends=True, **options):
    """One case; `options` are its pool's. `suspends`: False says that it never does."""

    def add(function):
        CASES[function.__name__] = (function, suspends, options)
        return function

    return add


async def use(w, pool, **options):
    async with pool.connection(**options) as conn:
        assert await w.ask(conn, "select 42") == [(42,)]


@case(suspends=False)
async def a_borrow_of_an_idle_connection(w, pool):
    async def act():
        async with pool.connection():
            pass

    await pool.open(wait=True)
    yield act()


@case()
async def a_borrow_that_waits_and_is_handed_over(w, pool):
    held = [await pool.getconn() for _ in range(2)]
    behind = []

    async def return_soon():
        await w.until(lambda: pool.stats().waiting == 1)
        behind.append(w.spawn(use(w, pool)))
        await w.until(lambda: pool.stats().waiting != 1)  # two, or the one was struck
        await pool.putconn(held.pop())

    helper = w.spawn(return_soon())
    yield use(w, pool)
    helper.task.cancel()  # it was struck before anybody saw it wait
    await helper.join()
    while held:
        await pool.putconn(held.pop())
    for each in behind:
        assert (await each.join()).error is None, "another one's wait was lost"


@case(min_size=0)
async def a_borrow_that_must_connect(w, pool):
    await pool.drain()
    await w.until(lambda: pool.stats().size == 0)
    yield use(w, pool)


@case(ping_after=0)
async def a_borrow_that_pings(w, pool):
    yield use(w, pool)


@case(reset="session")
async def a_borrow_that_reads_the_answer_to_a_reset(w, pool):
    await use(w, pool)
    yield use(w, pool)


@case()
async def a_commit_at_the_end(w, pool):
    key = pool_name()

    async def act():
        async with pool.connection(**w.db.transaction) as conn:
            await w.db.write(conn, key)

    yield act()
    assert w.db.written(key) in {0, 1}


@case()
async def a_rollback_at_the_end(w, pool):
    key = pool_name()

    async def act():
        with pytest.raises(ZeroDivisionError):
            async with pool.connection(**w.db.transaction) as conn:
                await w.db.write(conn, key)
                _ = 1 / 0

    yield act()
    assert w.db.written(key) == 0


@case()
async def a_statement_under_way(w, pool):
    slow = "select 1" if w.db.fake else "select 1 from pg_sleep(0.01)"

    async def act():
        async with pool.connection() as conn:
            assert await w.ask(conn, slow) == [(1,)]

    yield act()


@case()
async def a_borrow_with_settings(w, pool):
    yield use(w, pool, settings={"app.user": "ann"})


@case()
async def a_borrow_with_a_transaction(w, pool):
    yield use(w, pool, transaction=True)


@case()
async def a_borrow_with_autocommit(w, pool):
    yield use(w, pool, autocommit=True)


async def ask_and_end(w, conn):
    await w.ask(conn, "select 7")
    if not w.db.transaction:
        await conn.rollback()


@case(check=ask_and_end)
async def a_borrow_with_check(w, pool):
    yield use(w, pool)


@case(on_borrow=ask_and_end)
async def a_borrow_with_on_borrow(w, pool):
    yield use(w, pool)


@case(reset=ask_and_end)
async def a_return_with_reset(w, pool):
    yield use(w, pool)


@case()
async def getconn_and_a_putconn_that_rolls_back(w, pool):
    key = pool_name()
    lent = []

    async def act():
        conn = await pool.getconn()
        lent.append(conn)
        await w.ask(conn, "begin" if w.db.transaction else "select 1")
        await w.db.write(conn, key)
        lent.remove(conn)
        await pool.putconn(conn)

    yield act()
    for conn in lent:  # its borrower's to give back, whatever strikes him
        await pool.putconn(conn)
    assert w.db.written(key) == 0


@case()
async def execute(w, pool):
    async def act():
        assert (await pool.execute("select 9")).fetchall() == [(9,)]

    yield act()


@case()
async def dedicated(w, pool):
    async def act():
        async with pool.dedicated() as conn:
            assert await w.ask(conn, "select 9") == [(9,)]

    yield act()


@case()
async def opening_with_wait(w, pool):
    await pool.close()
    yield pool.open(wait=True)


@case()
async def closing_while_one_is_lent(w, pool):
    holder = await w.borrow(pool).wait()

    async def return_soon():
        await w.until(lambda: pool.closed)
        holder.may_end.set()

    helper = w.spawn(return_soon())
    yield pool.close()
    await pool.close()
    await helper.join()
    await holder.end()
    await pool.open()


@case()
async def draining_and_resizing(w, pool):
    async def act():
        await pool.drain()
        await pool.resize(1, 3)
        await use(w, pool)
        await pool.resize(2, 2)

    yield act()
    await pool.resize(2, 2)


def pairs():
    for combination in COMBINATIONS:
        if not combination.runtime.asynchronous or combination.missing():
            continue  # test_contract.py says what is missing
        if combination.name in {"asyncio-telling", "uvloop-asyncpg"}:
            continue  # what they differ in is not what is struck
        for name in CASES:
            yield pytest.param(combination, name, id=f"{combination.name}-{name}")


@pytest.mark.parametrize(("combination", "name"), list(pairs()))
def test_struck_at_each_suspension_point_nothing_is_lost(combination, name, request):
    conninfo = None
    if not combination.fake:
        conninfo = request.getfixturevalue("server").conninfo(over="unix")
    function, suspends, options = CASES[name]
    points = []

    async def scenario(w):
        given = {
            key: partial(value, w) if callable(value) else value for key, value in options.items()
        }
        pool = w.pool(**{"min_size": 2, "max_size": 2, **given})
        points.append(await run_once(w, function, pool))
        if not suspends:
            assert points == [0]
            return
        for how in WAYS if combination.runtime is Asyncio else BY_THE_LOOP:
            at = 1
            while await run_once(w, function, pool, at, how):
                at += 1
            assert at > 1, f"{how}: it was struck nowhere"
            check_unseen(w, how)

    play(combination, scenario, conninfo, name)
    assert bool(points[0]) is suspends


async def run_once(w, function, pool, at=0, how=None):
    """Once, struck or not; how many suspensions there were, or 0 if there are less than `at`."""
    going = function(w, pool)
    stepped = Stepped(await anext(going), at, how)
    task = asyncio.create_task(await_it(stepped))
    done, _ = await asyncio.wait({task}, timeout=PATIENCE)
    label = f"{how} at point {at} of {function.__name__}: {pool}"
    assert done, f"it never ends; {label}"
    if how in CANCEL and stepped.struck:
        assert task.cancelled(), f"the cancellation was lost; {label}"
    else:
        await task
    async for _ in going:
        raise AssertionError("a case yields once")
    await check_whole(w, pool, how, label)
    return stepped.suspended if how is None or stepped.struck else 0


async def await_it(stepped):
    return await stepped


def check_unseen(w, how):
    """Nothing has failed without anybody to hear of it."""
    if how in LEAVE and w.db.options()["driver"] == "asyncpg":
        # It tells its future of the end, and who awaited that was closed before.
        gc.collect()
        told = "connection was closed in the middle of operation"
        w.runtime.unseen[:] = [each for each in w.runtime.unseen if told not in each]
    assert not w.runtime.unseen, f"{how}: {w.runtime.unseen}"


async def check_whole(w, pool, how, label):
    """Idle, full and right."""

    def at_rest():
        stats = pool.stats()
        return not (
            stats.in_use or stats.waiting or stats.pinging or stats.opening or stats.closing
        )

    await w.until(at_rest, label)
    assert pool.stats().size <= pool.stats().max_size, label
    try:
        await w.check_usable(pool)
    except AssertionError as error:
        raise AssertionError(label) from error
    await w.until(at_rest, label)
    assert pool.stats().orphaned == 0 or how in LEAVE, label
    await w.until(lambda: w.db.sessions(pool) == pool.stats().size, label)
    assert "ERROR" not in w.log, f"{label}\n{w.log}"
