"""What a program must not do, and what it is told."""

from __future__ import annotations

import pytest

from penstock import ConfigError, MisuseError
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
    from penstock import PoolTimeout

    pool = w.pool(max_size=1)
    holder = await w.borrow(pool).wait()
    with pytest.raises(PoolTimeout) as caught:
        await pool.getconn(timeout=0.001)
    assert isinstance(caught.value, w.db.operational_error)
    await holder.end()
