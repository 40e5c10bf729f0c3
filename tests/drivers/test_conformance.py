"""Every driver of ours passes the tests that a third party's has to pass."""

from __future__ import annotations

import psycopg
import pytest
from examples.pg8000_driver.pg8000_driver import Pg8000Driver

from penstock import _drivers
from penstock.conninfo import parse
from penstock.testing.conformance import DriverConformance


@pytest.fixture
def conninfo(unix_dsn):
    return unix_dsn


class TestPsycopg(DriverConformance):
    driver = _drivers.load("psycopg")

    def connected(self, conninfo):
        return psycopg.connect(conninfo)


class TestPsycopgOverTcp(TestPsycopg):
    @pytest.fixture
    def conninfo(self, tcp_dsn):
        return tcp_dsn


class TestPsycopgAsync(DriverConformance):
    driver = _drivers.load("psycopg", asynchronous=True)

    def connected(self, conninfo):
        return psycopg.AsyncConnection.connect(conninfo)

    async def run(self, conn, query):
        await conn.execute(query)


class TestPsycopg2(DriverConformance):
    @property
    def driver(self):
        pytest.importorskip("psycopg2", reason="needs psycopg2")
        return _drivers.load("psycopg2")

    def connected(self, conninfo):
        import psycopg2.extensions

        class Adoptable(psycopg2.extensions.connection):
            """Connections of psycopg2's own class cannot be."""

        return psycopg2.connect(conninfo, connection_factory=Adoptable)


class TestAsyncpg(DriverConformance):
    @property
    def driver(self):
        pytest.importorskip("asyncpg", reason="needs asyncpg")
        return _drivers.load("asyncpg", asynchronous=True)

    def connected(self, conninfo):
        import asyncpg

        words = parse(conninfo)
        names = {"host": "host", "port": "port", "user": "user", "dbname": "database"}
        return asyncpg.connect(**{names[key]: words[key] for key in names})

    async def run(self, conn, query):
        await conn.execute(query)


class TestPg8000(DriverConformance):
    """A driver of somebody else's: examples/pg8000_driver."""

    driver = Pg8000Driver()
