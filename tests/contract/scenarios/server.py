"""What a pool does when the server is down, full, slow, silent, or gone in the middle."""

from __future__ import annotations

import pytest

from penstock import PenstockError, ServerUnavailable
from penstock.testing import FakeOperationalError, Mode
from tests.contract.scenarios import fake_scenario, scenario


@fake_scenario
async def a_server_that_is_down_is_told_from_a_full_pool(w):
    pool = w.pool()
    w.server.mode = Mode.DOWN
    with pytest.raises(ServerUnavailable) as caught:
        await pool.getconn(timeout=0.2)
    assert isinstance(caught.value, FakeOperationalError)
    assert isinstance(caught.value.__cause__, FakeOperationalError)
    assert "connection refused" in str(caught.value)
    assert pool.stats().waiting == 0


@fake_scenario
async def a_wrong_password_is_told_at_once_after_one_attempt(w):
    pool = w.pool(min_size=4)
    w.server.mode = Mode.WRONG_PASSWORD
    with pytest.raises(ServerUnavailable) as caught:
        await pool.open(wait=True)
    assert caught.value.sqlstate == "28P01"
    assert w.server.connects == 1


@fake_scenario
async def a_wrong_password_refuses_everybody_who_waits_at_once(w):
    pool = w.pool(min_size=0, max_size=2)
    w.server.mode = Mode.HANGING
    waiters = [w.borrow(pool) for _ in range(4)]
    await w.until(lambda: pool.stats().waiting == 4 and w.server.connects > 0)
    w.server.mode = Mode.WRONG_PASSWORD
    for waiter in waiters:
        assert isinstance((await waiter.wait()).error, ServerUnavailable)
    assert w.server.connects <= 2


@fake_scenario
async def waiters_are_served_when_the_server_is_back(w):
    for mode in (Mode.DOWN, Mode.RESTARTING):
        pool = w.pool(max_size=2)
        w.server.mode = mode
        waiters = [w.borrow(pool) for _ in range(5)]
        await w.until(lambda pool=pool: pool.stats().open_failures >= 2)
        assert all(waiter.error is None for waiter in waiters)
        w.server.mode = Mode.UP
        for waiter in waiters:
            waiter.may_end.set()
        for waiter in waiters:
            assert (await waiter.end()).error is None
        await pool.close()


@fake_scenario
async def one_connect_at_a_time_looks_for_a_server_that_is_down(w):
    pool = w.pool(min_size=0, max_size=3)
    w.server.mode = Mode.DOWN
    waiters = [w.borrow(pool) for _ in range(8)]
    await w.until(lambda: pool.stats().open_failures >= 4)  # three that knew of no outage, and on
    w.server.mode = Mode.SLOW
    before = w.server.connects
    await w.until(lambda: pool.stats().opening == 1)
    await w.runtime.pause(0.3)  # longer than the pause between two attempts: no other one comes
    assert w.server.connects <= before + 1
    assert pool.stats().opening == 1
    w.server.mode = Mode.UP
    for waiter in waiters:
        waiter.may_end.set()
        assert (await waiter.wait()).error is None


@fake_scenario
async def a_dedicated_connection_that_cannot_be_opened_says_why(w):
    pool = w.pool()
    for mode in (Mode.DOWN, Mode.WRONG_PASSWORD, Mode.FULL):
        w.server.mode = mode
        with pytest.raises(ServerUnavailable, match=mode.value) as caught:
            async with pool.dedicated():
                pass
        assert isinstance(caught.value.__cause__, FakeOperationalError)
    assert pool.stats().size == 0


@fake_scenario
async def a_server_that_has_no_room_serves_with_what_is_open(w):
    pool = w.pool(min_size=0, max_size=2)
    holder = await w.borrow(pool).wait()
    w.server.mode = Mode.FULL
    waiter = w.borrow(pool)
    await w.until(lambda: pool.stats().open_failures >= 1)
    await holder.end()
    assert (await waiter.wait()).error is None
    assert waiter.conn is holder.conn
    with pytest.raises(ServerUnavailable) as caught:
        await pool.getconn(timeout=0.05)
    assert "too many clients" in str(caught.value.__cause__)
    await waiter.end()


@fake_scenario
async def a_slow_connect_is_waited_for_and_a_return_comes_first(w):
    pool = w.pool(min_size=0, max_size=2)
    holder = await w.borrow(pool).wait()
    w.server.mode = Mode.SLOW
    waiter = w.borrow(pool)
    await w.until(lambda: w.server.connects == 2)
    assert not waiter.has.is_set()
    await holder.end()
    assert (await waiter.wait()).conn is holder.conn
    w.server.admit()
    await w.until(lambda: pool.stats().idle == 1)
    await waiter.end()
    assert pool.stats().opened == 2


@fake_scenario
async def a_server_that_hangs_costs_a_borrower_his_timeout_and_not_more(w):
    pool = w.pool(min_size=0)
    w.server.mode = Mode.HANGING
    for _ in range(2):
        with pytest.raises(PenstockError):
            await pool.getconn(timeout=0.05)
    with pytest.raises(ServerUnavailable):
        async with pool.dedicated(timeout=0.05):
            pass
    w.server.mode = Mode.UP
    await w.check_usable(w.pool(max_size=1))


@fake_scenario
async def that_the_server_stays_away_is_reported_once(w):
    told: list[object] = []

    async def failed(pool):
        told.append(pool)

    for call in (told.append, w.callable(failed)):
        told.clear()
        w.server.mode = Mode.DOWN
        pool = w.pool(min_size=1, reconnect_timeout=0.05, reconnect_failed=call)
        with pytest.raises(ServerUnavailable):
            await pool.getconn(timeout=0.1)
        await w.until(lambda: told)
        assert len(told) == 1
        assert told[0].name == pool.name  # type: ignore[attr-defined]
        w.server.mode = Mode.UP
        await w.until(lambda pool=pool: pool.stats().idle == 1)
        await w.until(lambda: "can be opened again" in w.log)
        await pool.close()


@scenario
async def an_idle_connection_that_the_server_ended_is_not_lent(w):
    pool = w.pool(min_size=3, max_size=3)
    await pool.open(wait=True)
    w.db.hang_up(pool)
    await w.until(lambda: pool.stats().closed.get("hung up") == 3)
    for number in range(10):
        assert (await pool.execute(f"select {number}")).fetchall() == [(number,)]
    if w.db.fake:
        assert w.server.pings == 0


@scenario
async def a_session_that_ends_in_use_is_its_borrowers_error_once(w):
    pool = w.pool(min_size=0, max_size=1)
    with pytest.raises(Exception, match=r"."):
        async with pool.connection() as conn:
            await w.ask(conn, "select 1")
            w.db.hang_up(pool)
            await w.until(lambda: w.db.sessions(pool) == 0)
            await w.ask(conn, "select 2")
    await w.check_usable(pool)
    assert pool.stats().opened == 2


@fake_scenario
async def a_session_that_ends_in_use_has_the_older_ones_pinged(w):
    pool = w.pool(min_size=2, max_size=2)
    await pool.open(wait=True)
    with pytest.raises(FakeOperationalError):
        async with pool.connection() as conn:
            raise FakeOperationalError("terminating connection", "57P01")
    async with pool.connection():
        pass
    assert w.server.pings == 1
    await w.until(lambda: conn.closed)


@fake_scenario
async def a_read_only_server_ends_the_session_where_writes_are_wanted(w):
    for read_write in (True, False):
        pool = w.pool(min_size=1, max_size=1, read_write=read_write)
        await pool.open(wait=True)
        with pytest.raises(FakeOperationalError):
            async with pool.connection():
                raise FakeOperationalError("cannot execute INSERT", "25006")
        async with pool.connection():
            pass
        assert pool.stats().opened == 1 + read_write


@scenario
async def a_connection_idle_for_longer_than_ping_after_is_pinged_once(w):
    pool = w.pool(max_size=1, ping_after=0)
    await pool.open(wait=True)
    before = w.server.pings if w.db.fake else 0
    assert (await pool.execute("select 1")).fetchall() == [(1,)]
    if w.db.fake:
        assert w.server.pings == before + 1
    await w.check_usable(pool)
    assert pool.stats().opened == 1


@fake_scenario
async def a_ping_without_an_answer_is_not_the_borrowers_trouble(w):
    pool = w.pool(min_size=0, ping_after=0)
    await pool.execute("select 1")
    session = next(iter(w.server.sessions.values()))
    session._server_hangs_up = lambda: None
    session.ping = w.runtime.stub(False)
    assert (await pool.execute("select 1")).fetchall() == [(1,)]
    await w.until(lambda: pool.stats().closed == {"ping unanswered": 1})


@fake_scenario
async def what_is_condemned_during_its_ping_is_not_lent_though_it_was_answered(w):
    for disturb in ("hang up", "drain"):
        pool = w.pool(min_size=0, max_size=1, ping_after=0)
        async with pool.connection() as first:
            pass
        link, answered = first._link, list[bool]()

        async def ping(_seconds, *, pool=pool, link=link, answered=answered, disturb=disturb):
            answered.append(True)
            if disturb == "drain":
                await pool.drain()
            else:
                w.server.hang_up(link.number)
                # Until it has been told: by the watcher, or by the driver.
                await w.until(lambda: any(slot.condemned for slot in pool._machine.slots()))
            return True

        link.ping = w.callable(ping)
        async with pool.connection() as conn:
            assert conn is not first
            assert not conn.closed
        assert answered == [True]
        await pool.close()


@fake_scenario
async def where_nothing_watches_each_borrow_looks_at_the_connection(w):
    from penstock._process import watch

    w.patch.setattr(watch, "available", lambda: False)
    pool = w.pool(min_size=0, max_size=2)
    for borrower in [w.borrow(pool), w.borrow(pool)]:
        await borrower.wait()
        await borrower.end()
    w.patch.setattr(watch.Watch, "add", lambda _self, _fd, _token: 0)
    await pool.drain()
    await pool.execute("select 1")
    w.server.hang_up()
    assert (await pool.execute("select 1")).fetchall() == [(1,)]
    assert w.server.pings == 0
