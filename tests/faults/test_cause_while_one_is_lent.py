"""No more connections can be opened while one is lent: the error says why, and not that the server is slow."""

from __future__ import annotations

import copy
import os
import pickle
import resource
from pathlib import Path

import pytest
from tests.faults.stage import COMBINATIONS, Stage

from penstock import PoolTimeout, ServerUnavailable
from penstock._machine.slot import SlotState
from pytest_penstock.postgres import HBA, Server


@pytest.fixture(scope="module")
def strict():
    with Server(hba=("host all app,changes 127.0.0.1/32 scram-sha-256", *HBA)) as running:
        running.execute("create role app login password 'pw'")
        running.execute("create role changes login password 'pw'")
        running.execute("create role lonely login connection limit 1")
        yield running


def play(name, scene):
    for each in COMBINATIONS[name].needs:
        pytest.importorskip(each)
    Stage(name).play(scene)


async def one_lent(w, pool, happens, *, says, code=None, step=None, heals=True, also=()):
    """Borrow one, let it happen, and ask for a second one: what its error says."""
    async with pool.connection() as conn:
        await w.ask(conn, "select 1")
        await w.aside(happens)
        this = await w.borrow(pool, timeout=2.0)  # what is the matter is asked in that time
        error = this.error
        print(error)
        assert isinstance(error, ServerUnavailable), error
        assert (error.sqlstate, error.heals) == (code, heals)
        text = str(error)
        assert says in text
        assert step is None or step in text
        assert "answers slowly" not in text
        assert "1 of 4 in use" in text
        assert error.holders
        assert error.__cause__ is not None
        assert says in pool.health().why
        assert "down for" in repr(pool)
        for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert str(again) == text
        for do in also:
            await w.aside(do)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_role_at_its_limit_is_told(name, strict):
    async def scene(w):
        pool = w.pool(strict.conninfo(user="lonely"), max_size=4, min_size=0, name="one")
        await one_lent(
            w,
            pool,
            lambda: None,
            says="too many connections",
            code="53300",
            step="CONNECTION LIMIT",
        )
        assert "53300" in repr(pool)

    play(name, scene)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_password_that_was_changed_is_told(name, strict):
    async def scene(w):
        strict.execute("alter role changes password 'pw'")
        conninfo = strict.conninfo(user="changes", password="pw")
        pool = w.pool(conninfo, max_size=4, min_size=0, name="one")
        await one_lent(
            w,
            pool,
            lambda: strict.execute("alter role changes password 'other'"),
            says="password authentication failed",
            code="28P01",
            step="check user and password",
            heals=False,
        )

    play(name, scene)


@pytest.mark.parametrize("kind", [OSError, LookupError])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_token_service_that_is_down_is_told(name, kind, strict):
    down: list[int] = []

    def words():
        if down:
            raise kind("the token service is away")
        return {"password": "pw"}

    async def scene(w):
        conninfo = strict.conninfo(user="app")
        pool = w.pool(conninfo, kwargs=words, max_size=4, min_size=0, name="one")
        await one_lent(
            w,
            pool,
            lambda: down.append(1),
            says="the token service is away",
            heals=kind is OSError,
        )

    play(name, scene)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_process_without_a_descriptor_is_told(name, strict):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []

    def use_up():
        highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, before[1]))
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                return

    def free():
        while held:
            os.close(held.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    async def scene(w):
        conninfo = strict.conninfo(user="app", password="pw", host="127.0.0.1")
        pool = w.pool(conninfo, max_size=4, min_size=0, name="one")
        await w.aside(lambda: None)  # whatever the runtime opens for it is open
        try:
            await one_lent(
                w, pool, use_up, says="no file descriptor left", step="ulimit -n", also=[free]
            )  # fmt: skip
        finally:
            free()
        assert (await w.borrow(pool, "select 1", timeout=30)).good

    play(name, scene)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_server_that_refuses_is_told(name, strict):
    async def scene(w):
        proxy = w.proxy(strict.port)
        conninfo = strict.conninfo(user="app", password="pw", port=proxy.port)
        pool = w.pool(conninfo, max_size=4, min_size=0, name="one")
        says = "Connect call failed" if w.driver == "asyncpg" else "refused"
        await one_lent(w, pool, proxy.refuse, says=says, step="check that the server runs")

    play(name, scene)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_who_waits_is_served_by_what_comes_back_whatever_is_refused(name, strict):
    async def scene(w):
        strict.execute("alter role changes password 'pw'")
        conninfo = strict.conninfo(user="changes", password="pw")
        pool = w.pool(conninfo, max_size=4, min_size=0, name="one")
        async with pool.connection() as conn:
            await w.ask(conn, "select 1")
            await w.aside(lambda: strict.execute("alter role changes password 'other'"))
            waiting = w.spawn(w.borrow(pool, "select 1", timeout=60))
            await w.until(lambda: pool.stats().open_failures, "it was refused")
            assert not waiting.done
        await waiting.join()
        assert waiting.result.error is None

    play(name, scene)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_full_pool_that_cannot_replace_one_says_both(name, strict):
    """After `resize` a pool can be full while it knows of an outage."""

    async def scene(w):
        pool = w.pool(strict.conninfo(user="lonely"), max_size=4, min_size=0, name="one")
        async with pool.connection() as conn:
            await w.ask(conn, "select 1")
            assert not (await w.borrow(pool, timeout=0.5)).good
            await pool.resize(min_size=0, max_size=1)
            await w.until(
                lambda: all(slot.state is SlotState.IN_USE for slot in pool._machine.slots()),
                "full",
            )
            other = w.spawn(w.borrow(pool, timeout=0.5))
            await other.join()
            error = other.result.error
        print(error)
        assert isinstance(error, PoolTimeout)
        assert error.sqlstate == "53300"
        assert "too many connections" in str(error)
        assert "CONNECTION LIMIT" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)

    play(name, scene)
