"""The user's own code on a connection: configure, check, on_borrow, reset, and callables for settings."""

from __future__ import annotations

import contextlib

import pytest

from penstock import MisuseError, PenstockError, PoolTimeout, ServerUnavailable
from penstock.testing import FakeOperationalError, Mode
from tests.contract.runtimes import PATIENCE
from tests.contract.scenarios import fake_scenario, scenario


@scenario
async def configure_runs_once_per_connection(w):
    seen: list[object] = []

    async def configure(conn):
        await w.ask(conn, "select 1")
        if not w.db.transaction:
            await _rollback(w, conn)
        seen.append(conn)

    pool = w.pool(min_size=2, max_size=2, configure=w.callable(configure))
    await pool.open(wait=True)
    await w.check_usable(pool)
    await w.check_usable(pool)
    assert len(seen) == len({id(conn) for conn in seen}) == 2


async def _rollback(w, conn):
    answer = conn.rollback()
    if w.runtime.asynchronous:
        await answer


@scenario
async def what_configure_raises_is_the_cause_of_the_error(w):
    def configure(conn):
        raise ValueError("a bug in it")

    async def configure_too(conn):
        configure(conn)

    for given in (configure, w.callable(configure_too)):
        pool = w.pool(configure=given)
        with pytest.raises(ServerUnavailable, match="configure=") as caught:
            await pool.open(wait=True)
        assert isinstance(caught.value.__cause__, ValueError)
        await w.until(lambda pool=pool: w.db.sessions(pool) == 0)


@scenario
async def configure_that_leaves_a_transaction_is_told(w):
    async def configure(conn):
        await w.ask(conn, "begin" if w.db.transaction else "select 1")

    pool = w.pool(configure=w.callable(configure))
    with pytest.raises(ServerUnavailable, match="idle in transaction"):
        await pool.open(wait=True)
    await w.until(lambda: w.db.sessions(pool) == 0)


@fake_scenario
async def a_bug_in_a_callable_is_told_from_a_server_that_is_down(w):
    settings: dict[str, str] = {}

    async def look_up():
        return settings["dsn"]

    for given in (lambda: settings["dsn"], w.callable(look_up)):
        pool = w.pool(conninfo=given)
        with pytest.raises(ServerUnavailable, match="look at the callable") as caught:
            await pool.getconn()
        assert isinstance(caught.value.__cause__, KeyError)


BUGS = (
    TypeError("Expected str, got Tenant"),
    AttributeError("'NoneType' object has no attribute 'encode'"),
    KeyError("tenant"),
    ImportError("no module named gssapi"),
    NameError("name 'tenent' is not defined"),
    AssertionError("cannot be"),
    ZeroDivisionError("division by zero"),
)


@scenario
async def a_bug_out_of_a_connect_is_told_as_itself_and_not_tried_again(w):
    for bug in BUGS:
        with_bug = {**w.db.options(), "driver": w.driver_whose_open_raises(bug)}
        pool = w.pool(**with_bug)
        for _ in range(2):
            with pytest.raises(ServerUnavailable) as caught:
                await pool.getconn()
            error = caught.value
            assert error.__cause__ is bug
            assert not error.heals
            assert f"{type(bug).__name__}: {bug}" in str(error)
            assert "in trouble_of" in str(error)  # where it was raised
            assert "server runs" not in str(error)
            assert "connection_class=" in str(error)  # the next step
        assert pool.stats().open_failures <= 2
        with pytest.raises(ServerUnavailable) as caught:
            async with pool.dedicated():
                pass
        assert caught.value.__cause__ is bug
        assert not caught.value.heals


@fake_scenario
async def a_callable_that_returns_something_else_is_told(w):
    for option, given in (("conninfo", None), ("conninfo", b"host=db"), ("kwargs", ["user"])):

        async def give(given=given):
            return given

        for source in (lambda given=given: given, w.callable(give)):
            pool = w.pool(**{option: source})
            with pytest.raises(ServerUnavailable, match=f"{option}=.*{type(given).__name__}") as it:
                await pool.getconn()
            assert "look at the callable" in str(it.value)
            assert isinstance(it.value.__cause__, TypeError)
            assert pool.stats().open_failures <= 2, (
                "the next one is for nobody, half a second later"
            )


@scenario
async def the_address_may_be_a_callable_that_is_asked_for_each_connection(w):
    asked: list[str] = []
    conninfo = w.db.options().get("conninfo", "")

    async def look_up():
        asked.append(conninfo)
        return conninfo

    options = w.db.options()
    options["conninfo"] = w.callable(look_up)
    pool = w.pool(min_size=2, max_size=2, **options)
    await pool.open(wait=True)
    await w.check_usable(pool)
    assert asked == [conninfo, conninfo]


@scenario
async def every_borrow_can_be_prepared_by_on_borrow_and_refused_by_check(w):
    seen: list[object] = []
    refused: list[object] = []

    async def check(conn):
        await w.ask(conn, "select 1")
        if not refused:
            refused.append(conn)
            raise FakeOperationalError("I do not like it")
        if not w.db.transaction:
            await _rollback(w, conn)

    async def on_borrow(conn):
        await w.ask(conn, "select 2")
        seen.append(conn)

    pool = w.pool(min_size=0, on_borrow=w.callable(on_borrow), check=w.callable(check))
    async with pool.connection() as conn:
        assert seen == [conn]
        assert conn is not refused[0]
    await w.until(lambda: pool.stats().closed == {"unclean": 1})


@scenario
async def a_check_that_begins_a_transaction_leaves_the_borrower_out_of_it(w):
    async def check(conn):
        await w.ask(conn, "begin" if w.db.transaction else "select 1")

    pool = w.pool(max_size=1, check=w.callable(check))
    for _ in range(2):
        assert (await pool.execute("select 2")).fetchall() == [(2,)]
        async with pool.connection(autocommit=True) as conn:
            await w.ask(conn, "select 3")
    assert pool.stats().opened == 1


@scenario
async def on_borrow_that_raises_is_raised_and_the_connection_goes_back(w):
    def refuse(conn):
        raise ValueError("no")

    async def refuse_too(conn):
        raise ValueError("no")

    for given in (refuse, w.callable(refuse_too)):
        pool = w.pool(on_borrow=given)
        with pytest.raises(ValueError, match="no"):
            await pool.getconn()
        assert pool.stats().in_use == 0
        assert pool.stats().idle == 1


@fake_scenario
async def an_on_borrow_that_outlasts_the_timeout_is_an_error_and_is_stopped(w):
    slow: list[object] = []

    async def on_borrow(conn):
        if not slow:
            slow.append(conn)
            await _longer_than_allowed(w, conn)

    pool = w.pool(max_size=1, on_borrow=w.callable(on_borrow))
    await pool.open(wait=False)
    await w.until(lambda: pool.stats().idle == 1)
    with pytest.raises((PenstockError, FakeOperationalError), match="on_borrow"):
        async with pool.connection(timeout=0.2):
            pass
    async with pool.connection() as conn:
        # A thread cannot be stopped, and may still use it; a coroutine was stopped by a cancellation.
        assert w.runtime.asynchronous or conn is not slow[0]
        assert not conn.closed


async def _longer_than_allowed(w, conn):
    """Until it is stopped: by the end of its connection, or by a cancellation."""
    await w.until(lambda: conn.closed)


@fake_scenario
async def a_check_that_outlasts_the_timeout_does_not_let_its_connection_be_lent(w):
    slow: list[object] = []

    async def check(conn):
        if not slow:
            slow.append(conn)
            await _longer_than_allowed(w, conn)

    pool = w.pool(max_size=1, check=w.callable(check))
    with contextlib.suppress(PenstockError):
        async with pool.connection(timeout=0.2) as conn:
            assert conn is not slow[0]
    await w.until(lambda: slow[0].closed)  # type: ignore[attr-defined]
    async with pool.connection() as conn:
        assert conn is not slow[0]
        assert not conn.closed


@fake_scenario
async def a_reset_that_outlasts_its_time_does_not_let_its_connection_be_lent_again(w):
    w.patch.setattr("penstock._pool.sync.borrowing.TIDY_SECONDS", 0.05)
    if w.runtime.asynchronous:
        w.patch.setattr("penstock._pool.aio.borrowing.TIDY_SECONDS", 0.05)
    slow: list[object] = []

    async def reset(conn):
        if not slow:
            slow.append(conn)
            await _longer_than_allowed(w, conn)

    pool = w.pool(max_size=1, reset=w.callable(reset))
    async with pool.connection() as first:
        pass
    assert slow == [first]
    async with pool.connection() as conn:
        assert conn is not first
        assert not conn.closed


@fake_scenario
async def a_check_that_gets_no_answer_ends_at_the_borrowers_timeout(w):
    async def check(conn):
        w.server.mode = Mode.HANGING
        await w.ask(conn, "select 1")

    pool = w.pool(check=w.callable(check))
    with pytest.raises(PenstockError):
        await pool.getconn(timeout=0.3)
    w.server.mode = Mode.UP


@fake_scenario
async def a_reset_that_gets_no_answer_costs_the_connection_and_not_the_borrower(w):
    w.patch.setattr("penstock._pool.sync.borrowing.TIDY_SECONDS", 0.2)
    if w.runtime.asynchronous:
        w.patch.setattr("penstock._pool.aio.borrowing.TIDY_SECONDS", 0.2)

    async def reset(conn):
        w.server.mode = Mode.HANGING
        await w.ask(conn, "select 1")

    pool = w.pool(min_size=0, reset=w.callable(reset))
    async with pool.connection():
        pass
    w.server.mode = Mode.UP
    await w.until(lambda: pool.stats().closed == {"unclean": 1})


@fake_scenario
async def a_check_that_always_refuses_costs_few_connects_and_the_error_says_why(w):
    def check(conn):
        raise ZeroDivisionError("no good")

    pool = w.pool(min_size=0, timeout=0.3, check=check)
    with pytest.raises(PoolTimeout, match=r"within 0\.3 s") as caught:
        async with pool.connection():
            pass
    assert caught.value.timeout == 0.3
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert 1 <= w.server.connects < 15


@fake_scenario
async def waiting_for_a_huge_number_of_seconds_is_waiting(w):
    for huge in (1e11, 1e300):
        pool = w.pool(min_size=0, max_size=1, max_lifetime=huge)
        await pool.open(wait=True, timeout=huge)
        holder = await w.borrow(pool).wait()
        waiter = w.borrow(pool, timeout=huge)
        await w.until(lambda pool=pool: pool.stats().waiting == 1, pool)
        await holder.end()
        assert (await waiter.wait()).error is None
        await waiter.end()
        async with pool.connection(timeout=huge) as conn:
            with pytest.raises(MisuseError):
                await pool.getconn(timeout=huge)
            assert not conn.closed
        async with pool.dedicated(timeout=huge) as conn:
            await w.ask(conn, "select 1")
        await pool.close(timeout=huge)


@fake_scenario
async def a_lease_dropped_after_a_failed_commit_comes_home_though_the_error_is_stored(w):
    import gc

    async def borrow_and_write():
        async with pool.connection() as conn:
            await w.ask(conn, "insert")
            w.server.hang_up()

    pool = w.pool(min_size=0, max_size=1)
    try:
        await borrow_and_write()
    except FakeOperationalError as error:
        stored = error
    lease = pool.connection()
    await lease.__aenter__()
    del lease
    gc.collect()
    await w.until(lambda: pool.stats().orphaned == 1, pool)
    async with pool.connection(PATIENCE) as conn:
        await w.ask(conn, "select 1")
    assert stored is not None
