"""A request that has its connection and asks its pool for a second one; and pools for threads on a loop."""

import pytest
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.responses import PlainTextResponse
from tests.integrations.asgi.conftest import on_a_loop, until

from penstock import ConnectionPool, MisuseError, PoolTimeout


@on_a_loop
async def test_it_is_told_that_it_holds_one_itself_and_where_it_was_borrowed(shop_of, driver):
    async with shop_of(driver, timeout=0.1) as shop:
        await shop.pool.execute("select 1", timeout=30)  # so that nothing else is waited for
        told = []

        async def view(request):
            await shop.db.execute("select 1")
            with pytest.raises(PoolTimeout) as caught:
                await shop.pool.execute("select 1")
            told.append(caught.value)
            return PlainTextResponse("answered")

        shop.view(view)
        assert (await shop.ask()).text == "answered"
        (own,) = told[0].own
        line = view.__code__.co_firstlineno + 1
        assert (own.kind, own.line, own.function) == ("task", line, None)
        assert "this task itself holds one of them, since " in str(told[0])
        assert f"borrowed at asgi/test_second_connection.py:{line}" in str(told[0])
        assert "next step: use the connection that it has" in str(told[0])


@on_a_loop
async def test_a_callee_that_is_given_the_connection_is_refused_at_once(shop_of, driver):
    async with shop_of(driver, timeout=30) as shop:

        async def report(conn):
            with pytest.raises(MisuseError, match="wait for itself"):
                await shop.pool.execute("select 1")
            return str(await shop.value("select 2", conn))

        async def view(request):
            return PlainTextResponse(await report(await shop.db.connection()))

        shop.view(view)
        assert (await shop.ask()).text == "2"


@on_a_loop
async def test_a_block_that_starlette_begins_in_one_thread_and_ends_in_another_is_no_deadlock(
    notes,
):
    """Its workers begin blocks for other requests while they have the number of the first one's."""
    import anyio

    with ConnectionPool(notes, min_size=1, max_size=1, timeout=20) as pool:
        pool.execute("select 1")

        async def request(number, done):
            async with contextmanager_in_threadpool(pool.connection()) as conn:
                await anyio.to_thread.run_sync(conn.execute, "select 1")
                if number == 0:
                    await until(lambda: pool.stats().waiting)
            done.append(number)

        done: list[int] = []
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(request, number, done)
        assert sorted(done) == [0, 1, 2, 3]
        assert pool.stats().refused == 0


@on_a_loop
async def test_a_pool_for_threads_that_endpoints_hold_over_an_await_says_whose_place_it_is(notes):
    import anyio

    with ConnectionPool(notes, max_size=1, timeout=20) as pool:
        told = []

        async def endpoint():
            try:
                with pool.connection() as conn:
                    conn.execute("select 1")
                    await anyio.lowlevel.checkpoint()
            except MisuseError as error:
                told.append(str(error))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(endpoint)
    assert len(told) == 2
    assert all("event loop" in text and "AsyncConnectionPool" in text for text in told)
