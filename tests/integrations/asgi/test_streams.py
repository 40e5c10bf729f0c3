"""Bodies of several chunks, clients that go away, and background tasks: who has the connection when."""

import asyncio
import threading

import anyio
import pytest
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from tests.integrations.asgi.conftest import Wire, on_a_loop, until

ROWS = "select generate_series(1, 5)"


async def rows(shop, conn):
    """Five numbers, by a cursor that the server keeps: a stream that reads on."""
    if shop.driver == "psycopg":
        async with conn.cursor(name="five") as cursor:
            cursor.itersize = 1  # it goes on to the server for each
            await cursor.execute(ROWS)
            async for (number,) in cursor:
                yield str(number)
    else:
        async with conn.transaction():
            async for record in conn.cursor(ROWS, prefetch=1):
                yield str(record[0])


def streaming(shop, *, path="/", **options):
    """A view that reads before, and answers with what its own connection goes on to read."""

    async def view(request):
        conn = await shop.db.connection()
        assert await shop.value("select 1") == 1
        return StreamingResponse(rows(shop, conn), **options)

    shop.view(view, path)


@on_a_loop
async def test_a_stream_reads_on_the_connection_of_its_view(shop):
    async with shop:
        streaming(shop)
        assert (await shop.ask()).text == "12345"
        assert shop.in_use() == 0
        assert shop.pool.stats().borrows == 1
        assert shop.warnings() == []


@on_a_loop
async def test_a_stream_keeps_its_connection_until_its_last_chunk_and_not_until_that_is_sent(shop):
    async with shop:
        streaming(shop)
        async with Wire(shop.app()) as wire:
            seen = []
            while True:
                message = await wire.hear()
                if not message.get("more_body", True):
                    break
                seen.append((message.get("body", b""), shop.in_use()))
            assert shop.in_use() == 0
        assert dict(seen)[b"1"] == 1


@on_a_loop
async def test_what_a_view_wrote_is_committed_before_the_first_chunk(shop):
    async with shop:

        async def body():
            yield str(len(shop.kept()))

        async def view(request):
            await shop.write("work")
            return StreamingResponse(body())

        shop.view(view)
        assert (await shop.ask()).text == "1"


@on_a_loop
async def test_what_a_stream_writes_it_commits_itself_or_is_warned(shop):
    async with shop:

        async def body(commits):
            await shop.write(f"in a body {commits}")
            yield "x"
            if commits:
                await shop.db.commit()

        async def view(request):
            return StreamingResponse(body("commits" in request.query_params))

        shop.view(view)
        await shop.ask("/?commits")
        assert shop.kept() == {"in a body True"}
        assert shop.warnings() == []
        await shop.ask("/")
        assert shop.kept() == {"in a body True"}
        (told,) = shop.warnings()
        assert "answered 200: uncommitted work" in told


@on_a_loop
async def test_a_stream_that_raises_gives_back(shop):
    async with shop:

        async def body():
            await shop.write("lost")
            yield "x"
            raise ZeroDivisionError

        async def view(request):
            return StreamingResponse(body())

        shop.view(view)
        with pytest.raises(ZeroDivisionError):
            async with Wire(shop.app()) as wire:
                while True:
                    await wire.hear()
        assert shop.in_use() == 0
        assert shop.kept() == set()
        assert shop.warnings() == []


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@on_a_loop
async def test_a_client_that_goes_away_in_the_middle_gives_the_connection_back(spec, shop):
    """By 2.3 the app hears of it and cancels its own task; by 2.4 `send` raises."""
    async with shop:

        async def body():
            await shop.write("lost")
            for number in range(6):
                yield str(number)
            await shop.run("select pg_sleep(60)")

        async def view(request):
            return StreamingResponse(body())

        shop.view(view)

        async def app(scope, receive, send):
            async def raising(message):
                if spec == "2.4" and message.get("body"):
                    raise OSError("the client has gone")
                await send(message)

            await shop.app()(scope, receive, raising)

        async with Wire(app, asgi={"version": "3.0", "spec_version": spec}) as wire:
            if spec == "2.3":
                while (await wire.hear()).get("body") != b"5":
                    pass
                wire.say("http.disconnect")
            await asyncio.wait({wire.task})
        await shop.comes_back()
        assert shop.kept() == set()
        async with shop.db.unit():
            assert await shop.value("select 1") == 1


@on_a_loop
async def test_a_server_that_cancels_a_request_gets_the_connection_back(shop):
    async with shop:

        async def view(request):
            await shop.write("lost")
            await shop.run("select pg_sleep(60)")

        shop.view(view)
        async with Wire(shop.app()) as wire:
            await until(shop.in_use)
            await asyncio.sleep(0.05)  # it may be anywhere by now
            wire.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wire.task
        await shop.comes_back()
        assert shop.kept() == set()


@on_a_loop
async def test_a_cancel_scope_of_anyios_around_a_request_loses_nothing(shop):
    """It cancels again at every await, also at those of the cleaning up."""
    async with shop:

        async def view(request):
            await shop.write("lost")
            await shop.run("select pg_sleep(60)")

        shop.view(view)
        for seconds in (0.001, 0.01, 0.02, 0.05):
            with anyio.move_on_after(seconds):
                await shop.ask()
        await shop.comes_back()
        assert shop.kept() == set()
        async with shop.db.unit():
            assert await shop.value("select 1") == 1


@on_a_loop
async def test_a_sync_generator_runs_in_threads_and_the_answer_is_given_back(shop):
    async with shop:
        names = set()

        def body():
            for letter in "abc":
                names.add(threading.current_thread().name)
                yield letter

        async def view(request):
            await shop.write("work")
            return StreamingResponse(body())

        shop.view(view)
        assert (await shop.ask()).text == "abc"
        assert threading.main_thread().name not in names
        assert shop.kept() == {"work"}


def between(shop, dispatch):
    """Have a BaseHTTPMiddleware around the app and one within: each runs what is inside in a task."""
    app = shop.app()
    app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, go_on: go_on(request))
    app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=dispatch))  # innermost


@on_a_loop
async def test_starlettes_tasks_around_and_within_take_no_cursor_from_a_stream(shop):
    """The stream may have begun before its answer reaches us."""
    async with shop:

        async def reading(request, go_on):
            assert await shop.value("select 1") == 1
            return await go_on(request)

        streaming(shop)
        between(shop, reading)
        for _ in range(5):
            assert (await shop.ask()).text == "12345"
        assert shop.in_use() == 0
        assert shop.pool.stats().borrows == 5


@on_a_loop
async def test_what_only_notifies_is_committed_whoever_is_in_between(shop):
    async with shop:

        async def view(request):
            await shop.run("select pg_notify('news', 'told')")
            return PlainTextResponse("done")

        shop.view(view)
        between(shop, lambda request, go_on: go_on(request))
        shop.outside.execute("listen news")
        assert (await shop.ask()).status_code == 200
        assert [each.payload for each in shop.outside.notifies(timeout=2, stop_after=1)] == ["told"]


@on_a_loop
async def test_what_starlettes_tasks_wrote_is_committed_with_the_answer(shop):
    async with shop:

        async def writing(request, go_on):
            await shop.write("before")
            answer = await go_on(request)
            await shop.write("after")
            return answer

        async def view(request):
            await shop.write("work")
            return PlainTextResponse("done")

        shop.view(view)
        between(shop, writing)
        assert (await shop.ask()).status_code == 200
        assert shop.kept() == {"before", "work", "after"}
        assert shop.in_use() == 0
        assert shop.warnings() == []


# -- background tasks --------------------------------------------------------------------------------


@on_a_loop
async def test_a_background_task_finds_the_work_committed_and_the_connection_given_back(shop):
    """Starlette runs it before the app returns."""
    async with shop:
        seen = []

        async def later():
            seen.append((shop.kept(), shop.in_use()))
            await shop.write("later")
            await shop.db.commit()

        async def view(request):
            await shop.write("work")
            return PlainTextResponse("done", background=BackgroundTask(later))

        shop.view(view)
        assert (await shop.ask()).text == "done"
        assert seen == [({"work"}, 0)]
        assert shop.kept() == {"work", "later"}
        assert shop.in_use() == 0
        assert shop.warnings() == []


@on_a_loop
async def test_a_background_task_that_commits_nothing_is_warned_of(shop):
    async with shop:

        async def later():
            await shop.write("later")

        async def view(request):
            return PlainTextResponse("done", background=BackgroundTask(later))

        shop.view(view)
        await shop.ask()
        assert shop.kept() == set()
        (told,) = shop.warnings()
        assert "nobody committed it" in told


@on_a_loop
async def test_a_background_task_of_a_commit_that_failed_does_not_run(shop):
    async with shop:
        ran: list = []

        async def view(request):
            await shop.write("one", 1)
            await shop.write("two", 1)
            return PlainTextResponse("done", background=BackgroundTask(ran.append, 1))

        shop.view(view)
        assert (await shop.ask()).status_code == 500
        assert ran == []
