"""What happens to a transaction and to the session when a connection is given back."""

from __future__ import annotations

import pytest

from penstock import MisuseError
from tests.contract.databases import pool_name
from tests.contract.scenarios import fake_scenario, scenario


@scenario
async def what_was_begun_is_committed_at_the_end(w):
    pool, key = w.pool(), pool_name()
    async with pool.connection(**w.db.transaction) as conn:
        await w.db.write(conn, key)
        assert w.db.written(key) == 0
    assert w.db.written(key) == 1
    assert pool.stats().idle == 1


@scenario
async def what_was_begun_is_rolled_back_on_an_exception(w):
    pool, key = w.pool(), pool_name()
    with pytest.raises(ZeroDivisionError):
        async with pool.connection(**w.db.transaction) as conn:
            await w.db.write(conn, key)
            _ = 1 / 0
    assert w.db.written(key) == 0
    assert pool.stats().idle == 1
    assert pool.stats().opened == 1
    await w.check_usable(w.pool(max_size=1))


@scenario
async def what_was_begun_is_rolled_back_on_an_exception_that_is_no_error(w):
    class Leave(BaseException):
        """As GreenletExit, or what a test runner raises."""

    pool, key = w.pool(max_size=1), pool_name()
    with pytest.raises(Leave):
        async with pool.connection(**w.db.transaction) as conn:
            await w.db.write(conn, key)
            raise Leave
    assert w.db.written(key) == 0
    await w.check_usable(pool)


@fake_scenario
async def nothing_is_sent_when_nothing_was_begun(w):
    pool = w.pool()
    async with pool.connection():
        pass
    assert w.server.statements == []
    assert w.server.pings == 0


@fake_scenario
async def nothing_is_committed_twice(w):
    pool = w.pool()
    async with pool.connection() as conn:
        await w.ask(conn, "insert")
        if w.runtime.asynchronous:
            await conn.commit()
        else:
            conn.commit()
    assert [text for _, text in w.server.statements] == ["insert", "COMMIT"]


@fake_scenario
async def a_commit_that_fails_is_raised_and_the_connection_goes_back(w):
    pool = w.pool(min_size=0)
    with pytest.raises(w.db.operational_error):
        async with pool.connection() as conn:
            await w.ask(conn, "insert")
            w.server.hang_up()
    assert (await pool.execute("select 1")).fetchall() == [(1,)]
    assert pool.stats().in_use == 0


@scenario
async def a_failed_transaction_is_rolled_back(w):
    pool = w.pool(max_size=1)
    if w.db.fake:
        w.server.answers["select x"] = w.db.operational_error("no such column")
    with pytest.raises(Exception, match="column"):
        async with pool.connection(**w.db.transaction) as conn:
            await w.ask(conn, "select x")
    await w.check_usable(pool)
    assert pool.stats().opened == 1


@scenario
async def autocommit_of_one_borrow_does_not_reach_the_next(w):
    pool, key = w.pool(max_size=1), pool_name()
    async with pool.connection(autocommit=True) as conn:
        await w.db.write(conn, key)
        assert w.db.written(key) == 1
        assert w.db.is_autocommit(conn)
    if w.db.transaction:
        return  # this driver always is in autocommit
    async with pool.connection() as conn:
        assert not w.db.is_autocommit(conn)
        await w.db.set_autocommit(conn)
        assert w.db.is_autocommit(conn)
    async with pool.connection() as conn:
        assert not w.db.is_autocommit(conn)
    assert pool.stats().opened == 1


@scenario
async def autocommit_of_the_pool_is_every_borrows(w):
    pool, key = w.pool(max_size=1, autocommit=True), pool_name()
    async with pool.connection() as conn:
        await w.db.write(conn, key)
        assert w.db.written(key) == 1
    async with pool.connection() as conn:
        assert w.db.is_autocommit(conn)


@scenario
async def a_transaction_left_open_is_rolled_back_with_a_warning(w):
    pool, key = w.pool(max_size=1), pool_name()
    conn = await pool.getconn()
    if w.db.transaction:
        await w.ask(conn, "begin")
    await w.db.write(conn, key)
    await pool.putconn(conn)
    assert w.db.written(key) == 0
    assert "given back idle in transaction: rolled back" in w.log
    await w.check_usable(pool)
    assert pool.stats().opened == 1


@scenario
async def what_a_borrower_began_where_the_driver_commits_by_itself_is_rolled_back(w):
    if not w.db.transaction:
        return  # the driver's own transaction, which the block commits
    pool, key = w.pool(max_size=1), pool_name()
    async with pool.connection() as conn:
        await w.ask(conn, "begin")
        await w.db.write(conn, key)
    assert w.db.written(key) == 0
    assert "rolled back" in w.log
    await w.check_usable(pool)
    assert pool.stats().opened == 1


@scenario
async def a_dedicated_connection_commits_or_rolls_back_too(w):
    pool, kept, lost = w.pool(), pool_name(), pool_name()
    async with pool.dedicated() as conn:
        await w.db.write(conn, kept)
    assert w.db.written(kept) == 1
    with pytest.raises(ZeroDivisionError):
        async with pool.dedicated() as conn:
            if w.db.transaction:
                await w.ask(conn, "begin")
            await w.db.write(conn, lost)
            _ = 1 / 0
    await w.until(lambda: w.db.sessions(pool) == 0)
    assert w.db.written(lost) == 0


@scenario
async def settings_are_for_one_transaction(w):
    pool = w.pool(max_size=1)
    if w.db.fake:
        async with pool.connection(settings={"app.user": "ann"}) as conn:
            await w.ask(conn, "select 1")
        assert [text for _, text in w.server.statements] == ["set app.user", "select 1", "COMMIT"]
    else:
        async with pool.connection(settings={"app.user": "ann"}) as conn:
            assert await w.ask(conn, "select current_setting('app.user')") == [("ann",)]
        async with pool.connection() as conn:
            rows = await w.ask(conn, "select current_setting('app.user', true)")
            assert rows[0][0] in {None, ""}
    with pytest.raises(MisuseError, match="settings= was asked for with autocommit"):
        async with pool.connection(autocommit=True, settings={"app.user": "ann"}):
            pass
    await w.check_usable(pool)


@fake_scenario
async def a_session_reset_is_sent_at_the_return_and_read_by_the_next_borrower(w):
    pool = w.pool(max_size=1, reset="session")
    for _ in range(3):
        async with pool.connection() as conn:
            await w.ask(conn, "select 1")
    assert [text for _, text in w.server.statements].count("RESET") == 2


@scenario
async def a_session_reset_takes_away_what_a_session_can_hold(w):
    if w.db.fake:
        return
    pool = w.pool(max_size=1, reset="session")
    async with pool.connection(autocommit=True) as conn:
        await w.ask(conn, "set statement_timeout to '3s'")
        await w.ask(conn, "create temp table mine (x int)")
        await w.ask(conn, "select pg_advisory_lock(pg_backend_pid())")
    async with pool.connection() as conn:
        assert await w.ask(conn, "show statement_timeout") == [("0",)]
        assert await w.ask(conn, "select to_regclass('mine')::text") == [(None,)]
        mine = "locktype = 'advisory' and pid = pg_backend_pid()"
        assert await w.ask(conn, f"select count(*) from pg_locks where {mine}") == [(0,)]
    assert pool.stats().opened == 1


@scenario
async def a_reset_callable_cleans_every_returned_connection(w):
    cleaned: list[object] = []

    async def reset(conn):
        cleaned.append(conn)

    for given in (cleaned.append, w.callable(reset)):
        cleaned.clear()
        pool = w.pool(max_size=1, reset=given)
        async with pool.connection() as conn:
            await w.ask(conn, "select 1")
        assert cleaned == [conn]
        await w.check_usable(pool)


@scenario
async def a_reset_callable_that_raises_costs_the_connection(w):
    async def reset(conn):
        raise ValueError("cannot")

    pool = w.pool(min_size=0, reset=w.callable(reset))
    async with pool.connection() as first:
        pass
    assert "reset= raised" in w.log
    async with pool.connection() as conn:
        assert conn is not first
    assert pool.stats().in_use == 0


@scenario
async def with_no_reset_what_is_not_clean_is_closed(w):
    pool = w.pool(min_size=0, max_size=1, reset=None)
    conn = await pool.getconn()
    await w.ask(conn, "begin" if w.db.transaction else "select 1")
    await pool.putconn(conn)
    await w.until(lambda: pool.stats().closed == {"unclean": 1}, pool)
    await w.check_usable(pool)


@scenario
async def a_connection_that_its_borrower_closed_is_replaced(w):
    pool = w.pool(min_size=0, max_size=1)
    async with pool.connection() as first:
        await w.ask(first, "select 1")
        await w.db.end(first)
    async with pool.connection() as conn:
        assert conn is not first
        assert await w.ask(conn, "select 2") == [(2,)]
    await w.until(lambda: sum(pool.stats().closed.values()) == 1, pool)
