"""What the tests of the ASGI middleware share: a database with one table, and apps with a small pool.

A pool has one connection only, so whoever borrows two at a time fails. Each test runs on a loop of
its own (`on_a_loop`); most talk to the app without a server, by httpx.
"""

import asyncio
import contextlib
import functools
import gc
import logging

import httpx
import psycopg
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route, WebSocketRoute

from penstock import AsyncConnectionPool
from penstock.integrations.asgi import Penstock

TABLE = """
    create table note (
        tag text primary key,
        alone int unique deferrable initially deferred
    )
"""
DRIVERS = ["psycopg", "asyncpg"]


def on_a_loop(test):
    """Run an async test function, and give it a minute."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


async def until(condition):
    """Wait until it is true; `on_a_loop` is the price of a failure."""
    while not condition():
        gc.collect()  # what was dropped comes home when it is collected
        await asyncio.sleep(0.002)


async def ask(app, path="/", method="GET"):
    """One request, without a server: an error of the app's is a 500."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        return await client.request(method, path)


@pytest.fixture(scope="session")
def notes(server):
    """A database of these tests' own; gives its conninfo."""
    server.execute("create database asgi_notes")
    server.execute(TABLE, dbname="asgi_notes")
    yield server.conninfo(dbname="asgi_notes", over="tcp")
    server.execute("drop database asgi_notes with (force)")


@pytest.fixture
def outside(notes):
    """A connection that has nothing to do with any pool."""
    with psycopg.connect(notes, autocommit=True) as conn:
        conn.execute("truncate note")
        yield conn


class Shop:
    """An app on a pool of one connection, and what can be seen of it from outside."""

    def __init__(self, conninfo, outside, caplog, driver="psycopg", mode="request", **options):
        self.outside = outside
        self._caplog = caplog
        self.driver = driver
        self.mode = mode
        options = {"max_size": 1, "timeout": 10.0, "name": "shop", **options}
        self.retry_after = options.pop("retry_after", None)
        self.pool = AsyncConnectionPool(conninfo, driver=driver, **options)
        self.db = Penstock(self.pool, transactions=mode, retry_after=self.retry_after)
        self.routes = []
        self.errors = {}
        self.asgi = None

    def view(self, endpoint, path="/", methods=("GET", "POST")):
        """Have an endpoint: given the request, gives a response."""

        @functools.wraps(endpoint)
        async def answer(request):
            return await endpoint(request)

        self.routes.append(Route(path, answer, methods=list(methods)))
        return endpoint

    def websocket(self, endpoint):
        self.routes.append(WebSocketRoute("/", endpoint))

    def app(self):
        if self.asgi is None:
            self.asgi = Starlette(
                routes=self.routes,
                exception_handlers=self.errors,
                middleware=[Middleware(self.db.middleware)],
            )
        return self.asgi

    async def ask(self, path="/", method="GET", app=None):
        return await ask(app or self.app(), path, method)

    # -- SQL, in either driver's spelling

    async def write(self, tag, alone=None, db=None):
        await self.run("insert into note values ({}, {})", tag, alone, db=db)

    async def run(self, query, *args, db=None):
        db = db or self.db
        if self.driver == "psycopg":
            return await db.execute(query.format(*["%s"] * len(args)), args)
        return await db.execute(query.format(*[f"${n + 1}" for n in range(len(args))]), *args)

    async def value(self, query, conn=None):
        conn = conn or await self.db.connection()
        if self.driver == "psycopg":
            return (await (await conn.execute(query)).fetchone())[0]
        return await conn.fetchval(query)

    # -- what is seen from outside

    def kept(self):
        return {tag for (tag,) in self.outside.execute("select tag from note").fetchall()}

    def warnings(self):
        return [
            record.getMessage()
            for record in self._caplog.records
            if record.name.startswith("penstock") and record.levelno >= logging.WARNING
        ]

    def in_use(self):
        return self.pool.stats().in_use

    @contextlib.asynccontextmanager
    async def taken(self):
        """The pool's one connection is somebody else's: no task's, so that nobody is in a deadlock."""
        conn = await self.pool.getconn(timeout=30)
        yield
        await self.pool.putconn(conn)

    async def comes_back(self):
        """Wait until nothing is lent."""
        await until(lambda: not self.in_use())

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        orphaned = self.pool.stats().orphaned
        await self.pool.close()
        if error is None:
            assert not orphaned, "a lease was dropped, and came home by the garbage collector only"


@pytest.fixture(params=DRIVERS)
def driver(request):
    return request.param


@pytest.fixture
def shop_of(notes, outside, caplog):
    """Makes shops; each is used as an `async with` block, on the loop of the test."""
    caplog.set_level(logging.INFO, "penstock")
    return functools.partial(Shop, notes, outside, caplog)


@pytest.fixture
def shop(shop_of, driver):
    return shop_of(driver)


class Wire:
    """A server's side of one ASGI connection, said and heard message by message.

    Args:
        app: the ASGI app.
        scope: what differs from a plain GET of "/".
    """

    def __init__(self, app, **scope):
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/",
            "raw_path": b"/",
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            **scope,
        }
        if self.scope["type"] != "http":
            del self.scope["method"]
        self._app = app
        self._to_app: asyncio.Queue = asyncio.Queue()
        self.heard: asyncio.Queue = asyncio.Queue()
        self.task: asyncio.Task

    async def __aenter__(self):
        self.task = asyncio.create_task(
            self._app(self.scope, self._to_app.get, self.heard.put), name="the app"
        )
        return self

    async def __aexit__(self, *exc):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self.task

    def say(self, kind, **message):
        self._to_app.put_nowait({"type": kind, **message})

    async def hear(self):
        """The next message of the app's; what it raises instead."""
        hearing = asyncio.create_task(self.heard.get())
        await asyncio.wait({hearing, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done():
            return hearing.result()
        hearing.cancel()
        if not self.heard.empty():
            return self.heard.get_nowait()
        await self.task
        raise EOFError("the app has returned")
