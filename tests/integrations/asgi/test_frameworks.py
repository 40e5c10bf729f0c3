"""FastAPI, Quart and Connexion's AsyncApp, each in its own manner; httpx stands for the server."""

import asyncio
import gc
import json
from typing import Annotated, Any

import pytest
from tests.integrations.asgi.conftest import Wire, on_a_loop

from penstock import ConnectionPool, MisuseError

# -- FastAPI -------------------------------------------------------------------------------------------


@pytest.fixture
def fastapi_shop(shop):
    """A shop whose app is FastAPI's; gives (shop, app)."""
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    app.add_middleware(shop.db.middleware)
    return shop, app


@on_a_loop
async def test_fastapis_dependency_is_the_requests_connection(fastapi_shop):
    from fastapi import Depends

    shop, app = fastapi_shop
    Conn = Annotated[Any, Depends(shop.db.connection)]  # noqa: N806  a type

    async def user(conn: Conn):
        return await shop.value("select 'ann'", conn)

    @app.post("/notes/{tag}", status_code=201)
    async def add(tag: str, conn: Conn, user: Annotated[str, Depends(user)]):
        assert conn is await shop.db.connection()
        await shop.write(tag)
        return {"by": user}

    async with shop:
        answer = await shop.ask("/notes/one", "POST", app)
        assert (answer.status_code, answer.json()) == (201, {"by": "ann"})
        assert shop.kept() == {"one"}
        assert shop.in_use() == 0
        parameters = (await shop.ask("/openapi.json", app=app)).json()["paths"]["/notes/{tag}"]
        assert [each["name"] for each in parameters["post"]["parameters"]] == ["tag"]


@on_a_loop
async def test_fastapis_http_exceptions_roll_back_and_its_yield_dependencies_see_the_connection(
    fastapi_shop,
):
    from fastapi import Depends, HTTPException

    shop, app = fastapi_shop

    async def audited():
        await shop.write("audited")
        yield
        # by now the answer may be out; a connection is asked for again
        assert await shop.value("select 1") == 1

    @app.post("/notes")
    async def add(_: Annotated[None, Depends(audited)], fails: bool = False):
        if fails:
            raise HTTPException(409)

    async with shop:
        assert (await shop.ask("/notes?fails=1", "POST", app)).status_code == 409
        assert shop.kept() == set()
        assert (await shop.ask("/notes", "POST", app)).status_code == 200
        assert shop.kept() == {"audited"}
        assert shop.in_use() == 0


@on_a_loop
async def test_fastapis_endpoints_in_threads_get_an_error_that_says_how(fastapi_shop):
    shop, app = fastapi_shop

    @app.get("/")
    def read():
        with pytest.raises(MisuseError, match="make the endpoint `async def`"):
            shop.db.connection()
        return "told"

    async with shop:
        assert (await shop.ask(app=app)).json() == "told"


def test_fastapis_endpoints_in_threads_use_a_connection_pool_by_a_dependency(notes, outside):
    """As docs/asgi.md says: ended when the endpoint has, and before the answer."""
    fastapi = pytest.importorskip("fastapi")
    from tests.integrations.asgi.conftest import ask

    app = fastapi.FastAPI()
    pool = ConnectionPool(notes, max_size=2)

    def connection():
        with pool.connection() as conn:
            yield conn

    Conn = Annotated[Any, fastapi.Depends(connection, scope="function")]  # noqa: N806  a type

    @app.post("/{tag}")
    def add(tag: str, conn: Conn):
        conn.execute("insert into note values (%s, length(%s))", (tag, tag))
        if tag == "bad":
            raise fastapi.HTTPException(409)

    async def all_of_them():
        tags = ["bad", "good", "twin", "four"]  # the last two are of one length
        return await asyncio.gather(*(ask(app, f"/{tag}", "POST") for tag in tags))

    with pool:
        answers = [each.status_code for each in asyncio.run(all_of_them())]
        assert pool.stats().in_use == 0
    assert answers[0] == 409
    assert sorted(answers[1:]) == [200, 500, 500]
    assert len(outside.execute("select from note").fetchall()) == 1


@on_a_loop
async def test_fastapis_background_tasks_run_after_the_commit(fastapi_shop):
    from fastapi import BackgroundTasks

    shop, app = fastapi_shop
    seen = []

    async def later():
        seen.append(shop.kept())
        async with shop.db.unit():
            await shop.write("later")

    @app.post("/")
    async def add(background: BackgroundTasks):
        await shop.write("work")
        background.add_task(later)

    async with shop:
        await shop.ask("/", "POST", app)
        assert seen == [{"work"}]
        assert shop.kept() == {"work", "later"}


@on_a_loop
async def test_fastapis_websockets_may_depend_on_it_until_they_accept(fastapi_shop):
    from fastapi import Depends, WebSocket

    shop, app = fastapi_shop
    Conn = Annotated[Any, Depends(shop.db.connection)]  # noqa: N806  a type

    @app.websocket("/")
    async def talk(websocket: WebSocket, conn: Conn):
        who = await shop.value("select 'ann'", conn)
        await websocket.accept()
        async for tag in websocket.iter_text():
            async with shop.db.unit():
                await shop.write(tag)
            await websocket.send_text(f"{who}: {tag}, {shop.in_use()} in use")

    async with shop, Wire(app, type="websocket", scheme="ws", subprotocols=[]) as wire:
        wire.say("websocket.connect")
        assert (await wire.hear())["type"] == "websocket.accept"
        wire.say("websocket.receive", text="one")
        assert (await wire.hear())["text"] == "ann: one, 0 in use"
        wire.say("websocket.disconnect", code=1000)
        await wire.task
        assert shop.kept() == {"one"}


# -- Quart ---------------------------------------------------------------------------------------------


@pytest.fixture
def quart_app():
    """Gives a function that wraps a shop's app; Quart keeps its own 500 to itself."""
    quart = pytest.importorskip("quart")

    def make(shop):
        app = quart.Quart("shop")
        app.asgi_app = shop.db.middleware(app.asgi_app)
        return app

    return make


@on_a_loop
async def test_quarts_views_commit_roll_back_and_stream(shop, quart_app):
    from quart import abort

    app = quart_app(shop)

    @app.post("/notes/<tag>")
    async def add(tag):
        await shop.write(tag)
        if tag == "bad":
            abort(409)
        return tag, 201

    @app.post("/fails")
    async def fail():
        await shop.write("lost")
        raise ZeroDivisionError

    @app.post("/twice")
    async def twice():
        await shop.write("one", 1)
        await shop.write("two", 1)
        return "a commit that fails"

    @app.get("/stream")
    async def stream():
        async def body():
            for number in range(3):
                yield str(await shop.value(f"select {number}"))

        return body()

    async with shop:
        paths = ["/notes/good", "/notes/bad", "/fails", "/twice"]
        asked = [(await shop.ask(path, "POST", app)).status_code for path in paths[:3]]
        assert asked == [201, 409, 500]
        with pytest.raises(Exception, match="alone"):  # the server's to answer
            import httpx

            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                await client.post("/twice")
        assert shop.kept() == {"good"}
        assert (await shop.ask("/stream", app=app)).text == "012"
        assert shop.in_use() == 0


@on_a_loop
async def test_quarts_full_pool_is_a_503_though_quart_makes_a_500_of_it(shop_of, quart_app):
    async with shop_of("psycopg", timeout=0.05, retry_after=3) as shop:
        app = quart_app(shop)

        @app.get("/")
        async def read():
            return str(await shop.value("select 1"))

        async with shop.taken():
            answer = await shop.ask(app=app)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
        assert (await shop.ask(app=app)).text == "1"


@on_a_loop
async def test_quarts_websockets_and_background_tasks_work_in_units(shop, quart_app):
    from quart import websocket

    app = quart_app(shop)

    @app.websocket("/")
    async def talk():
        while True:
            tag = await websocket.receive()
            async with shop.db.unit():
                await shop.write(tag)
            await websocket.send(tag)

    async def later():
        async with shop.db.unit():
            await shop.write("later")

    @app.post("/")
    async def add():
        app.add_background_task(later)
        return ""

    async with shop:
        async with Wire(app, type="websocket", scheme="ws", subprotocols=[], extensions={}) as wire:
            wire.say("websocket.connect")
            wire.say("websocket.receive", text="one")
            assert (await wire.hear())["type"] == "websocket.accept"
            assert (await wire.hear())["text"] == "one"
            wire.say("websocket.disconnect", code=1000)
            await wire.task
        assert (await shop.ask("/", "POST", app)).status_code == 200
        await asyncio.gather(*app.background_tasks)
        assert shop.kept() == {"one", "later"}


# -- Connexion's AsyncApp --------------------------------------------------------------------------------


def connexion_app(shop, folder, **handlers):
    connexion = pytest.importorskip("connexion")
    if not hasattr(connexion, "AsyncApp"):
        pytest.skip("this Connexion has no AsyncApp")
    from connexion.middleware import MiddlewarePosition

    paths = {
        f"/{name}": {"post": {"operationId": name, "responses": {"200": {"description": "done"}}}}
        for name in handlers
    }
    spec = {"openapi": "3.0.0", "info": {"title": "shop", "version": "1"}, "paths": paths}
    (folder / "openapi.json").write_text(json.dumps(spec))
    app = connexion.AsyncApp("shop", specification_dir=str(folder))
    app.add_middleware(shop.db.middleware, MiddlewarePosition.BEFORE_EXCEPTION)
    app.add_api("openapi.json", resolver=connexion.Resolver(handlers.__getitem__))
    return app


@on_a_loop
async def test_connexions_handlers_commit_and_roll_back(shop, tmp_path):
    async def good():
        await shop.write("good")
        return "done"

    async def refuses():
        await shop.write("refused")
        return "no", 409

    async def fails():
        await shop.write("lost")
        raise ZeroDivisionError

    def sync():
        with pytest.raises(MisuseError, match="no event loop runs"):
            shop.db.connection()
        return "told"

    views = {"good": good, "refuses": refuses, "fails": fails, "sync": sync}
    app = connexion_app(shop, tmp_path, **views)
    async with shop:
        answers = [await shop.ask(f"/{name}", "POST", app) for name in views]
        assert [each.status_code for each in answers] == [200, 409, 500, 200]
        assert shop.kept() == {"good"}
        assert shop.in_use() == 0


# Connexion 3.3 trips over Starlette 1 where an error reaches its outermost layer: the server answers.
@pytest.mark.filterwarnings(
    "ignore:coroutine 'ServerErrorMiddleware", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@on_a_loop
async def test_connexions_answer_to_a_commit_that_fails_is_a_500(shop, tmp_path):
    async def twice():
        await shop.write("one", 1)
        await shop.write("two", 1)
        return "never seen"

    app = connexion_app(shop, tmp_path, twice=twice)
    async with shop:
        assert (await shop.ask("/twice", "POST", app)).status_code == 500
        assert shop.kept() == set()
        assert shop.in_use() == 0
    gc.collect()


@on_a_loop
async def test_connexions_full_pool_is_a_503(shop_of, tmp_path):
    async with shop_of("psycopg", timeout=0.05, retry_after=3) as shop:

        async def read():
            return str(await shop.value("select 1"))

        app = connexion_app(shop, tmp_path, read=read)
        async with shop.taken():
            answer = await shop.ask("/read", "POST", app)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
