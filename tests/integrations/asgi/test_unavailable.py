"""A full pool, a long queue and a server that is not there: a 500, or by `retry_after` a 503."""

import asyncio

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from tests.integrations.asgi.conftest import on_a_loop, until

from penstock import PoolTimeout, TooManyRequests


def asking(shop):
    async def view(request):
        return JSONResponse(await shop.value("select 1"))

    shop.view(view)


@on_a_loop
async def test_by_default_it_is_an_error_like_any_other(shop_of, driver):
    async with shop_of(driver, timeout=0.05) as shop:
        asking(shop)
        async with shop.taken():
            answer = await shop.ask()
    assert (answer.status_code, "retry-after" in answer.headers) == (500, False)


@on_a_loop
async def test_with_retry_after_it_is_a_503_and_the_reason_is_logged(shop_of, driver):
    async with shop_of(driver, timeout=0.05, retry_after=2) as shop:
        asking(shop)
        async with shop.taken():
            answer = await shop.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.text == "Service Unavailable"
        assert any("no connection within" in text for text in shop.warnings())
        assert (await shop.ask()).json() == 1


@on_a_loop
async def test_a_server_that_is_not_there_is_one_too(shop_of):
    async with shop_of("psycopg", retry_after=7, timeout=0.2, kwargs={"port": 1}) as shop:
        asking(shop)
        answer = await shop.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


@on_a_loop
async def test_so_is_a_queue_that_is_too_long(shop_of):
    async with shop_of("psycopg", retry_after=1, max_waiting=1) as shop:
        asking(shop)
        async with shop.taken():
            waiting = asyncio.create_task(shop.ask())
            await until(lambda: shop.pool.stats().waiting)
            assert (await shop.ask()).status_code == 503
        assert (await waiting).status_code == 200


@on_a_loop
async def test_in_a_task_group_it_is_one_too(shop_of):
    async with shop_of("psycopg", retry_after=1, timeout=0.05) as shop:

        async def view(request):
            async with asyncio.TaskGroup() as group:
                group.create_task(shop.value("select 1"))

        shop.view(view)
        async with shop.taken():
            assert (await shop.ask()).status_code == 503


@on_a_loop
async def test_an_app_that_makes_a_500_of_it_is_answered_for(shop_of):
    """Quart and Connexion do, inside: no exception of theirs reaches a middleware."""
    async with shop_of("psycopg", retry_after=1, timeout=0.05) as shop:

        async def view(request):
            try:
                return JSONResponse(await shop.value("select 1"))
            except PoolTimeout:
                return StreamingResponse(iter("oh no"), 500)

        shop.view(view)
        async with shop.taken():
            answer = await shop.ask()
        assert (answer.status_code, answer.text) == (503, "Service Unavailable")


@pytest.mark.parametrize("status", [200, 429, 502])
@on_a_loop
async def test_what_the_app_answers_itself_is_its_own(status, shop_of):
    async with shop_of("psycopg", retry_after=1, timeout=0.05) as shop:

        async def handle(request, error):
            return PlainTextResponse("mine", status)

        shop.errors.update({PoolTimeout: handle, TooManyRequests: handle})
        asking(shop)
        async with shop.taken():
            answer = await shop.ask()
        assert (answer.status_code, answer.text) == (status, "mine")


@on_a_loop
async def test_a_stream_that_has_begun_is_cut_off_as_by_any_error(shop_of):
    async with shop_of("psycopg", retry_after=1, timeout=0.05) as shop:

        async def body():
            yield "begun"
            yield str(await shop.value("select 1"))

        async def view(request):
            return StreamingResponse(body())

        shop.view(view)
        async with shop.taken():
            answer = await shop.ask()
        assert (answer.status_code, answer.text) == (200, "begun")
