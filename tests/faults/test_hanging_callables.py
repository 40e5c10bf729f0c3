"""Callables that hang, on a real server: forks, coroutines that go on when cancelled, asyncpg's password."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest

from penstock import AsyncConnectionPool, ConnectionPool, ServerUnavailable

PATIENCE = 30.0  # seconds; a failure's price


@pytest.fixture
def in_a_hurry(monkeypatch):
    """What takes 10 s for users takes a moment here."""
    for name in ("_machine.machine", "_pool.aio.executor"):
        for constant in ("CONNECT_SECONDS", "BRIEF_SECONDS"):
            monkeypatch.setattr(f"penstock.{name}.{constant}", 0.1)
    monkeypatch.setattr("penstock._pool.aio.opener.DIAGNOSE_SECONDS", 0.1)
    monkeypatch.setattr("penstock._machine.progress.GRACE", 0.05)
    monkeypatch.setattr("penstock._machine.hanging.EVERY", 0.01)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_child_that_is_forked_while_callables_hang_opens_its_own(unix_dsn, driver):
    let_go, hangs = threading.Event(), threading.Event()
    parent = os.getpid()

    def token():
        if os.getpid() == parent:
            hangs.set()
            let_go.wait(PATIENCE)
        return unix_dsn

    with ConnectionPool(token, driver=driver, max_size=1, timeout=PATIENCE) as pool:
        pool.open()
        assert hangs.wait(PATIENCE)
        child = os.fork()
        if not child:
            try:
                os._exit(0 if pool.execute("select 1").fetchall() == [(1,)] else 1)
            except BaseException:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        let_go.set()
        assert pool.execute("select 2").fetchall() == [(2,)]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("option", ["conninfo", "kwargs", "configure"])
@pytest.mark.usefixtures("in_a_hurry")
def test_a_coroutine_that_goes_on_when_it_is_cancelled_holds_no_right(unix_dsn, driver, option):
    async def use():
        well: list[int] = []
        hanging: list[int] = []
        let_go, all_came = asyncio.Event(), asyncio.Event()

        async def stubborn(*_given):
            hanging.append(1)
            while not (well or let_go.is_set()):
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            if let_go.is_set():
                all_came.set()
            return {"conninfo": unix_dsn, "kwargs": {}}.get(option)

        options = {"conninfo": unix_dsn, option: stubborn}
        pool: Any = AsyncConnectionPool(
            options.pop("conninfo"), driver=driver, max_size=1, timeout=1.0, **options
        )
        try:
            with pytest.raises(ServerUnavailable, match=f"{option}=.*stubborn has not returned"):
                await pool.execute("select 1")
            stuck = len(hanging)
            assert stuck >= 2, "its right came back, and was used again"
            well.append(1)
            assert (await pool.execute("select 1", timeout=PATIENCE)).fetchall() == [(1,)]
            assert pool.stats().size == 1
            let_go.set()
            await all_came.wait()
            assert pool.stats().size == 1
        finally:
            let_go.set()
            await pool.close()

    async def within():
        async with asyncio.timeout(PATIENCE):
            await use()

    asyncio.run(within())


def test_asyncpgs_password_that_hangs_is_named(server, in_a_hurry):

    async def use():
        well: list[int] = []

        async def password():
            if not well:
                await asyncio.Event().wait()
            return "secret"

        async with AsyncConnectionPool(
            server.conninfo(),
            driver="asyncpg",
            kwargs={"password": password},
            max_size=1,
            timeout=1.0,
        ) as pool:
            with pytest.raises(ServerUnavailable) as told:
                await pool.execute("select 1")
            assert "password=" in str(told.value), told.value
            assert "has not returned" in str(told.value)
            well.append(1)
            assert (await pool.execute("select 1")).fetchall() == [(1,)]

    asyncio.run(use())
