"""A request is cancelled at each of its suspension points, and at random: nothing is lost or half done."""

import asyncio
import contextlib

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from tests.integrations.asgi.conftest import Wire, on_a_loop


class CutAt:
    """Awaits a coroutine, and cancels the task at its n-th suspension.

    Attributes:
        count: how many suspensions there were.
    """

    def __init__(self, coroutine, number):
        self._coroutine = coroutine
        self._number = number
        self.count = 0

    def __await__(self):
        inner = self._coroutine.__await__()
        act, value = inner.send, None
        while True:
            try:
                waits_for = act(value)
            except StopIteration as end:
                return end.value
            self.count += 1
            if self.count == self._number:
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                act, value = inner.send, (yield waits_for)
            except BaseException as error:
                act, value = inner.throw, error


def views(shop):
    """Requests that write one note each and then read; one by one, and as a stream."""

    async def whole(request):
        await shop.write("work")
        await shop.value("select 1")
        return PlainTextResponse("done")

    async def stream(request):
        async def body():
            yield str(await shop.value("select 1"))
            yield str(await shop.value("select 2"))

        await shop.write("work")
        return StreamingResponse(body())

    async def refused(request):
        await shop.write("work")
        return PlainTextResponse("no", 409)

    async def unit(request):
        await shop.db.give_back()
        async with shop.db.unit():
            await shop.write("work")
        return PlainTextResponse("done")

    for view in (whole, stream, refused, unit):
        shop.view(view, f"/{view.__name__}")


@pytest.mark.parametrize("path", ["/whole", "/stream", "/refused", "/unit"])
@on_a_loop
async def test_a_request_may_be_cancelled_at_any_of_its_suspensions(path, shop):
    async with shop:
        views(shop)
        app = shop.app()
        number, uncut = 0, False
        while not uncut:
            number += 1
            assert number < 100
            shop.outside.execute("truncate note")
            started: list = []

            async def send(message, started=started):
                if message["type"] == "http.response.start":
                    started.append((message["status"], shop.kept()))

            scope = Wire(app, path=path).scope
            cut = CutAt(app(scope, asyncio.Event().wait, send), number)

            async def run(cut=cut):
                await cut

            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.create_task(run())
            uncut = cut.count < number
            await shop.comes_back()
            kept = shop.kept()
            if started and started[0][0] == 200:
                assert started[0][1] == kept == {"work"}, number  # before anybody was told
            if path == "/refused":
                assert kept == set()
            async with shop.db.unit():  # whole, and in no transaction of the last one
                assert await shop.value("select count(*) from note") == len(kept)
        assert number > 3


@on_a_loop
async def test_requests_that_are_cancelled_at_random_lose_no_connection(shop_of, driver, rng):
    async with shop_of(driver, max_size=3) as shop:
        views(shop)
        app = shop.app()
        told = 0

        async def one(tag):
            nonlocal told

            async def send(message):
                nonlocal told
                told += message["type"] == "http.response.start"

            async def view(scope, receive, send):
                await shop.write(tag)
                await shop.value("select pg_sleep(0.001)::text")
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0, 0.02)):
                    await shop.db.middleware(view)(Wire(app).scope, asyncio.Event().wait, send)

        for batch in range(20):
            await asyncio.gather(*(one(f"{batch} {n}") for n in range(10)))
        await shop.comes_back()
        kept = shop.kept()
        assert told <= len(kept) <= 200
        async with shop.db.unit():
            assert await shop.value("select count(*) from note") == len(kept)
