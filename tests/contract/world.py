"""One scenario's world: a runtime, a database, the pools that it makes, and who borrows from them.

One job: what a scenario holds in its hand (`w`), and that all of it is gone at the end. The
combinations of runtime and database are told here, with what each needs to be installed.
"""

from __future__ import annotations

import importlib.util
import logging
import random
from functools import partial
from typing import Any, NamedTuple

import pytest

from penstock.testing import AsyncFakeDriver, FakeDriver
from tests.contract.databases import (
    Asyncpg,
    Fake,
    Psycopg,
    Psycopg2,
    ShapedDriver,
    pool_name,
    telling_driver,
)
from tests.contract.runtimes import A_MOMENT, PATIENCE, Asyncio, Gevent, Threads, Uvloop


class Combination(NamedTuple):
    """A runtime and a database through one driver."""

    runtime: Any
    database: Any  # is called with the real server's conninfo, unless `fake`
    name: str
    needs: tuple[str, ...] = ()
    fake: bool = True
    locked: bool = False  # as on an interpreter without a global lock

    def missing(self):
        """What is not installed, as a reason to skip."""
        absent = [
            name for name in dict.fromkeys(self.needs) if importlib.util.find_spec(name) is None
        ]
        return f"{self.name}: not installed: {', '.join(absent)}" if absent else ""


def _fake(runtime, driver, name, *needs, locked=False):
    return Combination(runtime, partial(Fake, driver), name, needs, locked=locked)


def _real(runtime, database, *needs):
    name = f"{runtime.name}-{database.driver}"
    # psycopg looks at the server from outside
    return Combination(runtime, database, name, ("psycopg", database.driver, *needs), fake=False)


COMBINATIONS = (
    _fake(Threads, FakeDriver, "threads-fake"),
    _fake(Threads, ShapedDriver, "threads-shaped"),  # PgconnLease
    _fake(Threads, FakeDriver, "threads-locked", locked=True),  # LockedMachine
    _fake(Asyncio, AsyncFakeDriver, "asyncio-fake"),
    _fake(Asyncio, telling_driver, "asyncio-telling"),
    _fake(Uvloop, AsyncFakeDriver, "uvloop-fake", "uvloop"),
    _fake(Gevent, FakeDriver, "gevent-fake", "gevent"),
    _real(Threads, Psycopg),
    _real(Threads, Psycopg2),
    _real(Asyncio, Psycopg),
    _real(Asyncio, Asyncpg),
    _real(Uvloop, Psycopg, "uvloop"),
    _real(Uvloop, Asyncpg, "uvloop"),
    _real(Gevent, Psycopg, "gevent"),
    _real(Gevent, Psycopg2, "gevent"),
)


class World:
    """What a scenario is given.

    Attributes:
        db: the database, seen from outside; `ask`, `write` and so on in the driver's spelling.
        server: the fake server, where there is one.
        rng: randomness of this scenario's own.
    """

    def __init__(self, runtime, db, seed):
        self.runtime = runtime
        self.db = db
        self.server: Any = getattr(db, "server", None)
        self.rng = random.Random(seed)
        self.patch = pytest.MonkeyPatch()
        self._pools: list[Any] = []
        self._borrowers: list[Borrower] = []
        self._records = Records()

    # -- pools and borrowers ----------------------------------------------------------------------

    def pool(self, **options):
        """A pool of this database, which is closed at the end."""
        options = {"timeout": PATIENCE, "name": pool_name(), **self.db.options(), **options}
        pool = self.runtime.pool(**options)
        self._pools.append(pool)
        return pool

    def driver_whose_open_raises(self, error):
        """This database's driver, but for a bug in its `open`."""
        return self.db.driver_whose_open_raises(error, asynchronous=self.runtime.asynchronous)

    def forget(self, pool):
        """Do not hold this pool: it is to be dropped."""
        self._pools.remove(pool)

    def borrow(self, pool, timeout=None, **options):
        """Somebody else who borrows, and gives back when told."""
        borrower = Borrower(self, pool, timeout, options)
        self._borrowers.append(borrower)
        return borrower

    def spawn(self, coro):
        """Something else that goes on beside the scenario."""
        return self.runtime.spawn(coro)

    def event(self):
        return self.runtime.event()

    async def wait_for(self, event):
        assert await self.runtime.wait_for(event), "what was waited for did not happen"

    async def until(self, condition, what=""):
        """Wait for a condition by looking at it whenever something may have changed."""
        for _ in range(int(PATIENCE / A_MOMENT)):
            if condition():
                return
            await self.runtime.pause()
        raise AssertionError(f"never came true: {what or condition}; {self._pools}")

    def callable(self, function):
        """A coroutine function as this runtime's pool takes one."""
        return self.runtime.callable(function)

    # -- statements -------------------------------------------------------------------------------

    async def ask(self, conn, query):
        """The rows that a statement gives."""
        return await self.db.ask(conn, query)

    async def check_usable(self, pool):
        """All of the pool's connections can be borrowed at once, each answers for itself."""
        borrowers = [await self.borrow(pool).wait() for _ in range(pool.stats().max_size)]
        assert len({id(borrower.conn) for borrower in borrowers}) == len(borrowers)
        for number, borrower in enumerate(borrowers):
            assert borrower.error is None, borrower.error
            assert await self.ask(borrower.conn, f"select {number}") == [(number,)]
        for borrower in borrowers:
            await borrower.end()

    @property
    def log(self):
        """What penstock has logged so far."""
        return "\n".join(self._records.texts)

    # -- from outside -----------------------------------------------------------------------------

    async def play(self, scenario):
        """The scenario, and then the end of everything in it."""
        logger = logging.getLogger("penstock")
        logger.addHandler(self._records)
        try:
            await scenario(self)
        finally:
            try:
                await self._end()
            finally:
                logger.removeHandler(self._records)
                self.patch.undo()

    async def _end(self):
        for borrower in self._borrowers:
            borrower.may_end.set()
        for borrower in self._borrowers:
            await borrower.flight.join()
        for pool in self._pools:
            await pool.close(timeout=PATIENCE)
            # A connect that is under way is not waited for; it is closed when it ends.
            await self.until(lambda pool=pool: pool.stats().size == 0, pool)
        for pool in self._pools:
            await self.until(lambda pool=pool: self.db.sessions(pool) == 0, f"{pool}: no sessions")


class Borrower:
    """Somebody who borrows, tells when it has, and gives back when told."""

    def __init__(self, world, pool, timeout, options):
        self.conn: Any = None
        self.error: BaseException | None = None
        self.has = world.event()
        self.may_end = world.event()
        self._world = world
        self.flight = world.spawn(self._run(pool, timeout, options))

    async def _run(self, pool, timeout, options):
        try:
            async with pool.connection(timeout, **options) as conn:
                self.conn = conn
                self.has.set()
                await self._world.wait_for(self.may_end)
        except BaseException as error:
            self.error = error
            self.has.set()

    async def wait(self):
        """Until it has a connection, or an error."""
        await self._world.wait_for(self.has)
        return self

    async def end(self):
        """Have it give back, and wait until it has."""
        self.may_end.set()
        await self.flight.join()
        return self


class Records(logging.Handler):
    """What was logged, with its errors."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(self.format(record))


def play(combination, scenario, conninfo, seed):
    """One scenario in a world of its own."""
    db = combination.database() if combination.fake else combination.database(conninfo)
    runtime = combination.runtime()
    world = World(runtime, db, seed)
    if combination.locked:
        world.patch.setattr("penstock._pool.sync.pool._has_global_lock", lambda: False)
    try:
        runtime.run(world.play(scenario))
    finally:
        db.close()
