"""Websockets: the handshake is a request, an open one has nothing of its own but by units."""

import asyncio

import pytest
from tests.integrations.asgi.conftest import Wire, on_a_loop

from penstock import MisuseError


def wire_to(shop, app=None):
    return Wire(app or shop.app(), type="websocket", scheme="ws", subprotocols=[], extensions={})


async def opened(wire):
    wire.say("websocket.connect")
    assert (await wire.hear())["type"] == "websocket.accept"


@on_a_loop
async def test_each_message_has_a_unit_and_nothing_is_kept_between_them(shop):
    async with shop:

        async def endpoint(websocket):
            await websocket.accept()
            async for tag in websocket.iter_text():
                try:
                    async with shop.db.unit():
                        await shop.write(tag)
                except Exception:
                    await websocket.send_text("no")
                else:
                    await websocket.send_text(f"{tag} {shop.in_use()}")

        shop.websocket(endpoint)
        async with wire_to(shop) as wire:
            await opened(wire)
            heard = []
            for tag in ("one", "two", "one"):
                wire.say("websocket.receive", text=tag)
                heard.append((await wire.hear())["text"])
            wire.say("websocket.disconnect", code=1000)
            await wire.task
        assert heard == ["one 0", "two 0", "no"]
        assert shop.kept() == {"one", "two"}


@on_a_loop
async def test_the_handshake_is_a_request_that_accept_answers(shop):
    """As FastAPI resolves dependencies, before the endpoint accepts."""
    async with shop:

        async def endpoint(websocket):
            await shop.write("hello")
            await websocket.accept()
            with pytest.raises(MisuseError, match=r"websocket that is open") as caught:
                await shop.db.connection()
            assert "db.unit()" in str(caught.value)
            await websocket.close()

        shop.websocket(endpoint)
        async with wire_to(shop) as wire:
            await opened(wire)
            assert shop.kept() == {"hello"}
            assert shop.in_use() == 0
            assert (await wire.hear())["type"] == "websocket.close"
            await wire.task


@on_a_loop
async def test_a_handshake_that_is_refused_rolls_back(shop):
    async with shop:

        async def endpoint(websocket):
            await shop.write("hello")
            await websocket.close()

        shop.websocket(endpoint)
        async with wire_to(shop) as wire:
            wire.say("websocket.connect")
            assert (await wire.hear())["type"] == "websocket.close"
            await wire.task
        assert shop.kept() == set()
        assert shop.in_use() == 0
        (told,) = shop.warnings()
        assert told.startswith("websocket / ")
        assert " answered 403: " in told


@on_a_loop
async def test_an_error_in_the_handshake_gives_back(shop):
    async with shop:

        async def app(scope, receive, send):
            await shop.write("hello")
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with wire_to(shop, shop.db.middleware(app)) as wire:
                wire.say("websocket.connect")
                await wire.hear()
        assert shop.in_use() == 0
        assert shop.kept() == set()


@on_a_loop
async def test_a_disconnect_in_the_middle_of_a_unit_rolls_it_back(shop):
    async with shop:
        begun = asyncio.Event()

        async def endpoint(websocket):
            await websocket.accept()
            async with asyncio.TaskGroup() as group:

                async def work():
                    async with shop.db.unit():
                        await shop.write("lost")
                        begun.set()
                        await shop.run("select pg_sleep(60)")

                working = group.create_task(work())
                async for _ in websocket.iter_text():
                    pass
                working.cancel()

        shop.websocket(endpoint)
        async with wire_to(shop) as wire:
            await opened(wire)
            await begun.wait()
            wire.say("websocket.disconnect", code=1001)
            await wire.task
        await shop.comes_back()
        assert shop.kept() == set()
