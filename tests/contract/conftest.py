"""One pool over a fake server, the same for every runtime; threads, until others are there."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from penstock import ConnectionPool
from penstock.testing import FakeDriver, FakeServer

#: How long a test waits for another thread: a failure's price, never a pass mark.
PATIENCE = 20.0


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


class ShapedDriver(FakeDriver):
    """The fake driver with links of psycopg's shape, so that `PgconnLease` is used, too."""

    pgconn_shaped = True

    def open(self, recipe, seconds):
        link: Any = super().open(recipe, seconds)
        link.attributes = Attributes(link)
        link.handle = Handle(link)
        link.dead = None
        link.touched = Touched(link)
        return link


class Attributes(dict):
    """Storing the handle is lending, storing None is parking."""

    def __init__(self, link):
        self.link = link

    def __setitem__(self, key, value):
        assert key == "pgconn"
        if value is None:
            self.link.park()
        else:
            self.link.lend()


class Handle:
    """Tells the state of the fake link's session as libpq would."""

    pipeline_status = 0

    def __init__(self, link):
        self.link = link

    @property
    def transaction_status(self):
        return 0 if self.link.activity().value == "idle" else 1


class Touched:
    """True when the client-side settings are not as they were."""

    def __init__(self, link):
        self.link = link

    def __bool__(self):
        return self.link.conn.autocommit != self.link._autocommit


@pytest.fixture(params=["Lease", "PgconnLease", "LockedMachine"])
def make_pool(request, server, until, monkeypatch):
    """Makes pools of the fake server, and closes them.

    With each plain lease that there is, and with the machine for interpreters without a global lock.
    """
    pools = []
    driver = ShapedDriver if request.param == "PgconnLease" else FakeDriver
    if request.param == "LockedMachine":
        monkeypatch.setattr("penstock.threads._has_global_lock", lambda: False)

    def make(**options):
        pool = ConnectionPool(driver=driver(server), **{"timeout": PATIENCE, **options})
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
