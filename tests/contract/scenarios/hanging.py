"""Callables of the user's that do not come back, and what comes after its right was taken back."""

from __future__ import annotations

import inspect

import pytest

from penstock import ServerUnavailable
from penstock.testing import Mode
from tests.contract.scenarios import fake_scenario, scenario

OPTIONS = ("conninfo", "kwargs", "configure")


def in_a_hurry(w, seconds=0.1):
    """Every time that an opening has is short: what takes 10 s for users takes a moment here."""
    for name in ("_machine.machine", "_pool.sync.executor", "_pool.aio.executor"):
        for constant in ("CONNECT_SECONDS", "BRIEF_SECONDS"):
            w.patch.setattr(f"penstock.{name}.{constant}", seconds)
    for name in ("_pool.aio.dedicated", "_pool.sync.dedicated"):
        w.patch.setattr(f"penstock.{name}.CONNECT_SECONDS", seconds)
    for name in ("_pool.opener", "_pool.aio.opener"):
        w.patch.setattr(f"penstock.{name}.DIAGNOSE_SECONDS", seconds)
    w.patch.setattr("penstock._machine.progress.GRACE", 0.05)
    w.patch.setattr("penstock._machine.hanging.EVERY", 0.01)


class Service:
    """What a callable asks: it says nothing until it is well; calls that hang end when they are let go."""

    def __init__(self, w, options, option):
        self.w = w
        self.calls = 0
        self.well = False
        self.let_go = w.event()
        self.answer = {"conninfo": options.get("conninfo", ""), "kwargs": {}}.get(option)

    async def token(self, *_given):
        self.calls += 1
        if not self.well:
            await self.w.runtime.wait_for(self.let_go)
        return self.answer


def pool_that_asks(w, option, **options):
    service = Service(w, w.db.options(), option)
    options = {"max_size": 2, **options, option: w.callable(service.token)}
    return service, w.pool(**options)


def is_named(error, option):
    text = str(error)
    assert f"{option}=" in text, text
    assert "has not returned for" in text, text
    assert "timeout of its own" in text, text
    assert "frozen" not in text, text
    return True


@scenario
async def a_callable_that_hangs_is_named_and_its_pool_serves_again(w):
    in_a_hurry(w, 0.3)
    asking = [(option, *pool_that_asks(w, option)) for option in OPTIONS]
    waiting = [[w.borrow(pool, 1.5) for _ in range(3)] for _, _, pool in asking]
    for (option, service, pool), borrowers in zip(asking, waiting, strict=True):
        for borrower in borrowers:
            await borrower.wait()
            assert isinstance(borrower.error, ServerUnavailable), borrower.error
            assert is_named(borrower.error, option)
        assert not pool.health().ready
        assert service.calls >= 2
    for _, service, pool in asking:
        service.well = True
        assert (await pool.execute("select 1")).fetchall() == [(1,)]
        assert pool.health().ready
        service.let_go.set()
        await pool.close()


@fake_scenario
async def the_error_names_the_callable_before_its_right_is_taken_back(w):
    for option in ("conninfo", "kwargs"):
        service, pool = pool_that_asks(w, option)
        with pytest.raises(ServerUnavailable) as told:
            await pool.getconn(timeout=0.8)
        assert is_named(told.value, option)
        assert "has not returned" in pool.health().why
        assert not pool.health().ready
        service.well = True
        service.let_go.set()
        await pool.close()


@scenario
async def a_callable_that_hangs_is_named_while_a_connection_is_lent(w):
    asking = [(option, *pool_that_asks(w, option)) for option in OPTIONS]
    for _, service, _ in asking:
        service.well = True
    lents = [await pool.getconn() for *_, pool in asking]
    for _, service, _ in asking:
        service.well = False
    for _ in range(2):
        waiting = [w.borrow(pool, 1.0) for *_, pool in asking]
        for (option, *_), borrower in zip(asking, waiting, strict=True):
            await borrower.wait()
            assert isinstance(borrower.error, ServerUnavailable), borrower.error
            assert is_named(borrower.error, option)
            assert "1 of 2 in use" in str(borrower.error)
    for (_, service, pool), lent in zip(asking, lents, strict=True):
        assert pool.health().ready, "what is lent works"
        await pool.putconn(lent)
        service.well = True
        service.let_go.set()
        await pool.close()


@scenario
async def a_dedicated_connection_whose_callable_hangs_names_it(w):
    in_a_hurry(w, 0.3)
    for option in ("conninfo", "kwargs"):
        service, pool = pool_that_asks(w, option)
        with pytest.raises(ServerUnavailable) as told:
            await pool.dedicated(timeout=0.2).__aenter__()
        assert is_named(told.value, option)
        service.well = True
        service.let_go.set()
        await pool.close()


@fake_scenario
async def a_token_service_that_refuses_is_named_and_the_server_is_not_asked(w):
    is_down = [True]

    async def token():
        if is_down:
            raise ConnectionRefusedError(111, "Connection refused")
        return ""

    pool = w.pool(conninfo=w.callable(token))
    with pytest.raises(ServerUnavailable) as told:
        await pool.getconn(timeout=0.3)
    assert "conninfo=" in str(told.value)
    assert "refused" in str(told.value)
    assert told.value.heals
    assert isinstance(told.value.__cause__, ConnectionRefusedError)
    assert w.server.connects == 0, "what failed is not the server"
    is_down.clear()
    await pool.execute("select 1")


@fake_scenario
async def what_comes_after_its_right_was_taken_back_is_closed_and_never_lent(w):
    in_a_hurry(w)
    pool = w.pool(max_size=1)
    driver = w.db.options()["driver"]
    original, may_come, late = driver.open, w.event(), []

    async def opens_late(recipe, seconds):
        link = original(recipe, seconds)
        if inspect.isawaitable(link):
            link = await link
        if w.server.mode is Mode.UP and not may_come.is_set():
            late.append(link)
            await w.runtime.wait_for(may_come)
        return link

    w.patch.setattr(driver, "open", w.callable(opens_late))
    w.patch.setattr("penstock._pool.opener.DRIVER_GRACE", 0.0)
    w.patch.setattr("penstock._pool.sync.executor.DRIVER_GRACE", 0.0)
    w.patch.setattr("penstock._pool.aio.opener.DRIVER_GRACE", 0.0)
    with pytest.raises(ServerUnavailable):
        await pool.getconn(timeout=1.0)
    await w.until(lambda: pool._machine.outage is not None)
    hung = list(late)
    assert hung
    may_come.set()
    for _ in range(3):
        async with pool.connection() as conn:
            assert all(conn is not link.conn for link in hung if link.said_goodbye)
    await w.until(lambda: all(link.ended for link in hung[:1]))
    assert hung[0].said_goodbye, "politely"
    assert pool.stats().size <= 1


@fake_scenario
async def callables_that_hang_keep_no_other_pool_from_connecting(w):
    pools = [pool_that_asks(w, "conninfo", max_size=4) for _ in range(7)]
    borrowers = [w.borrow(pool, 0.05) for _, pool in pools for _ in range(4)]
    await w.until(lambda: sum(service.calls for service, _ in pools) >= 21)
    other = w.pool()
    await other.execute("select 1")
    for borrower in borrowers:
        await borrower.wait()
    for service, _ in pools:
        service.let_go.set()


@fake_scenario
async def closing_and_draining_wait_for_no_callable_that_hangs(w):
    in_a_hurry(w)
    service, pool = pool_that_asks(w, "conninfo")
    with pytest.raises(ServerUnavailable):
        await pool.getconn(timeout=0.5)
    await pool.drain()
    await pool.close(timeout=0.0)
    await w.until(lambda: pool.stats().size == 0, "its rights are back, whatever hangs")
    service.let_go.set()
    await w.until(lambda: len(pool._machine.hanging) == 0, "the workers have come back")
    assert w.server.connects == 0, "a call that came back late went on to connect"
