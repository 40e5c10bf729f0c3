"""A pool's life: opening, closing, draining, resizing, growing old; and what can be read of it."""

from __future__ import annotations

import gc

import pytest

from penstock import ConfigError, PoolClosed
from tests.contract.scenarios import fake_scenario, scenario


@scenario
async def opening_may_wait_until_min_size_is_there(w):
    pool = w.pool(min_size=3)
    await pool.open(wait=True)
    stats = pool.stats()
    assert (stats.idle, stats.size, stats.state) == (3, 3, "open")
    assert w.db.sessions(pool) == 3
    await pool.open(wait=True)  # is open already
    assert pool.stats().opened == 3


@scenario
async def a_pool_as_a_block_is_open_inside_and_closed_after(w):
    async with w.pool(min_size=2) as pool:
        assert (await pool.execute("select 1")).fetchall() == [(1,)]
        assert pool.opened
    assert pool.closed
    assert pool.stats().state == "closed"
    await w.until(lambda: pool.stats().size == 0, pool)


@scenario
async def a_closed_pool_says_that_it_is_closed(w):
    pool = w.pool()
    await pool.open(wait=True)
    await pool.close()
    await pool.close()  # does nothing
    for ask in (pool.getconn, pool.connection().__aenter__, pool.dedicated().__aenter__):
        with pytest.raises(PoolClosed, match="was closed"):
            await ask()
    assert pool.closed
    assert not pool.opened
    await w.until(lambda: w.db.sessions(pool) == 0)


@scenario
async def closing_wakes_those_who_wait_and_waits_for_those_who_borrowed(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    waiters = [w.borrow(pool) for _ in range(3)]
    await w.until(lambda: pool.stats().waiting == 3)
    closer = w.spawn(pool.close())
    for waiter in waiters:
        assert isinstance((await waiter.wait()).error, PoolClosed)
    assert await w.ask(holder.conn, "select 6") == [(6,)]
    assert not closer.done
    await holder.end()
    assert holder.error is None
    assert (await closer.join()).error is None
    assert pool.stats().size == 0


@scenario
async def closing_may_wait_as_long_as_it_takes(w):
    pool = w.pool()
    await pool.open(wait=True)
    holder = await w.borrow(pool).wait()
    closer = w.spawn(pool.close(None))
    await w.until(lambda: pool.closed)
    assert not closer.done
    await holder.end()
    assert (await closer.join()).error is None


@scenario
async def closing_that_cannot_wait_any_longer_warns_and_the_lent_one_ends_at_its_return(w):
    pool = w.pool(max_size=2)
    holder = await w.borrow(pool).wait()
    await pool.close(timeout=0.01)
    assert "closed with 1 connections still lent" in w.log
    assert pool.stats().in_use == 1
    assert await w.ask(holder.conn, "select 1") == [(1,)]
    await holder.end()
    assert holder.error is None
    await w.until(lambda: pool.stats().size == 0, pool)


@scenario
async def a_closed_pool_can_be_opened_again(w):
    pool = w.pool()
    for _ in range(3):
        await pool.open(wait=True)
        assert (await pool.execute("select 1")).fetchall() == [(1,)]
        await pool.close()
        assert pool.stats().size == 0


@scenario
async def a_pool_that_must_be_opened_says_so(w):
    pool = w.pool(open=False)
    with pytest.raises(PoolClosed, match="call open"):
        await pool.getconn()
    await pool.open()
    async with pool.connection():
        pass


@scenario
async def draining_replaces_idle_connections_now_and_lent_ones_at_their_return(w):
    pool = w.pool(min_size=2, max_size=2)
    await pool.open(wait=True)
    holder = await w.borrow(pool).wait()
    await pool.drain()
    await w.until(lambda: pool.stats().closed.get("drained") == 1)
    assert await w.ask(holder.conn, "select 1") == [(1,)]
    await holder.end()
    await w.until(lambda: pool.stats().closed.get("drained") == 2 and pool.stats().idle == 2)
    assert pool.stats().generation == 1
    assert pool.stats().opened == 4


@scenario
async def resizing_closes_what_is_too_much_and_opens_what_is_missing(w):
    pool = w.pool(min_size=4, max_size=4)
    await pool.open(wait=True)
    holder = await w.borrow(pool).wait()
    await pool.resize(1, 2)
    await w.until(lambda: pool.stats().size == 2)
    await holder.end()
    await pool.resize(3)
    await w.until(lambda: pool.stats().idle == 3)
    assert pool.stats().max_size == 3
    with pytest.raises(ConfigError):
        await pool.resize(5, 2)


@scenario
async def a_pool_that_is_made_larger_serves_those_who_wait(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    waiters = [w.borrow(pool) for _ in range(2)]
    await w.until(lambda: pool.stats().waiting == 2)
    await pool.resize(1, 3)
    for waiter in waiters:
        assert (await waiter.wait()).error is None
        await waiter.end()
    await holder.end()


@scenario
async def a_lease_that_was_dropped_comes_home_and_its_connection_is_replaced(w):
    pool = w.pool(min_size=0, max_size=1)
    lease = pool.connection()
    conn = await lease.__aenter__()
    del lease
    gc.collect()
    await w.until(lambda: pool.stats().orphaned == 1 and pool.stats().size == 0)
    async with pool.connection() as other:
        assert other is not conn
        assert await w.ask(other, "select 1") == [(1,)]


@scenario
async def who_waits_is_served_when_a_lease_is_dropped(w):
    pool = w.pool(min_size=0, max_size=1)
    leases = [pool.connection()]
    await leases[0].__aenter__()
    waiter = w.borrow(pool)
    await w.until(lambda: pool.stats().waiting == 1)
    leases.clear()
    gc.collect()
    assert (await waiter.wait()).error is None
    assert await w.ask(waiter.conn, "select 1") == [(1,)]
    await waiter.end()


@scenario
async def a_lease_overdue_is_told_once_with_its_place(w):
    pool = w.pool(overdue_after=0.01, name="shop")
    holder = await w.borrow(pool).wait()
    await w.until(lambda: "has been lent for" in w.log)
    assert ".py:" in w.log
    await holder.end()
    assert w.log.count("has been lent for") == 1


@scenario
async def unused_connections_are_closed_down_to_min_size(w):
    # A pool that is in use when a connection's time comes looks again at overdue_after, at the latest.
    pool = w.pool(min_size=1, max_size=4, max_idle=0.01, overdue_after=0.5)
    for borrower in [w.borrow(pool) for _ in range(4)]:
        await (await borrower.wait()).end()
    await w.until(lambda: pool.stats().size == 1)
    assert pool.stats().closed.keys() <= {"shrunk"}


@scenario
async def old_connections_are_replaced_while_idle(w):
    pool = w.pool(min_size=1, max_lifetime=0.01, overdue_after=0.5)
    await pool.open(wait=True)
    await w.until(lambda: pool.stats().closed.get("retired", 0) >= 2)


@scenario
async def an_old_connection_is_not_taken_from_its_borrower(w):
    pool = w.pool(min_size=0, max_size=1, max_lifetime=0.01, overdue_after=0.5)
    holder = await w.borrow(pool).wait()
    await w.runtime.pause(0.02)  # older than it may become
    assert await w.ask(holder.conn, "select 1") == [(1,)]
    await holder.end()
    async with pool.connection() as conn:
        assert conn is not holder.conn
    await w.until(lambda: pool.stats().closed.get("retired", 0) >= 1)


@scenario
async def a_busy_pool_is_ready_and_a_closed_one_is_not_alive(w):
    pool = w.pool(min_size=1, max_size=1)
    assert "not opened yet" in pool.health().why
    assert pool.health().ready
    async with pool.connection():
        health = pool.health()
        assert health.ready
        assert "1 of 1 in use" in health.why
    await pool.close()
    assert not pool.health().live
    assert pool.health().why == "closed"


@fake_scenario
async def health_tells_down_from_busy(w):
    from penstock import PenstockError
    from penstock.testing import Mode

    pool = w.pool(min_size=1, max_size=1)
    await pool.open(wait=True)
    w.server.mode = Mode.DOWN
    await w.until(lambda: pool.stats().idle == 0)
    with pytest.raises(PenstockError):
        await pool.getconn(timeout=0.2)
    health = pool.health()
    assert health.live
    assert not health.ready
    assert "connection refused" in health.why
    assert "down for" in repr(pool)


async def long_down(w, pool):
    """An outage in which nobody has waited for long: the next attempt is half a minute away."""
    from penstock import ServerUnavailable
    from penstock._process.clock import clock
    from penstock.testing import Mode

    w.server.mode = Mode.DOWN
    with pytest.raises(ServerUnavailable):
        await pool.getconn(timeout=0.5)  # on a loaded machine an attempt takes its time to fail
    await w.until(lambda: pool._machine.outage is not None and pool.stats().opening == 0)
    outage = pool._machine.outage
    outage.since, outage.failures = clock() - 3600.0, 100
    if pool.stats().min_size:
        await w.until(lambda: outage.next_for_nobody - clock() > 20.0)
    return outage


@fake_scenario
async def a_pool_that_only_probes_ask_about_is_ready_soon_after_its_server(w):
    from penstock._process.clock import clock
    from penstock.testing import Mode

    for min_size in (1, 0):
        pool = w.pool(min_size=min_size)
        outage = await long_down(w, pool)
        assert not pool.health().ready
        w.server.mode = Mode.UP
        again = outage.next_for_nobody
        await w.until(lambda pool=pool: pool.health().ready)
        assert min_size == 0 or clock() < again, "the question brought the attempt forward"
        await pool.close()


@fake_scenario
async def whoever_only_reads_the_figures_causes_no_attempt(w):
    pool = w.pool(min_size=1)
    await long_down(w, pool)
    failures = pool.stats().open_failures
    for _ in range(100):
        repr(pool)
        assert pool.stats().open_failures == failures
        await w.runtime.pause()


@fake_scenario
async def opening_that_waits_for_the_second_connection_has_it_tried_on(w):
    from penstock.testing import Mode

    pool = w.pool(min_size=1, max_size=2)
    await pool.open(wait=True)
    w.server.mode = Mode.FULL
    await pool.resize(2)
    await w.until(lambda: pool._machine.outage is not None and pool.stats().opening == 0)
    outage = pool._machine.outage
    outage.since -= 3600.0
    outage.failures, outage.next_for_nobody = 100, outage.next_for_nobody + 3600.0
    opening = w.spawn(pool.open(wait=True))
    w.server.mode = Mode.UP
    await w.until(lambda: pool.stats().idle == 2)
    await opening.join()


@scenario
async def what_can_be_read_says_how_it_is(w):
    pool = w.pool(min_size=1, max_size=4, name="shop")
    await pool.open(wait=True)
    assert pool.name == "shop"
    async with pool.connection():
        stats = pool.stats()
        assert (stats.name, stats.state, stats.in_use, stats.max_size) == ("shop", "open", 1, 4)
        assert "'shop' open: 0 idle, 1 in use, 0 opening of 4>" in repr(pool)
    kind = "AsyncConnectionPool" if w.runtime.asynchronous else "ConnectionPool"
    assert repr(pool) == f"<{kind} 'shop' open: 1 idle, 0 in use, 0 opening of 4>"
    assert pool.stats().borrows >= 1


@fake_scenario
async def a_dropped_pool_is_no_leak(w):
    pool = w.pool(min_size=1)
    await pool.execute("select 1")
    link = next(iter(w.server.sessions.values()))
    w.forget(pool)
    del pool
    for _ in range(3):
        gc.collect()
        await w.runtime.pause()
    w.server.sessions.clear()
    assert link.conn is not None
