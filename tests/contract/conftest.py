"""Pools of threads over a fake server, for what only threads promise; see `world.py` for the others."""

from __future__ import annotations

import threading

import pytest

from penstock import ConnectionPool
from penstock.testing import FakeDriver, FakeServer
from tests.contract.databases import ShapedDriver
from tests.contract.runtimes import PATIENCE


@pytest.fixture
def fake():
    with FakeServer() as fake:
        yield fake


@pytest.fixture(params=["Lease", "PgconnLease", "LockedMachine"])
def make_pool(request, fake, until, monkeypatch):
    """Makes pools of the fake server, and closes them.

    With each plain lease that there is, and with the machine for interpreters without a global lock.
    """
    pools = []
    driver = ShapedDriver if request.param == "PgconnLease" else FakeDriver
    if request.param == "LockedMachine":
        monkeypatch.setattr("penstock._pool.sync.pool._has_global_lock", lambda: False)

    def make(**options):
        pool = ConnectionPool(driver=driver(fake), **{"timeout": PATIENCE, **options})
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close(timeout=PATIENCE)
        # A connect that is under way is not waited for; it is closed when it ends.
        until(lambda pool=pool: pool.stats().size == 0, pool)


class Borrower:
    """A thread that borrows, tells when it has, and gives back when told."""

    def __init__(self, pool, timeout=None):
        self.pool = pool
        self.timeout = timeout
        self.has = threading.Event()
        self.may_end = threading.Event()
        self.conn = None
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            with self.pool.connection(self.timeout) as conn:
                self.conn = conn
                self.has.set()
                assert self.may_end.wait(PATIENCE)
        except BaseException as error:
            self.error = error
            self.has.set()

    def wait(self):
        assert self.has.wait(PATIENCE), self.pool
        return self

    def end(self):
        self.may_end.set()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), self.pool
        return self


@pytest.fixture
def until():
    """Waits for a condition by looking at it whenever the pool may have changed."""

    def wait(condition, what=""):
        gate = threading.Event()
        for _ in range(int(PATIENCE / 0.002)):
            if condition():
                return
            gate.wait(0.002)
        raise AssertionError(f"never came true: {what or condition}")

    return wait
