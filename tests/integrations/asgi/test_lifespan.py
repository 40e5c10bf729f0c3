"""Startup opens the pools, shutdown closes them, and what the app says about itself passes unchanged."""

import contextlib

import pytest
from starlette.applications import Starlette
from tests.integrations.asgi.conftest import Wire, on_a_loop, until

from penstock import AsyncConnectionPool
from penstock.integrations.asgi import Penstock


def wire_to(app):
    return Wire(app, type="lifespan", state={})


async def started(wire):
    wire.say("lifespan.startup")
    return (await wire.hear())["type"]


async def stopped(wire):
    wire.say("lifespan.shutdown")
    answer = (await wire.hear())["type"]
    await wire.task
    return answer


@on_a_loop
async def test_the_pools_are_open_while_the_app_runs(shop):
    app = shop.app()
    async with wire_to(app) as wire:
        assert await started(wire) == "lifespan.startup.complete"
        assert shop.pool.opened
        assert await stopped(wire) == "lifespan.shutdown.complete"
        assert shop.pool.closed


@on_a_loop
async def test_the_apps_own_lifespan_may_use_them_at_both_ends(shop):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with shop.db.unit():
            await shop.write("startup")
        yield
        async with shop.db.unit():
            await shop.write("shutdown")

    app = Starlette(lifespan=lifespan)
    app.add_middleware(shop.db.middleware)
    async with wire_to(app) as wire:
        assert await started(wire) == "lifespan.startup.complete"
        assert shop.kept() == {"startup"}
        assert await stopped(wire) == "lifespan.shutdown.complete"
        assert shop.kept() == {"startup", "shutdown"}
        assert shop.pool.closed


@on_a_loop
async def test_startup_does_not_wait_for_a_server_that_is_not_there():
    pool: AsyncConnectionPool = AsyncConnectionPool("host=127.0.0.1 port=1 user=nobody")
    app = Starlette()
    app.add_middleware(Penstock(pool).middleware)
    async with wire_to(app) as wire:
        assert await started(wire) == "lifespan.startup.complete"
        assert pool.opened
        await until(lambda: not pool.health().ready)
        assert await stopped(wire) == "lifespan.shutdown.complete"
        assert pool.closed


@on_a_loop
async def test_a_startup_that_fails_is_told_and_closes_the_pools(shop):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        raise ZeroDivisionError
        yield

    app = Starlette(lifespan=lifespan)
    app.add_middleware(shop.db.middleware)
    async with wire_to(app) as wire:
        assert await started(wire) == "lifespan.startup.failed"
        assert shop.pool.closed
        with pytest.raises(ZeroDivisionError):
            await wire.task


@on_a_loop
async def test_a_shutdown_that_fails_is_told_and_closes_the_pools(shop):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        raise ZeroDivisionError

    app = Starlette(lifespan=lifespan)
    app.add_middleware(shop.db.middleware)
    async with wire_to(app) as wire:
        assert await started(wire) == "lifespan.startup.complete"
        with pytest.raises(ZeroDivisionError):
            await stopped(wire)
        assert shop.pool.closed


@on_a_loop
async def test_an_app_that_knows_no_lifespan_says_so_and_serves_without(shop):
    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await shop.write("work")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async with shop:
        wrapped = shop.db.middleware(app)
        with pytest.raises(AssertionError):
            async with wire_to(wrapped) as wire:
                await started(wire)
        assert (await shop.ask(app=wrapped)).text == "done"
        assert shop.kept() == {"work"}


@on_a_loop
async def test_an_app_that_stops_without_a_word_has_its_pools_closed(shop):
    async def app(scope, receive, send):
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"

    async with wire_to(shop.db.middleware(app)) as wire:
        await started(wire)
        wire.say("lifespan.shutdown")
        await wire.task
    assert shop.pool.closed


@on_a_loop
async def test_twice_is_as_good_as_once_and_a_second_run_opens_again(shop):
    async def view(request):
        from starlette.responses import PlainTextResponse

        await shop.write("work")
        return PlainTextResponse("done")

    shop.view(view)
    app = shop.db.middleware(shop.app())
    for _ in "12":
        shop.outside.execute("truncate note")
        async with wire_to(app) as wire:
            assert await started(wire) == "lifespan.startup.complete"
            assert (await shop.ask(app=app)).text == "done"
            assert await stopped(wire) == "lifespan.shutdown.complete"
        assert shop.pool.closed


@pytest.mark.filterwarnings("ignore:Using `httpx`")  # it wants another one by now
def test_a_test_client_has_a_loop_of_its_own_and_lifespan_makes_the_pool_its_own(shop):
    """What users' tests do: each `with` block is a startup, a shutdown, and another loop."""
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    async def view(request):
        return PlainTextResponse(str(await shop.value("select 1")))

    shop.view(view)
    for _ in "12":
        with TestClient(shop.app()) as client:
            assert [client.get("/").text for _ in "12"] == ["1", "1"]
    assert shop.pool.closed
