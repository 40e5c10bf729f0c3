"""Answers whose start is sent after their body has begun: compression, and frameworks that stream so.

The server is a hand-written one of ASGI 2.3 (where Starlette's bodies run in a task) and 2.4 (where they
run in the app's own).
"""

import asyncio
import contextlib
import gzip

import pytest
from litestar import Litestar
from litestar import get as litestar_get
from litestar.config.compression import CompressionConfig
from litestar.response import Stream
from quart import Quart
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, StreamingResponse
from tests.integrations.asgi.conftest import Wire, on_a_loop
from tests.integrations.asgi.test_streams import rows, streaming

from penstock.integrations._unit.aio_loans import AsyncLoan

SPECS = ("2.3", "2.4")
DB = "db"


async def passes(request, go_on):
    return await go_on(request)


class Late:
    """A middleware that holds the start back until the first chunk, and changes nothing else."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        held = []

        async def holding(message):
            held.append(message)
            if message["type"] != "http.response.start":
                while held:
                    await send(held.pop(0))

        await self.app(scope, receive, holding)


GZIP = (GZipMiddleware, {"minimum_size": 1})
BASE = (BaseHTTPMiddleware, {"dispatch": passes})
CORS = (CORSMiddleware, {"allow_origins": ["*"]})
LATE: tuple = (Late, {})

#: From the innermost to the outermost, as `add_middleware` is called.
ORDERS: dict[str, tuple] = {
    "gzip db": (GZIP, DB),
    "db gzip": (DB, GZIP),
    "late db": (LATE, DB),
    "gzip base db": (GZIP, BASE, DB),
    "base gzip db": (BASE, GZIP, DB),
    "gzip db base": (GZIP, DB, BASE),
    "base db gzip": (BASE, DB, GZIP),
    "db base gzip": (DB, BASE, GZIP),
    "db gzip base": (DB, GZIP, BASE),
    "cors gzip db": (CORS, GZIP, DB),
    "gzip cors db": (GZIP, CORS, DB),
    "gzip late gzip db": (GZIP, LATE, DB, LATE),
}
LATE_ORDERS = [name for name in ORDERS if not name.startswith(DB)]

#: A body that nobody reads to its end is closed by the loop, after its session was given back, and psycopg
#: says so: a cursor that nobody closed, or one that does not exist any more.
cut_off = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def app_of(shop, order):
    app = Starlette(routes=shop.routes, exception_handlers=shop.errors)
    for each in ORDERS[order]:
        if each == DB:
            app.add_middleware(shop.db.middleware)
        else:
            kind, options = each
            app.add_middleware(kind, **options)
    return app


async def answer(app, spec, **scope):
    """The status and the text of an answer, heard to its end; the status 0 if the server gets none."""
    status, text, zipped = 0, b"", False
    scope.setdefault("headers", [(b"accept-encoding", b"gzip")])
    async with Wire(app, asgi={"version": "3.0", "spec_version": spec}, **scope) as wire:
        wire.say("http.request", body=b"", more_body=False)
        more = True
        while more:
            try:
                message = await wire.hear()
            except Exception:
                break
            if message["type"] == "http.response.start":
                status = message["status"]
                zipped = (b"content-encoding", b"gzip") in message["headers"]
            else:
                text += message.get("body", b"")
                more = message.get("more_body", False)
        else:
            wire.say("http.disconnect")  # as servers do behind the last chunk
            await asyncio.wait({wire.task})  # a 500 is raised to the server, too
    if status == 0:
        return 0, ""
    return status, (gzip.decompress(text) if zipped and not more else text).decode(errors="replace")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("order", ORDERS)
@on_a_loop
async def test_a_stream_that_has_only_read_keeps_its_cursor_in_every_order(order, spec, shop):
    async with shop:
        streaming(shop)
        for _ in range(2):
            assert await answer(app_of(shop, order), spec) == (200, "12345")
        assert shop.in_use() == 0
        assert shop.warnings() == []


@cut_off
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("order", ORDERS)
@on_a_loop
async def test_what_the_endpoint_wrote_is_committed_or_refused_before_the_answer(order, spec, shop):
    async with shop:

        async def view(request):
            conn = await shop.db.connection()
            await shop.write("work")
            return StreamingResponse(rows(shop, conn))

        shop.view(view)
        status, text = await answer(app_of(shop, order), spec)
        if status == 200:
            assert text == "12345"
            assert shop.kept() == {"work"}
        else:
            assert order in LATE_ORDERS
            assert status in {0, 500}
            assert shop.kept() == set()
        assert shop.in_use() == 0


@cut_off
@pytest.mark.parametrize("order", ["gzip db", "late db", "cors gzip db"])
@on_a_loop
async def test_the_refusal_says_what_to_do(order, shop):
    async with shop:
        told = []

        async def view(request):
            conn = await shop.db.connection()
            await shop.write("work")
            return StreamingResponse(rows(shop, conn))

        async def tells(request, error):
            told.append(str(error))
            return JSONResponse({}, 500)

        shop.view(view)
        shop.errors[500] = tells
        assert (await answer(app_of(shop, order), "2.4"))[0] == 500
        assert "begun to read from a cursor" in told[0]
        assert "await db.commit() before the stream is returned" in told[0]
        assert shop.kept() == set()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("order", ORDERS)
@on_a_loop
async def test_what_the_endpoint_committed_itself_is_served_in_every_order(order, spec, shop):
    async with shop:

        async def view(request):
            conn = await shop.db.connection()
            await shop.write("work")
            await shop.db.commit()
            return StreamingResponse(rows(shop, conn))

        shop.view(view)
        assert await answer(app_of(shop, order), spec) == (200, "12345")
        assert shop.kept() == {"work"}
        assert shop.warnings() == []


@pytest.mark.parametrize("order", ["gzip db", "db gzip", "late db"])
@on_a_loop
async def test_what_a_late_body_writes_it_commits_itself_or_is_warned(order, shop):
    async with shop:

        async def view(request):
            conn = await shop.db.connection()

            async def body():
                async for number in rows(shop, conn):
                    yield number
                await shop.write("lost")
                yield "end"

            return StreamingResponse(body())

        shop.view(view)
        assert await answer(app_of(shop, order), "2.4") == (200, "12345end")
        assert shop.kept() == set()
        (warning,) = shop.warnings()
        assert "nobody committed it" in warning


@on_a_loop
async def test_a_late_answer_to_a_violated_constraint_is_no_200(shop):
    """A commit that fails still becomes an error, if nothing has been sent."""
    async with shop:

        async def view(request):
            await shop.write("one", 1)
            await shop.write("two", 1)  # noticed at the commit

            async def body():
                yield "begun"

            return StreamingResponse(body())

        shop.view(view)
        assert (await answer(app_of(shop, "gzip db"), "2.4"))[0] == 500
        assert shop.kept() == set()


@cut_off
@on_a_loop
async def test_a_client_that_leaves_a_late_answer_loses_nobody_a_connection(shop):
    async with shop:
        streaming(shop)

        async def leaves(message):
            if message.get("body"):
                raise OSError("the client has gone")

        async def app(scope, receive, send):
            await app_of(shop, "gzip db")(scope, receive, leaves)

        for _ in range(3):
            assert (await answer(app, "2.4"))[0] == 0
        await shop.comes_back()
        assert shop.kept() == set()


@cut_off
@pytest.mark.parametrize("writes", [False, True], ids=["its client leaves", "it is refused"])
@on_a_loop
async def test_a_body_that_nobody_goes_on_with_harms_nobody_who_has_its_connection_later(
    writes, shop
):
    async with shop:
        bodies = []

        async def view(request):
            conn = await shop.db.connection()
            assert await shop.value("select 1", conn) == 1
            if writes:
                await shop.write("work")
            bodies.append(rows(shop, conn))
            return StreamingResponse(bodies[-1])

        async def leaves(message):
            if message.get("body"):
                raise OSError("the client has gone")

        async def app(scope, receive, send):
            await app_of(shop, "gzip db")(scope, receive, send if writes else leaves)

        shop.view(view)
        assert (await answer(app, "2.4"))[0] in {0, 500}
        async with shop.db.unit():
            await shop.write("next")
            with contextlib.suppress(Exception):  # its session has ended
                await bodies[0].aclose()
            await shop.write("more")
        assert shop.kept() == {"next", "more"}
        assert shop.warnings() == []


@pytest.mark.parametrize("order", ["db gzip", "gzip db"])
@on_a_loop
async def test_an_answer_with_a_length_costs_no_question_more(order, shop, monkeypatch):
    asked = []
    written = AsyncLoan.written

    async def asking(loan):
        asked.append(loan)
        return await written(loan)

    monkeypatch.setattr(AsyncLoan, "written", asking)
    async with shop:

        async def view(request):
            return JSONResponse(await shop.value("select 1"))

        shop.view(view)
        assert await answer(app_of(shop, order), "2.4") == (200, "1")
        assert not asked


# -- frameworks that send the start late by themselves ----------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("compresses", [False, True], ids=["plain", "compressed"])
@on_a_loop
async def test_litestars_streams_keep_their_cursor(compresses, spec, shop):
    async with shop:

        @litestar_get("/")
        async def view() -> Stream:
            return Stream(rows(shop, await shop.db.connection()))

        compression = CompressionConfig(backend="gzip", minimum_size=1) if compresses else None
        # Without a logging_config it would leave a handler with a queue, and a thread, to all later tests.
        app = Litestar(
            [view], compression_config=compression, openapi_config=None, logging_config=None
        )
        assert await answer(shop.db.middleware(app), spec) == (200, "12345")
        assert shop.in_use() == 0
        assert shop.warnings() == []


@pytest.mark.parametrize("spec", SPECS)
@on_a_loop
async def test_quarts_streams_keep_their_cursor(spec, shop):
    async with shop:
        app = Quart("late")

        @app.get("/")
        async def view():
            return rows(shop, await shop.db.connection()), 200

        app.asgi_app = shop.db.middleware(Late(app.asgi_app))  # type: ignore[method-assign]  # its documented way
        assert await answer(app, spec) == (200, "12345")
        assert shop.in_use() == 0
        assert shop.warnings() == []
