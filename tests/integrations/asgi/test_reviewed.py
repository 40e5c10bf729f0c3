"""What a reviewer who had not seen the code found by writing apps as users of the frameworks do."""

import asyncio

from starlette.responses import JSONResponse, PlainTextResponse

from penstock import AsyncConnectionPool

from .conftest import on_a_loop


@on_a_loop
async def test_a_hook_of_one_database_may_use_another_one(shop, notes):
    async with shop, AsyncConnectionPool(notes, driver=shop.driver, max_size=1) as other:
        shop.db.pools["other"] = other

        @shop.db["other"].on_first_use
        async def look_up(conn):
            await shop.db.execute("select 1")

        async def view(request):
            return PlainTextResponse(
                str(await shop.value("select 1", await shop.db["other"].connection()))
            )

        shop.view(view)
        assert (await asyncio.wait_for(shop.ask(), 10)).text == "1"


@on_a_loop
async def test_a_task_that_a_hook_starts_may_use_the_connection_too(shop):
    async with shop:

        @shop.db.on_first_use
        async def in_time(conn):
            await asyncio.gather(shop.db.execute("select 1"))

        async def view(request):
            return JSONResponse(await shop.value("select 1"))

        shop.view(view)
        assert (await asyncio.wait_for(shop.ask(), 10)).json() == 1


@on_a_loop
async def test_waiting_for_one_database_keeps_nobody_from_another_one(shop, notes):
    async with shop, AsyncConnectionPool(notes, driver=shop.driver, max_size=1) as other:
        shop.db.pools["other"] = other

        async def view(request):
            async with shop.taken():
                waiting = asyncio.create_task(shop.db.connection())
                await asyncio.sleep(0)
                found = await shop.value("select 1", await shop.db["other"].connection())
                assert not waiting.done()
            await waiting
            return JSONResponse(found)

        shop.view(view)
        assert (await asyncio.wait_for(shop.ask(), 9)).json() == 1  # the pool's timeout is 10
