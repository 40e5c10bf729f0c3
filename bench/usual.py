"""What people do with a pool: one statement in a block. Beside other pools and the bare driver, in one run.

    python bench/usual.py [--json FILE] [--rounds N]

A real PostgreSQL on a unix socket, one thread or one task, one connection that is always idle. Rounds are
interleaved, and what is read is the CPU time of the thread: the server's own time, and what the kernel does for
it, count nowhere. "Bare" is the driver without a pool: a connection that is kept, the same statement, and the
commit where the block commits. Web requests are measured over one that asks the database nothing.

Goals: a block that commits at most what psycopg_pool's costs, and at most 8 us (threads) or 25 us (asyncio) over
the bare driver; autocommit at most 0.75 of psycopg_pool; `pool.execute` at most an autocommit block; a request of
Flask's with one statement at most what psycopg_pool in `g` costs, one of Starlette's at most psycopg_pool's way.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import flask
import psycopg
import psycopg2
import psycopg2.pool
import psycopg_pool
from report import environment, heading, options, save, table

from penstock import AsyncConnectionPool, ConnectionPool
from penstock.config.conninfo import parse, to_url
from penstock.integrations.asgi import Penstock as Asgi
from penstock.integrations.flask import Penstock as Flask
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

BLOCKS = 100  # in one round of one way: 3 to 30 ms
QUERY = "select 1"


@dataclass
class Way:
    """One way to ask, by what it is compared with: `group` stands together in the table."""

    group: str
    name: str
    once: Callable[[], Any]
    over: str = ""  # the way that is taken off: a request that asks nothing


@dataclass
class Goal:
    """At most `share` of a peer, or at most `over` microseconds above it."""

    group: str
    name: str
    peer: str
    share: float = 0.0
    over: float = 0.0


GOALS = (
    Goal("threads, commit", "penstock", "psycopg_pool", share=1.0),
    Goal("threads, commit", "penstock", "psycopg alone", over=8.0),
    Goal("threads, autocommit", "penstock", "psycopg_pool", share=0.75),
    Goal("threads, autocommit", "penstock execute", "penstock", share=1.0),
    Goal("psycopg2, commit", "penstock", "psycopg2.pool", share=1.0),
    Goal("asyncio, commit", "penstock", "psycopg_pool", share=1.0),
    Goal("asyncio, commit", "penstock", "psycopg alone", over=25.0),
    Goal("asyncio, autocommit", "penstock", "psycopg_pool", share=0.75),
    Goal("asyncio, autocommit", "penstock execute", "penstock", share=1.0),
    Goal("asyncpg", "penstock", "asyncpg.Pool", share=1.0),
    Goal("asyncpg", "penstock execute", "penstock", share=1.0),
    Goal("Flask, commit", "penstock", "psycopg_pool in g", share=1.0),
    Goal("Flask, autocommit", "penstock", "psycopg_pool in g", share=1.0),
    Goal("Starlette, commit", "penstock", "psycopg_pool", share=1.0),
)


# -- threads --------------------------------------------------------------------------------------


def in_threads(dsn: str, closing: ExitStack) -> Iterator[Way]:
    for group, autocommit in (("threads, commit", False), ("threads, autocommit", True)):
        pool = closing.enter_context(ConnectionPool(dsn, autocommit=autocommit))
        peer = closing.enter_context(
            psycopg_pool.ConnectionPool(dsn, min_size=1, kwargs={"autocommit": autocommit})
        )
        peer.wait()
        alone = closing.enter_context(psycopg.connect(dsn, autocommit=autocommit))
        yield Way(group, "penstock", partial(block, pool))
        yield Way(group, "psycopg_pool", partial(block, peer))
        yield Way(group, "psycopg alone", partial(bare, alone))
    yield Way("threads, autocommit", "penstock execute", lambda: pool.execute(QUERY).fetchone())
    yield from over_psycopg2(dsn, closing)
    yield from flasks(dsn, closing)


def block(pool: Any) -> None:
    with pool.connection() as conn:
        conn.execute(QUERY).fetchone()


def bare(conn: Any) -> None:
    conn.execute(QUERY).fetchone()
    if not conn.autocommit:
        conn.commit()


def over_psycopg2(dsn: str, closing: ExitStack) -> Iterator[Way]:
    group = "psycopg2, commit"
    pool = closing.enter_context(ConnectionPool(dsn, driver="psycopg2"))
    peer = psycopg2.pool.ThreadedConnectionPool(1, 10, dsn)
    closing.callback(peer.closeall)
    alone = psycopg2.connect(dsn)
    closing.callback(alone.close)

    def ours() -> None:
        with pool.connection() as conn, conn.cursor() as cursor:
            cursor.execute(QUERY)
            cursor.fetchone()

    def theirs() -> None:
        conn = peer.getconn()
        try:
            ask(conn)
        finally:
            peer.putconn(conn)

    def ask(conn: Any) -> None:
        with conn.cursor() as cursor:
            cursor.execute(QUERY)
            cursor.fetchone()
        conn.commit()

    yield Way(group, "penstock", ours)
    yield Way(group, "psycopg2.pool", theirs)
    yield Way(group, "psycopg2 alone", lambda: ask(alone))


# -- Flask ----------------------------------------------------------------------------------------


def flasks(dsn: str, closing: ExitStack) -> Iterator[Way]:
    for group, autocommit in (("Flask, commit", False), ("Flask, autocommit", True)):
        nothing = get(flask_app(lambda _app: lambda: None))
        yield Way(group, "nothing asked", nothing)
        for name, make in (
            ("penstock", extension_of(dsn, closing, autocommit=autocommit)),
            ("penstock by hand", by_hand(dsn, closing, autocommit=autocommit)),
            ("psycopg_pool in g", in_g(dsn, closing, autocommit=autocommit)),
        ):
            yield Way(group, name, get(flask_app(make)), over="nothing asked")


def flask_app(make: Callable[[flask.Flask], Callable[[], object]]) -> flask.Flask:
    app = flask.Flask("bench")
    work = make(app)

    @app.get("/")
    def view() -> str:
        work()
        return "done"

    return app


def get(app: flask.Flask) -> Callable[[], None]:
    """One request, as a server makes it."""
    environ = app.test_request_context("/").request.environ

    def once() -> None:
        for _ in app.wsgi_app(dict(environ), lambda _status, _headers, _info=None: lambda _b: None):
            pass

    return once


def extension_of(
    dsn: str, closing: ExitStack, *, autocommit: bool
) -> Callable[[flask.Flask], Callable[[], object]]:
    def make(app: flask.Flask) -> Callable[[], object]:
        app.config["PENSTOCK_DATABASE_URI"] = dsn
        app.config["PENSTOCK_TRANSACTIONS"] = "autocommit" if autocommit else "request"
        db = Flask(app)
        closing.callback(app.extensions["penstock"].close)
        return lambda: db.execute(QUERY).fetchone()

    return make


def by_hand(
    dsn: str, closing: ExitStack, *, autocommit: bool
) -> Callable[[flask.Flask], Callable[[], object]]:
    pool = closing.enter_context(ConnectionPool(dsn, autocommit=autocommit))
    return lambda _app: lambda: block(pool)


def in_g(
    dsn: str, closing: ExitStack, *, autocommit: bool
) -> Callable[[flask.Flask], Callable[[], object]]:
    """One connection per request in `g`, given back when the application context ends."""
    pool = psycopg_pool.ConnectionPool(dsn, min_size=1, kwargs={"autocommit": autocommit})
    closing.enter_context(pool)
    pool.wait()

    def make(app: flask.Flask) -> Callable[[], object]:
        @app.teardown_appcontext
        def give_back(error: BaseException | None) -> None:
            conn = flask.g.pop("conn", None)
            if conn is not None:
                if not autocommit:
                    (conn.commit if error is None else conn.rollback)()
                pool.putconn(conn)

        def work() -> None:
            if "conn" not in flask.g:
                flask.g.conn = pool.getconn()
            flask.g.conn.execute(QUERY).fetchone()

        return work

    return make


# -- asyncio --------------------------------------------------------------------------------------


async def on_a_loop(dsn: str, closing: AsyncExitStack) -> list[Way]:
    ways = []
    for group, autocommit in (("asyncio, commit", False), ("asyncio, autocommit", True)):
        pool = await closing.enter_async_context(AsyncConnectionPool(dsn, autocommit=autocommit))
        peer = psycopg_pool.AsyncConnectionPool(
            dsn, min_size=1, kwargs={"autocommit": autocommit}, open=False
        )
        await closing.enter_async_context(peer)
        await peer.wait()
        alone = await psycopg.AsyncConnection.connect(dsn, autocommit=autocommit)
        closing.push_async_callback(alone.close)
        ways += [
            Way(group, "penstock", partial(async_block, pool)),
            Way(group, "psycopg_pool", partial(async_block, peer)),
            Way(group, "psycopg alone", partial(async_bare, alone)),
        ]
    ways.append(Way("asyncio, autocommit", "penstock execute", lambda: pool.execute(QUERY)))
    ways += await over_asyncpg(dsn, closing)
    return ways + await starlettes(dsn, closing)


async def async_block(pool: Any) -> None:
    async with pool.connection() as conn:
        await (await conn.execute(QUERY)).fetchone()


async def async_bare(conn: Any) -> None:
    await (await conn.execute(QUERY)).fetchone()
    if not conn.autocommit:
        await conn.commit()


async def over_asyncpg(dsn: str, closing: AsyncExitStack) -> list[Way]:
    url = to_url(parse(dsn))
    pool = await closing.enter_async_context(AsyncConnectionPool(dsn, driver="asyncpg"))
    peer = await closing.enter_async_context(asyncpg.create_pool(url, min_size=1))
    alone = await asyncpg.connect(url)
    closing.push_async_callback(alone.close)

    async def ours() -> None:
        async with pool.connection() as conn:
            await conn.fetch(QUERY)

    async def theirs() -> None:
        async with peer.acquire() as conn:
            await conn.fetch(QUERY)

    return [
        Way("asyncpg", "penstock", ours),
        Way("asyncpg", "penstock execute", lambda: pool.execute(QUERY)),
        Way("asyncpg", "asyncpg.Pool", theirs),
        Way("asyncpg", "asyncpg alone", lambda: alone.fetch(QUERY)),
    ]


async def starlettes(dsn: str, closing: AsyncExitStack) -> list[Way]:
    from starlette.applications import Starlette  # noqa: PLC0415  it comes with Connexion
    from starlette.middleware import Middleware  # noqa: PLC0415
    from starlette.responses import PlainTextResponse  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    group = "Starlette, commit"
    pool = await closing.enter_async_context(AsyncConnectionPool(dsn))
    peer = psycopg_pool.AsyncConnectionPool(dsn, min_size=1, open=False)
    await closing.enter_async_context(peer)
    await peer.wait()
    db = Asgi(pool)

    async def asks_nothing(_request: object) -> PlainTextResponse:
        return PlainTextResponse("done")

    async def by_penstock(_request: object) -> PlainTextResponse:
        await db.execute(QUERY)
        return PlainTextResponse("done")

    async def by_peer(_request: object) -> PlainTextResponse:
        async with peer.connection() as conn:
            await conn.execute(QUERY)
        return PlainTextResponse("done")

    def app(endpoint: Any, *middleware: Any) -> Callable[[], Awaitable[None]]:
        made = Starlette(routes=[Route("/", endpoint)], middleware=[*middleware])
        return lambda: request(made)

    return [
        Way(group, "nothing asked", app(asks_nothing)),
        Way(group, "penstock", app(by_penstock, Middleware(db.middleware)), over="nothing asked"),
        Way(group, "psycopg_pool", app(by_peer), over="nothing asked"),
    ]


async def request(app: Any) -> None:
    """One request, as a server makes it."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": [],
        "scheme": "http", "server": ("bench", 80), "client": ("bench", 1),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message: object) -> None:
        pass

    await app(scope, receive, send)


# -- measuring ------------------------------------------------------------------------------------


def turns(ways: list[Way], rounds: int) -> Iterator[Way]:
    """Nobody is always behind the same one; the first round warms up."""
    for number in range(rounds + 1):
        at = number % len(ways)
        yield from ways[at:] + ways[:at]


Times = dict[tuple[str, str], list[float]]


def measured(dsn: str, rounds: int) -> tuple[list[Way], Times]:
    with ExitStack() as closing:
        ways = list(in_threads(dsn, closing))
        times: Times = {(way.group, way.name): [] for way in ways}
        for way in turns(ways, rounds):
            began = time.thread_time_ns()
            for _ in range(BLOCKS):
                way.once()
            times[way.group, way.name].append((time.thread_time_ns() - began) / BLOCKS / 1000)
        return ways, times


async def measured_on_a_loop(dsn: str, rounds: int) -> tuple[list[Way], Times]:
    async with AsyncExitStack() as closing:
        ways = await on_a_loop(dsn, closing)
        times: Times = {(way.group, way.name): [] for way in ways}
        for way in turns(ways, rounds):
            began = time.thread_time_ns()
            for _ in range(BLOCKS):
                await way.once()
            times[way.group, way.name].append((time.thread_time_ns() - began) / BLOCKS / 1000)
        return ways, times


def figures_of(ways: list[Way], times: Times) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds by group and name, the request that asks nothing taken off."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for way in ways:
        own = times[way.group, way.name][1:]
        off = times[way.group, way.over][1:] if way.over else [0.0]
        found.setdefault(way.group, {})[way.name] = {
            "minimum": round(min(own) - min(off), 2),
            "median": round(statistics.median(own) - statistics.median(off), 2),
        }
    return found


def main() -> None:
    parser = options("one statement in a block: what people do")
    parser.add_argument("--rounds", type=int, default=30)
    asked = parser.parse_args()
    with Server() as server:
        dsn = server.conninfo(over="unix")
        figures = figures_of(*measured(dsn, asked.rounds))
        figures |= figures_of(*asyncio.run(measured_on_a_loop(dsn, asked.rounds)))
    around = environment()
    heading("one statement in a block, us of CPU time of the thread", around)
    rows = [
        [group if name == next(iter(each)) else "", name, f"{one['minimum']:,.1f}",
         f"{one['median']:,.1f}",
         "" if name == "nothing asked" else f"{each['penstock']['median'] / one['median']:.2f}"]
        for group, each in figures.items()
        for name, one in each.items()
    ]  # fmt: skip
    table(["", "", "minimum", "median", "penstock/it"], rows)
    for goal in GOALS:
        print(told(goal, figures[goal.group]))
    print()
    save(asked.json, "usual", around, figures)


def told(goal: Goal, each: dict[str, dict[str, float]]) -> str:
    ours, peer = each[goal.name]["median"], each[goal.peer]["median"]
    where = f"{goal.group}: {goal.name}"
    if goal.share:
        verdict = "PASS" if ours <= goal.share * peer else "miss"
        return f"{verdict}  {where} is {ours / peer:.2f} of {goal.peer} (goal: at most {goal.share:.2f})"
    verdict = "PASS" if ours - peer <= goal.over else "miss"
    return f"{verdict}  {where} is {ours - peer:.1f} us over {goal.peer} (goal: at most {goal.over:.0f})"


if __name__ == "__main__":
    main()
