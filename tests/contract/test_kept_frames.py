"""An error that somebody keeps keeps the frames above it, and must keep no connection out of the pool.

One job: what runs below a borrow or a return (the user's callables, a driver's ping with its handlers of
notices, a signal handler) catches an error and keeps it, as a log's handler or a test's runner does. With
its traceback it keeps every frame that it was called from, each with the variables that it had at its end.
A slot among them would not come home when its lease is dropped, by an interrupt above all.
"""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from penstock import AsyncConnectionPool, ConnectionPool
from penstock.testing import AsyncFakeDriver, FakeServer
from tests.contract.interrupting import PATIENCE, until
from tests.contract.sessions import Driver

CALLABLES = ["check", "on_borrow", "reset"]


class Keeps:
    """Called with anything, it keeps an error; the first only, since a frame keeps its own lease, too."""

    def __init__(self):
        self.errors = []

    def __call__(self, *_):
        try:
            raise ZeroDivisionError
        except ZeroDivisionError as error:
            self.errors = self.errors or [error]
        return True

    async def later(self, *_):
        return self()


def lend_and_get_back(pool):
    with pool.connection():
        pass


def get_and_put(pool):
    pool.putconn(pool.getconn())


def drop(pool):
    """A lease that is never ended, as an interrupt leaves it."""
    pool.connection().__enter__()


def new_pool(**options):
    options = {"timeout": PATIENCE, "ping_after": None} | options
    pool = ConnectionPool(min_size=1, max_size=1, **options)
    pool.open(wait=True)
    assert until(lambda: pool.stats().idle == 1)
    return pool


def comes_home(pool):
    return until(lambda: pool.stats().orphaned == 1 and pool.stats().idle == 1)


@pytest.mark.parametrize("use", [lend_and_get_back, get_and_put])
@pytest.mark.parametrize("option", CALLABLES)
def test_an_error_kept_by_the_users_code_keeps_no_connection(option, use):
    keeps = Keeps()
    pool = new_pool(driver=Driver(), **{option: keeps})
    use(pool)
    assert keeps.errors
    drop(pool)
    assert comes_home(pool)


@pytest.mark.parametrize("use", [lend_and_get_back, get_and_put])
@pytest.mark.parametrize("shaped", [True, False])
def test_an_error_kept_below_a_ping_keeps_no_connection(shaped, use):
    keeps = Keeps()
    pool = new_pool(driver=Driver(shaped=shaped), ping_after=0)
    pool._machine.slots()[0].link.ping = keeps
    use(pool)
    assert keeps.errors
    drop(pool)
    assert comes_home(pool)


@pytest.mark.parametrize("shaped", [True, False])
def test_an_error_kept_by_a_signal_handler_of_one_who_waits_keeps_no_connection(shaped):
    keeps = Keeps()
    pool = new_pool(driver=Driver(shaped=shaped))
    before = signal.signal(signal.SIGALRM, keeps)
    lent, enough, here = threading.Event(), threading.Event(), threading.get_ident()

    def hold():
        with pool.connection():
            lent.set()
            until(lambda: bool(pool._machine.waiters))
            signal.pthread_kill(here, signal.SIGALRM)
            until(lambda: bool(keeps.errors))
        enough.set()

    thread = threading.Thread(target=hold)
    try:
        thread.start()
        lent.wait(PATIENCE)
        lend_and_get_back(pool)
        enough.wait(PATIENCE)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)
    assert keeps.errors
    drop(pool)
    assert comes_home(pool)


async def async_lend_and_get_back(pool):
    async with pool.connection():
        pass


async def async_get_and_put(pool):
    await pool.putconn(await pool.getconn())


async def _comes_home(pool):
    async with asyncio.timeout(PATIENCE):
        while not (pool.stats().orphaned == 1 and pool.stats().idle == 1):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def _keep_and_drop(use, keeps, patch=None, **options):
    with FakeServer() as server:
        driver = AsyncFakeDriver(server)
        options = {"ping_after": None} | options
        pool = AsyncConnectionPool(driver=driver, min_size=1, max_size=1, **options)
        await pool.open(wait=True)
        if patch is not None:
            patch(pool._machine.slots()[0].link)
        await use(pool)
        assert keeps.errors
        await pool.connection().__aenter__()
        await _comes_home(pool)
        await pool.close()


@pytest.mark.parametrize("use", [async_lend_and_get_back, async_get_and_put])
@pytest.mark.parametrize("option", CALLABLES)
def test_an_error_kept_by_the_users_coroutine_keeps_no_connection(option, use):
    keeps = Keeps()
    asyncio.run(_keep_and_drop(use, keeps, **{option: keeps.later}))


@pytest.mark.parametrize("use", [async_lend_and_get_back, async_get_and_put])
def test_an_error_kept_below_a_ping_on_asyncio_keeps_no_connection(use):
    keeps = Keeps()

    def patch(link):
        link.ping = keeps.later

    asyncio.run(_keep_and_drop(use, keeps, patch, ping_after=0))
