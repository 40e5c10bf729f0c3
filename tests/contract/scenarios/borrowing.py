"""Who gets a connection, when, in which order, and what is said to who gets none."""

from __future__ import annotations

import pytest

from penstock import MisuseError, PenstockError, PoolClosed, PoolTimeout, TooManyRequests
from tests.contract.scenarios import fake_scenario, scenario


@scenario
async def making_a_pool_opens_nothing(w):
    pool = w.pool(min_size=3)
    assert w.db.sessions(pool) == 0
    assert "new: 0 idle, 0 in use, 0 opening of 10" in repr(pool)
    assert not pool.opened
    assert not pool.closed


@scenario
async def the_first_borrow_opens_the_pool_up_to_min_size(w):
    pool = w.pool(min_size=3)
    async with pool.connection() as conn:
        assert await w.ask(conn, "select 1") == [(1,)]
    await w.until(lambda: pool.stats().idle == 3)
    assert pool.stats().opened == 3
    assert w.db.sessions(pool) == 3
    assert pool.opened


@scenario
async def what_is_idle_is_lent_before_anything_is_opened(w):
    pool = w.pool(min_size=0)
    for number in range(20):
        async with pool.connection() as conn:
            assert await w.ask(conn, f"select {number}") == [(number,)]
    assert pool.stats().opened == 1
    assert pool.stats().borrows == 20


@scenario
async def a_returned_connection_is_lent_again_the_last_one_first(w):
    pool = w.pool(min_size=0)
    first, second = await w.borrow(pool).wait(), await w.borrow(pool).wait()
    await first.end()
    await second.end()
    async with pool.connection() as conn:
        assert conn is second.conn


@scenario
async def in_fifo_order_the_longest_idle_connection_is_lent_first(w):
    pool = w.pool(min_size=0, order="fifo")
    first, second = await w.borrow(pool).wait(), await w.borrow(pool).wait()
    await first.end()
    await second.end()
    async with pool.connection() as conn:
        assert conn is first.conn


@scenario
async def a_pool_grows_to_max_size_and_no_further(w):
    pool = w.pool(min_size=0, max_size=3)
    borrowers = [w.borrow(pool) for _ in range(5)]
    await w.until(lambda: pool.stats().in_use == 3 and pool.stats().waiting == 2)
    assert w.db.sessions(pool) == 3
    for borrower in borrowers:
        borrower.may_end.set()
    for borrower in borrowers:
        await borrower.end()
        assert borrower.error is None
    assert pool.stats().opened == 3


@scenario
async def a_waiter_is_handed_the_connection_that_comes_back(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    waiter = w.borrow(pool)
    await w.until(lambda: pool.stats().waiting == 1)
    assert "1 waiting, longest" in repr(pool)
    await holder.end()
    assert (await waiter.wait()).conn is holder.conn
    await waiter.end()
    assert pool.stats().queued >= 1


@scenario
async def waiters_are_served_in_the_order_they_came(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    waiters = []
    for number in range(8):
        waiters.append(w.borrow(pool))
        await w.until(lambda wanted=number + 1: pool.stats().waiting == wanted)
    await holder.end()
    for position, waiter in enumerate(waiters):
        await waiter.wait()
        assert not any(later.has.is_set() for later in waiters[position + 1 :])
        await waiter.end()


@scenario
async def who_gives_back_and_asks_again_does_not_overtake_who_waits(w):
    pool = w.pool(max_size=1)
    conn = await pool.getconn()
    for turn in range(10):
        waiter = w.borrow(pool)
        await w.until(lambda: pool.stats().waiting == 1)
        await pool.putconn(conn)
        waiter.may_end.set()  # or this borrower would wait for ever
        conn = await pool.getconn()
        assert waiter.has.is_set(), f"overtaken in turn {turn}"
        await waiter.end()
    await pool.putconn(conn)


@scenario
async def a_crowd_is_served_and_everybody_gets_his_own_answers(w):
    pool = w.pool(min_size=0, max_size=3)

    async def one(number):
        for turn in range(8):
            async with pool.connection(**w.db.transaction) as conn:
                wanted = number * 100 + turn
                assert await w.ask(conn, f"select {wanted}") == [(wanted,)]

    flights = [w.spawn(one(number)) for number in range(16)]
    for flight in flights:
        assert (await flight.join()).error is None
    stats = pool.stats()
    assert stats.borrows == 16 * 8
    assert stats.opened <= 3
    assert stats.in_use == stats.waiting == stats.timeouts == 0


@scenario
async def a_full_pool_says_so_with_counts_and_who_holds_what(w):
    pool = w.pool(max_size=1, name="shop")
    holder = await w.borrow(pool).wait()
    with pytest.raises(PoolTimeout) as caught:
        await pool.getconn(timeout=0.01)
    text = str(caught.value)
    assert "no connection within 0.0 s from pool 'shop': 1 of 1 in use" in text
    assert "held longest" in text
    assert ".py:" in text
    assert caught.value.counts.in_use == 1
    assert pool.stats().waiting == 0
    assert pool.stats().timeouts == 1
    await holder.end()


@scenario
async def timeout_zero_takes_what_is_free_and_waits_for_nothing(w):
    pool = w.pool(max_size=1)
    await pool.open(wait=True)
    async with pool.connection(timeout=0):
        other = await w.borrow(pool, timeout=0).wait()
    assert isinstance(other.error, PoolTimeout)


@scenario
async def too_many_waiters_are_refused_at_once(w):
    pool = w.pool(max_size=1, max_waiting=1)
    holder = await w.borrow(pool).wait()
    waiter = w.borrow(pool)
    await w.until(lambda: pool.stats().waiting == 1)
    with pytest.raises(TooManyRequests) as caught:
        await pool.getconn()
    assert caught.value.max_waiting == 1
    assert pool.stats().refused == 1
    await holder.end()
    assert (await waiter.wait()).error is None
    await waiter.end()


@scenario
async def a_waiter_whose_time_is_up_is_not_counted_any_more(w):
    pool = w.pool(max_size=1, max_waiting=1)
    holder = await w.borrow(pool).wait()
    for _ in range(3):
        with pytest.raises(PoolTimeout):
            await pool.getconn(timeout=0.001)
    assert pool.stats().timeouts == 3
    assert pool.stats().waiting == 0
    await holder.end()
    await w.check_usable(pool)


@scenario
async def a_borrower_that_would_wait_for_itself_is_told_at_once(w):
    pool = w.pool(max_size=2)
    async with pool.connection() as one, pool.connection() as two:
        with pytest.raises(MisuseError, match="wait for itself"):
            await pool.getconn()
        assert one is not two
    async with pool.connection():
        pass


@scenario
async def two_borrowers_that_would_wait_for_each_other_are_told(w):
    pool = w.pool(max_size=2)
    other_has, both_have = w.event(), w.event()

    async def other():
        async with pool.connection() as held:
            other_has.set()
            await w.wait_for(both_have)
            try:
                async with pool.connection() as second:
                    return second is not held
            except PenstockError as error:
                return error

    async with pool.connection() as mine:
        flight = w.spawn(other())
        await w.wait_for(other_has)
        both_have.set()
        await w.until(lambda: pool.stats().waiting == 1)
        with pytest.raises(MisuseError, match="wait for itself"):
            await pool.getconn()
        assert await w.ask(mine, "select 5") == [(5,)]
    assert (await flight.join()).result is True


@fake_scenario
async def a_borrower_leaving_early_does_not_cancel_the_opening_it_caused(w):
    from penstock.testing import Mode

    pool = w.pool(min_size=0)
    w.server.mode = Mode.SLOW
    with pytest.raises(PenstockError):
        await pool.getconn(timeout=0.01)
    w.server.admit()
    await w.until(lambda: pool.stats().idle == 1)
    assert w.server.connects == 1


@scenario
async def execute_is_one_statement_and_the_rows_are_there(w):
    pool = w.pool(max_size=1)
    result = await pool.execute("select 7")
    assert result.fetchone() == (7,)
    assert result.fetchone() is None
    assert (await pool.execute("select 8")).fetchall() == [(8,)]
    stats = pool.stats()
    assert (stats.idle, stats.in_use, stats.borrows) == (1, 0, 2)


@fake_scenario
async def execute_begins_no_transaction(w):
    pool = w.pool()
    await pool.execute("select 7")
    assert [text for _, text in w.server.statements] == ["select 7"]


@fake_scenario
async def a_statement_of_execute_that_fails_is_raised_and_the_connection_goes_back(w):
    pool = w.pool(max_size=1)
    w.server.answers["select x"] = w.db.operational_error("no such column")
    with pytest.raises(w.db.operational_error, match="no such column"):
        await pool.execute("select x")
    await w.check_usable(pool)
    assert pool.stats().opened == 1


@scenario
async def a_dedicated_connection_does_not_count(w):
    pool = w.pool(max_size=1)
    async with pool.connection(), pool.dedicated() as conn:
        assert await w.ask(conn, "select 3") == [(3,)]
        assert pool.stats().size == 1
        assert w.db.sessions(pool) == 2
    await w.until(lambda: w.db.sessions(pool) == 1)


@scenario
async def getconn_and_putconn_lend_and_take_back(w):
    pool = w.pool(max_size=1)
    conn = await pool.getconn()
    assert await w.ask(conn, "select 4") == [(4,)]
    assert pool.stats().in_use == 1
    await pool.putconn(conn)
    assert pool.stats().in_use == 0
    assert pool.stats().idle == 1
    again = await pool.getconn()
    assert again is conn
    await pool.putconn(again)


@scenario
async def who_gives_back_need_not_be_who_borrowed(w):
    pool = w.pool(max_size=1)
    conn = await pool.getconn()

    async def give_back():
        await pool.putconn(conn)

    assert (await w.spawn(give_back()).join()).error is None
    await w.check_usable(pool)


@scenario
async def waits_that_were_in_vain_are_in_the_figures(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    losers = [w.borrow(pool, 0.3) for _ in range(5)]
    for loser in losers:
        assert isinstance((await loser.wait()).error, PoolTimeout)
    stats = pool.stats()
    assert (stats.timeouts, stats.queued) == (5, 5 + 1)  # the holder has waited for its opening
    assert stats.longest_wait >= 0.3
    assert stats.wait_p50 >= 0.3
    assert stats.wait_p99 >= 0.3
    assert stats.waited >= 5 * 0.3
    await holder.end()


@scenario
async def waits_that_go_on_and_waits_that_end_by_a_refusal_are_in_the_figures(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    waiters = [w.borrow(pool) for _ in range(3)]
    await w.until(lambda: pool.stats().waiting == 3)
    await w.until(lambda: pool.stats().longest_waiting > 0.05)
    stats = pool.stats()
    assert stats.longest_wait >= 0.05
    assert stats.wait_p99 >= 0.05
    assert stats.queued == 1
    closing = w.spawn(pool.close())
    for waiter in waiters:
        assert isinstance((await waiter.wait()).error, PoolClosed)
    await holder.end()
    await closing.join()
    stats = pool.stats()
    assert (stats.queued, stats.refused, stats.timeouts) == (4, 3, 0)
    assert stats.longest_wait >= 0.05
