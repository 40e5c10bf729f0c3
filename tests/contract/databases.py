"""The fake server and the real one, each through every driver, behind one face.

One job: make the options that a pool needs, spell a statement as the driver does, and look at the
server from outside: how many sessions there are, what was committed.

It must not know: pools, runtimes (only whether a driver's calls are awaited).
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from typing import Any, ClassVar

from penstock._drivers import load
from penstock.testing import AsyncFakeDriver, FakeDriver, FakeOperationalError, FakeServer
from tests.contract.runtimes import settled

_numbers = itertools.count(1)


class WithBug:
    """A driver of which `open` raises an error; all else is as it was."""

    def __init__(self, driver, error, *, asynchronous):
        def trouble_of(_recipe, _seconds):
            raise error

        async def trouble_of_a_task(_recipe, _seconds):
            trouble_of(_recipe, _seconds)

        self._driver = driver
        self.open = trouble_of_a_task if asynchronous else trouble_of

    def __getattr__(self, name):
        return getattr(self._driver, name)


class Answers(dict):
    """A fake server's answers: ``select <number>`` gives that number."""

    def get(self, query, default=None):
        found = re.fullmatch(r"select (\d+)", query)
        if query not in self and found:
            return [(int(found[1]),)]
        return super().get(query, default)


class Fake:
    """A server that does as it is told, and which sees everything."""

    fake = True
    operational_error: type[Exception] = FakeOperationalError
    transaction: ClassVar[dict[str, Any]] = {}

    def __init__(self, driver):
        self.server = FakeServer()
        self.server.answers = Answers()
        self.driver = driver(self.server)

    def options(self):
        return {"driver": self.driver}

    def driver_whose_open_raises(self, error, *, asynchronous):
        return WithBug(self.driver, error, asynchronous=asynchronous)

    async def ask(self, conn, query):
        cursor = await settled(conn.execute(query))
        return await settled(cursor.fetchall())

    async def write(self, conn, key):
        await self.ask(conn, f"insert {key}" + (" by itself" if conn.autocommit else ""))

    def written(self, key):
        """How many of these writes were committed."""
        count, pending = 0, Counter[int]()
        for session, text in self.server.statements:
            count += text == f"insert {key} by itself"
            pending[session] += text == f"insert {key}"
            if text in {"COMMIT", "ROLLBACK"}:
                count += pending[session] if text == "COMMIT" else 0
                pending[session] = 0
        return count

    def sessions(self, _pool):
        return len(self.server.sessions)

    def hang_up(self, _pool):
        self.server.hang_up()

    async def end(self, conn):
        await settled(conn.close())

    def is_autocommit(self, conn):
        return conn.autocommit

    async def set_autocommit(self, conn):
        conn.autocommit = True

    def close(self):
        self.server.hang_up()


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


def telling_driver(server):
    """Tells of a session's end by itself, as asyncpg does."""
    return AsyncFakeDriver(server, tells=True)


class Real:
    """The tests' PostgreSQL. It is looked at through a connection of psycopg's own."""

    fake = False
    driver: str
    transaction: ClassVar[dict[str, Any]] = {}
    prepares: ClassVar[dict[str, Any]] = {}  # what makes the driver prepare each statement at once

    def __init__(self, conninfo):
        import psycopg

        self.conninfo = conninfo
        self.admin = psycopg.connect(conninfo, autocommit=True)
        self.admin.execute(_MAKE)

    def options(self):
        return {"conninfo": self.conninfo, "driver": self.driver}

    def driver_whose_open_raises(self, error, *, asynchronous):
        driver = load(self.driver, asynchronous=asynchronous)
        return WithBug(driver, error, asynchronous=asynchronous)

    @property
    def operational_error(self):
        """What this driver's users catch when the server is to blame."""
        return load(self.driver, asynchronous=self.driver == "asyncpg").operational_error

    async def ask(self, conn, query):
        cursor = await settled(conn.execute(query))
        return [] if cursor.description is None else await settled(cursor.fetchall())

    async def write(self, conn, key):
        await self.ask(conn, f"insert into contract_writes values ('{key}')")

    def written(self, key):
        return self._one("select count(*) from contract_writes where key = %s", key)

    def sessions(self, pool):
        return self._one("select count(*)" + _OF_POOL, self._like(pool))

    def hang_up(self, pool):
        self.admin.execute("select pg_terminate_backend(pid)" + _OF_POOL, [self._like(pool)])

    async def end(self, conn):
        await settled(conn.close())

    def is_autocommit(self, conn):
        return conn.autocommit

    async def set_autocommit(self, conn):
        await settled(conn.set_autocommit(True))

    def close(self):
        self.admin.close()

    def _one(self, query, *params):
        row = self.admin.execute(query, params).fetchone()
        assert row is not None
        return row[0]

    def _like(self, pool):
        return f"%/{pool.name}/{os.getpid()}"


# gevent's process may be at it at the same time: "if not exists" alone is no lock.
_MAKE = """
begin;
select pg_advisory_xact_lock(4712);
create table if not exists contract_writes (key text);
commit
"""
_OF_POOL = " from pg_stat_activity where application_name like %s and pid <> pg_backend_pid()"


class Psycopg(Real):
    driver = "psycopg"
    prepares: ClassVar[dict[str, Any]] = {"kwargs": {"prepare_threshold": 0}}


class Psycopg2(Real):
    driver = "psycopg2"

    async def ask(self, conn, query):
        cursor = conn.cursor()
        cursor.execute(query)
        return [] if cursor.description is None else cursor.fetchall()

    async def set_autocommit(self, conn):
        conn.autocommit = True


class Asyncpg(Real):
    driver = "asyncpg"
    transaction: ClassVar[dict[str, Any]] = {"transaction": True}

    async def ask(self, conn, query):
        return [tuple(row) for row in await conn.fetch(query)]

    def is_autocommit(self, conn):
        return not conn.is_in_transaction()


def pool_name():
    """A name that no other pool has, so that its sessions can be told at the server.

    Nor one of another process: gevent's child is at the same server meanwhile.
    """
    return f"contract-{os.getpid()}-{next(_numbers)}"
