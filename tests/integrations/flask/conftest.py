"""What the tests of the Flask extension share: a database with one table, and apps with a small pool.

They run with whichever Flask is installed: test_on_flask_2_2.py runs them again with an old one. A pool
has one connection only, so whoever borrows two at a time fails.
"""

import contextlib
import gc
import logging

import psycopg
import pytest
from flask import Flask
from tests.forks import until

from penstock.integrations.flask import Penstock

TABLE = """
    create table note (
        tag text primary key,
        alone int unique deferrable initially deferred
    )
"""


@pytest.fixture(scope="session")
def notes(server):
    """A database of these tests' own; gives its conninfo."""
    server.execute("create database notes")
    server.execute(TABLE, dbname="notes")
    yield server.conninfo(dbname="notes", over="unix")
    server.execute("drop database notes with (force)")


@pytest.fixture
def outside(notes):
    """A connection that has nothing to do with any pool."""
    with psycopg.connect(notes, autocommit=True) as conn:
        conn.execute("truncate note")
        yield conn


class Shop:
    """An app on a pool of one connection, and what can be seen of it from outside."""

    def __init__(self, conninfo, outside, caplog, prepare, settings):
        self.outside = outside
        self.mode = settings["PENSTOCK_TRANSACTIONS"]
        self._caplog = caplog
        self.app = Flask("shop")
        self.app.config["PENSTOCK_DATABASE_URI"] = conninfo
        self.app.config["PENSTOCK_POOL_OPTIONS"] = {"max_size": 1, "timeout": 10.0}
        self.app.config.update(settings)
        self.db = Penstock()
        prepare(self)  # what an app does before it initialises its extensions
        self.db.init_app(self.app)

    @property
    def pools(self):
        return self.app.extensions["penstock"].pools

    @property
    def pool(self):
        return self.pools["default"]

    def write(self, tag, alone=None):
        self.db.execute("insert into note values (%s, %s)", (tag, alone))

    def get(self, path="/", **options):
        return self.app.test_client().get(path, **options)

    def kept(self):
        return {tag for (tag,) in self.outside.execute("select tag from note").fetchall()}

    def warnings(self):
        return [
            record.getMessage()
            for record in self._caplog.records
            if record.name.startswith("penstock") and record.levelno >= logging.WARNING
        ]

    def all_are_back(self):
        return all(pool.stats().in_use == 0 for pool in self.pools.values())

    def come_back_when_collected(self):
        gc.collect()
        until(self.all_are_back, "every connection is back")


@pytest.fixture
def shop_of(notes, outside, caplog):
    made = []

    def make(mode="request", *, prepare=lambda shop: None, **settings):
        settings = {"PENSTOCK_TRANSACTIONS": mode, **settings}
        made.append(Shop(notes, outside, caplog, prepare, settings))
        return made[-1]

    yield make
    for shop in made:
        with contextlib.suppress(KeyError):
            shop.app.extensions["penstock"].close(timeout=0)


@pytest.fixture
def shop(shop_of):
    return shop_of()
