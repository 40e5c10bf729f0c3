"""What a program must not do, and what it is told."""

from __future__ import annotations

import pytest

from penstock import ConfigError, MisuseError, PoolTimeout
from tests.contract.runtimes import PATIENCE
from tests.contract.scenarios import scenario


@scenario
async def a_connection_given_back_twice_is_refused(w):
    pool = w.pool()
    conn = await pool.getconn()
    await pool.putconn(conn)
    with pytest.raises(MisuseError, match="not lent"):
        await pool.putconn(conn)
    assert pool.stats().idle == 1


@scenario
async def a_connection_of_another_pool_is_refused(w):
    one, two = w.pool(), w.pool()
    conn = await one.getconn()
    with pytest.raises(MisuseError):
        await two.putconn(conn)
    await one.putconn(conn)
    assert one.stats().idle == 1
    assert two.stats().size == 0


@scenario
async def a_connection_of_a_with_block_is_not_putconns(w):
    pool = w.pool(max_size=1)
    async with pool.connection() as conn:
        with pytest.raises(MisuseError):
            await pool.putconn(conn)
    await w.check_usable(pool)


@scenario
async def what_is_no_connection_is_refused(w):
    pool = w.pool()
    for thing in (None, object(), pool):
        with pytest.raises(MisuseError):
            await pool.putconn(thing)


@scenario
async def a_returned_connection_cannot_be_used(w):
    pool = w.pool(max_size=1)
    async with pool.connection() as conn:
        await w.ask(conn, "select 1")
    with pytest.raises(Exception, match=r"."):
        await w.ask(conn, "select 1")
    other = await pool.getconn()
    await pool.putconn(other)
    with pytest.raises(Exception, match=r"."):
        await w.ask(other, "select 1")
    await w.check_usable(pool)
    assert pool.stats().opened == 1


@scenario
async def a_timeout_that_is_no_number_is_told(w):
    pool = w.pool()
    for wrong in ("5", True, object()):
        with pytest.raises(ConfigError, match="timeout"):
            await pool.getconn(timeout=wrong)
    assert pool.stats().in_use == 0


@scenario
async def a_misused_pool_raises_what_its_drivers_users_catch(w):
    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    with pytest.raises(PoolTimeout) as caught:
        await pool.getconn(timeout=0.001)
    assert isinstance(caught.value, w.db.operational_error)
    await holder.end()


# -- what has two ends is entered by one at a time --------------------------------------------------

#: A plain lease, and one with an option of its own.
EACH_LEASE: tuple[dict[str, float], ...] = ({}, {"timeout": PATIENCE})


@scenario
async def a_lease_that_is_entered_is_not_entered_again(w):
    pool = w.pool(min_size=2, max_size=2)
    await pool.open(wait=True)  # so that one is idle
    for options in EACH_LEASE:
        lease = pool.connection(**options, **w.db.transaction)
        async with lease as conn:
            await w.db.write(conn, f"{pool.name} 1")
            for _ in range(2):
                with pytest.raises(MisuseError, match="entered"):
                    async with lease:
                        raise AssertionError("two are inside")
            await w.db.write(conn, f"{pool.name} 1")
            assert pool.stats().in_use == 1
    assert w.db.written(f"{pool.name} 1") == 4
    await w.check_usable(pool)


@scenario
async def a_lease_is_for_one_borrower_at_a_time(w):
    pool = w.pool(min_size=2, max_size=2)
    await pool.open(wait=True)  # so that one is idle
    for options in EACH_LEASE:
        lease = pool.connection(**options, **w.db.transaction)
        has, may_end = w.event(), w.event()

        async def first(lease=lease, has=has, may_end=may_end):
            async with lease as conn:
                has.set()
                await w.wait_for(may_end)
                await w.db.write(conn, f"{pool.name} 2")

        async def second(lease=lease):
            async with lease as conn:
                await w.db.write(conn, f"{pool.name} 3")

        inside = w.spawn(first())
        await w.wait_for(has)
        refused = await w.spawn(second()).join()
        assert isinstance(refused.error, MisuseError), refused.error
        may_end.set()
        await inside.join()
        assert inside.error is None
        assert (await w.spawn(second()).join()).error is None
    assert (w.db.written(f"{pool.name} 2"), w.db.written(f"{pool.name} 3")) == (2, 2)
    await w.check_usable(pool)


@scenario
async def a_lease_whose_borrower_waits_is_not_entered_by_another(w):
    pool = w.pool(max_size=1)
    for options in EACH_LEASE:
        holder = await w.borrow(pool).wait()
        lease = pool.connection(**options, **w.db.transaction)

        async def borrow(lease=lease):
            async with lease as conn:
                await w.db.write(conn, f"{pool.name} 4")

        waiter = w.spawn(borrow())
        await w.until(lambda: pool.stats().waiting == 1)
        refused = await w.spawn(borrow()).join()
        assert isinstance(refused.error, MisuseError), refused.error
        with pytest.raises(MisuseError):
            await lease.__aexit__(None, None, None)
        assert pool.stats().waiting == 1
        await holder.end()
        assert (await waiter.join()).error is None
    assert w.db.written(f"{pool.name} 4") == 2
    await w.check_usable(pool)


@scenario
async def a_lease_that_was_left_may_be_entered_again(w):
    pool = w.pool(max_size=1)
    for options in EACH_LEASE:
        lease = pool.connection(**options, **w.db.transaction)
        for _ in range(2):
            async with lease as conn:
                await w.db.write(conn, f"{pool.name} 5")
        with pytest.raises(RuntimeError, match="of the block"):
            async with lease:
                raise RuntimeError("of the block")
        async with lease as conn:
            await w.db.write(conn, f"{pool.name} 5")
    assert w.db.written(f"{pool.name} 5") == 6
    await w.check_usable(pool)


@scenario
async def a_lease_that_got_nothing_may_be_entered_again(w):
    pool = w.pool(max_size=1, timeout=0.001)
    for options in ({}, {"timeout": 0.002}):
        lease = pool.connection(**options)
        holder = await w.borrow(pool, PATIENCE).wait()
        for _ in range(2):
            with pytest.raises(PoolTimeout):
                async with lease:
                    raise AssertionError("nothing is free")
        await holder.end()
        async with lease as conn:
            assert await w.ask(conn, "select 1") == [(1,)]
    await pool.resize(1, 1)
    assert pool.stats().in_use == 0


@scenario
async def a_lease_is_left_once(w):
    pool = w.pool(max_size=1)
    for options in EACH_LEASE:
        lease = pool.connection(**options)
        with pytest.raises(MisuseError, match="never entered"):
            await lease.__aexit__(None, None, None)
        async with lease as conn:
            await w.ask(conn, "select 1")
        with pytest.raises(MisuseError, match="left"):
            await lease.__aexit__(None, None, None)
        error = ValueError("of the block")
        with pytest.raises(MisuseError):
            await lease.__aexit__(ValueError, error, None)
        # What cancels or interrupts is never replaced by another error.
        assert not await lease.__aexit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert pool.stats().idle == 1
    await w.check_usable(pool)


@scenario
async def a_dedicated_connection_is_entered_by_one_at_a_time(w):
    pool = w.pool(max_size=1)
    block = pool.dedicated()
    with pytest.raises(MisuseError, match="never entered"):
        await block.__aexit__(None, None, None)
    async with block as conn:
        await w.ask(conn, "select 1")
        with pytest.raises(MisuseError, match="entered"):
            async with block:
                raise AssertionError("two are inside")
        await w.ask(conn, "select 2")
    with pytest.raises(MisuseError):
        await block.__aexit__(None, None, None)
    async with block as conn:
        await w.ask(conn, "select 3")
    await w.until(lambda: w.db.sessions(pool) == pool.stats().size)


@scenario
async def of_many_who_give_back_one_connection_one_does(w):
    pool = w.pool(max_size=2)
    for _ in range(5):
        conn = await pool.getconn()
        flights = [w.spawn(pool.putconn(conn)) for _ in range(4)]
        errors = [(await flight.join()).error for flight in flights]
        assert sum(error is None for error in errors) == 1, errors
        assert sum(isinstance(error, MisuseError) for error in errors) == 3, errors
    await w.check_usable(pool)
