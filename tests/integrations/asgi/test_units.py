"""Whose is a connection? A request's, whatever tasks it starts; a unit's; nobody's after the end."""

import asyncio
import threading

import anyio
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from tests.integrations.asgi.conftest import Wire, on_a_loop, until

from penstock import AsyncConnectionPool, ConfigError, ConnectionPool, MisuseError, PoolTimeout
from penstock.integrations.asgi import Penstock

PID = "select pg_backend_pid()"


def answering(function):
    """A view that answers what an async function gives."""

    async def view(request):
        return JSONResponse(await function())

    return view


# -- in a request ------------------------------------------------------------------------------------


@on_a_loop
async def test_a_request_has_one_connection_and_requests_have_their_own(shop):
    async with shop:

        async def both():
            one, other = await shop.db.connection(), await shop.db.connection()
            return one is other

        shop.view(answering(both))
        assert (await shop.ask()).json() is True
        assert shop.pool.stats().borrows == 1


@on_a_loop
async def test_the_tasks_of_a_request_share_its_connection_also_when_they_ask_at_once(shop):
    async with shop:

        async def all_three():
            found = await asyncio.gather(*(shop.db.connection() for _ in range(3)))
            return len({id(conn) for conn in found})

        shop.view(answering(all_three))
        assert (await shop.ask()).json() == 1


@on_a_loop
async def test_psycopgs_tasks_take_turns_on_a_shared_connection(shop_of):
    async with shop_of("psycopg") as shop:

        async def sums():
            return sum(await asyncio.gather(*(shop.value(f"select {n}") for n in range(5))))

        shop.view(answering(sums))
        assert (await shop.ask()).json() == 10


@on_a_loop
async def test_asyncpgs_tasks_do_not_and_a_unit_of_its_own_gives_each_a_connection(shop_of):
    asyncpg = pytest.importorskip("asyncpg")

    async with shop_of("asyncpg", max_size=5) as shop:

        async def alone(number):
            async with shop.db.unit():
                return await shop.value(f"select {number} from pg_sleep(0.01)")

        async def sums():
            with pytest.raises(asyncpg.InterfaceError, match="another operation"):
                await asyncio.gather(*(shop.value(f"select {n}") for n in range(5)))
            return sum(await asyncio.gather(*map(alone, range(4))))

        shop.view(answering(sums))
        assert (await shop.ask()).json() == 6


@on_a_loop
async def test_a_task_group_of_anyios_shares_it_too(shop):
    async with shop:

        async def tagged(tag):
            await shop.write(tag)

        async def view(request):
            async with anyio.create_task_group() as group:
                group.start_soon(tagged, "in a task")
            await shop.write("beside it")
            return PlainTextResponse("done")

        shop.view(view)
        assert (await shop.ask()).status_code == 200
        assert shop.kept() == {"in a task", "beside it"}


@on_a_loop
async def test_a_borrower_that_is_cancelled_does_not_keep_the_others_of_its_request_waiting(shop):
    async with shop:

        async def view(request):
            waiting = asyncio.create_task(shop.db.connection())
            other = asyncio.create_task(shop.value("select 1"))
            await until(lambda: shop.pool.stats().waiting)
            waiting.cancel()
            asked.set()
            return JSONResponse(await other)

        asked = asyncio.Event()
        shop.view(view)
        async with shop.taken():
            asking = asyncio.create_task(shop.ask())
            await asked.wait()
        assert (await asking).json() == 1


@on_a_loop
async def test_a_request_inside_another_one_has_its_own(shop_of, driver):
    async with shop_of(driver, max_size=2) as shop:

        async def inner():
            return await shop.value(PID)

        async def outer():
            mine = await shop.value(PID)
            answer = await shop.ask("/inner")
            return [mine, answer.json(), await shop.value(PID)]

        shop.view(answering(inner), "/inner")
        shop.view(answering(outer), "/")
        mine, other, mine_again = (await shop.ask()).json()
        assert mine == mine_again != other


@on_a_loop
async def test_the_middleware_in_itself_is_one_and_what_is_in_between_shares_the_connection(shop):
    async with shop:

        async def view(request):
            await shop.write("work")
            return PlainTextResponse("done")

        async def between(scope, receive, send):
            await shop.write("in between")
            await shop.app()(scope, receive, send)

        shop.view(view)
        assert (await shop.ask(app=shop.db.middleware(between))).status_code == 200
        assert shop.kept() == {"work", "in between"}
        assert shop.pool.stats().borrows == 1


# -- after the end -----------------------------------------------------------------------------------


@on_a_loop
async def test_a_task_that_outlives_its_request_is_told_to_have_a_unit_of_its_own(shop):
    async with shop:
        outlived, answered = [], asyncio.Event()

        async def late():
            await answered.wait()
            async with shop.taken():  # it is told at once, and does not wait for one first
                with pytest.raises(MisuseError, match=r"GET /.*is over") as caught:
                    await shop.db.connection()
            assert "db.unit()" in str(caught.value)
            async with shop.db.unit():
                await shop.write("late")

        async def view(request):
            await shop.write("in time")
            outlived.append(asyncio.create_task(late()))
            return PlainTextResponse("done")

        shop.view(view)
        await shop.ask()
        answered.set()
        await asyncio.gather(*outlived)
        assert shop.kept() == {"in time", "late"}
        assert shop.in_use() == 0


@on_a_loop
async def test_a_connection_that_is_kept_after_the_answer_is_dead(shop):
    async with shop:
        kept = []

        async def view(request):
            kept.append(await shop.db.connection())
            return PlainTextResponse("done")

        shop.view(view)
        await shop.ask()
        with pytest.raises(Exception, match="given back") as caught:
            await kept[0].execute("select 1")
        assert not isinstance(caught.value, AttributeError)


@on_a_loop
async def test_a_task_that_is_still_waiting_for_a_connection_when_its_request_ends_gets_none(shop):
    async with shop:
        left = []

        async def view(request):
            left.append(asyncio.create_task(shop.db.connection()))
            await asyncio.sleep(0.01)
            return PlainTextResponse("done")

        shop.view(view)
        async with shop.taken():
            await shop.ask()
        with pytest.raises(MisuseError, match="is over"):
            await left[0]
        await shop.comes_back()


# -- a unit of its own -------------------------------------------------------------------------------


@on_a_loop
async def test_a_unit_commits_at_its_end_and_rolls_back_on_an_error(shop):
    async with shop:
        async with shop.db.unit():
            await shop.write("kept")
        with pytest.raises(ZeroDivisionError):
            async with shop.db.unit():
                await shop.write("lost")
                raise ZeroDivisionError
        assert shop.kept() == {"kept"}
        assert shop.in_use() == 0
        assert shop.warnings() == []


@on_a_loop
async def test_a_unit_is_entered_once_and_left_once(shop):
    async with shop:
        unit = shop.db.unit()
        with pytest.raises(MisuseError, match="nobody is in"):
            await unit.__aexit__(None, None, None)
        async with unit:
            await shop.write("kept")
            with pytest.raises(MisuseError, match="entered twice"):
                async with unit:
                    raise AssertionError("two are inside")
        with pytest.raises(MisuseError, match="nobody is in"):
            await unit.__aexit__(None, None, None)
        assert not await unit.__aexit__(KeyboardInterrupt, KeyboardInterrupt(), None)


@on_a_loop
async def test_a_unit_in_a_request_is_apart_from_it(shop_of, driver):
    async with shop_of(driver, max_size=2) as shop:

        async def view(request):
            await shop.write("the request's")
            async with shop.db.unit():
                await shop.write("the unit's")
            await shop.write("the request's, too")
            return PlainTextResponse("no", 409)

        shop.view(view)
        await shop.ask()
        assert shop.kept() == {"the unit's"}


@on_a_loop
async def test_a_unit_whose_commit_fails_raises_it_and_gives_back(shop):
    async with shop:
        with pytest.raises(Exception, match="alone"):
            async with shop.db.unit():
                await shop.write("one", 1)
                await shop.write("two", 1)
        assert shop.in_use() == 0
        assert shop.kept() == set()


@on_a_loop
async def test_a_unit_that_is_cancelled_gives_back(shop):
    async with shop:

        async def work():
            async with shop.db.unit():
                await shop.write("lost")
                begun.set()
                await shop.run("select pg_sleep(60)")

        begun = asyncio.Event()
        task = asyncio.create_task(work())
        await begun.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await shop.comes_back()
        assert shop.kept() == set()
        async with shop.db.unit():
            assert await shop.value("select 1") == 1


@on_a_loop
async def test_a_unit_is_entered_once(shop):
    async with shop:
        unit = shop.db.unit()
        async with unit:
            with pytest.raises(MisuseError, match="twice"):
                await unit.__aenter__()


# -- elsewhere ---------------------------------------------------------------------------------------


@on_a_loop
async def test_outside_of_requests_the_error_says_what_to_do(shop):
    async with shop:
        for asking in (shop.db.connection, shop.db.commit, shop.db.rollback, shop.db.give_back):
            with pytest.raises(MisuseError, match=r"outside of a request") as caught:
                await asking()
            assert "db.unit()" in str(caught.value)


@on_a_loop
async def test_an_endpoint_in_a_thread_is_told_at_its_call_and_may_ask_the_loop(shop):
    """Starlette and FastAPI run `def` endpoints in AnyIO's threads, with the request's context."""
    async with shop:

        def in_a_thread():
            for call in (shop.db.connection, shop.db.execute):
                with pytest.raises(MisuseError, match="no event loop runs") as caught:
                    call()
                assert "anyio.from_thread.run" in str(caught.value)
            anyio.from_thread.run(shop.write, "by way of the loop")
            return threading.current_thread().name

        async def view(request):
            return PlainTextResponse(await anyio.to_thread.run_sync(in_a_thread))

        shop.view(view)
        answer = await shop.ask()
        assert answer.status_code == 200
        assert answer.text != threading.current_thread().name
        assert shop.kept() == {"by way of the loop"}


@on_a_loop
async def test_a_raw_app_needs_no_framework(shop):
    async with shop:

        async def app(scope, receive, send):
            await shop.write("work")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        async with Wire(shop.db.middleware(app), method="POST", path="/raw") as wire:
            assert (await wire.hear())["status"] == 200
            assert shop.kept() == {"work"}  # before the server could tell anybody
            assert (await wire.hear())["body"] == b"done"
            assert shop.in_use() == 0


# -- on_first_use, scope, several databases ------------------------------------------------------------


@on_a_loop
async def test_a_hook_gets_the_connection_first_and_again_after_a_commit(shop):
    async with shop:
        paths = []

        @shop.db.on_first_use
        async def say_who(conn):
            paths.append(shop.db.scope["path"])
            await conn.execute("select set_config('app.user', 'ann', true)")
            assert await shop.db.connection() is conn  # a hook may use it the long way round

        async def view(request):
            users = [await shop.value("select current_setting('app.user')") for _ in "12"]
            await shop.db.commit()
            users.append(await shop.value("select current_setting('app.user')"))
            return JSONResponse(users)

        shop.view(view, "/who")
        assert (await shop.ask("/who")).json() == ["ann"] * 3
        assert paths == ["/who"] * 2
        assert shop.db.scope is None


@on_a_loop
async def test_a_hook_that_raises_gives_the_connection_back_and_runs_again(shop):
    async with shop:
        tries = iter([ZeroDivisionError(), None])

        @shop.db.on_first_use
        def fails_once(conn):
            error = next(tries)
            if error:
                raise error

        async def view(request):
            with pytest.raises(ZeroDivisionError):
                await shop.db.connection()
            assert shop.in_use() == 0
            return JSONResponse(await shop.value("select 1"))

        shop.view(view)
        assert (await shop.ask()).json() == 1


@on_a_loop
async def test_other_databases_by_key_end_with_the_same_request(shop, notes):
    other: AsyncConnectionPool = AsyncConnectionPool(
        notes, driver=shop.driver, max_size=1, name="other"
    )
    async with shop, other:
        shop.db.pools["other"] = other

        async def view(request):
            await shop.write("here")
            await shop.write("there", db=shop.db["other"])
            return PlainTextResponse("done")

        shop.view(view)
        assert (await shop.ask()).status_code == 200
        assert shop.kept() == {"here", "there"}
        assert other.stats().in_use == 0
        assert shop.db["other"].health().ready
        assert repr(shop.db["other"]) == "<Database 'other'>"


@on_a_loop
async def test_pools_may_come_in_a_mapping_and_an_only_one_is_the_main_one(shop_of, driver, notes):
    async with shop_of(driver) as shop, shop_of(driver) as other:
        both = Penstock({"default": shop.pool, "other": other.pool})
        async with both.unit():
            assert await shop.value("select 1", await both["other"].connection()) == 1
            assert (shop.in_use(), other.in_use()) == (0, 1)
            assert await shop.value("select 1", await both.connection()) == 1
        assert Penstock({"other": other.pool}).pool is other.pool


@on_a_loop
async def test_giving_back_early_lets_others_have_it_and_the_next_use_borrows_anew(shop):
    async with shop:

        async def view(request):
            await shop.write("work")
            await shop.db.commit()
            await shop.db.give_back()
            assert shop.in_use() == 0
            return JSONResponse(await shop.value("select count(*) from note"))

        shop.view(view)
        assert (await shop.ask()).json() == 1
        assert shop.warnings() == []


@on_a_loop
async def test_an_idle_session_that_ends_in_the_middle_of_a_request_is_replaced(shop_of):
    async with shop_of("psycopg", "autocommit") as shop:

        async def view(request):
            shop.outside.execute("select pg_terminate_backend(%s, 5000)", (await shop.value(PID),))
            async with asyncio.timeout(30):
                while True:
                    try:
                        return JSONResponse(await shop.value("select 1"))
                    except Exception:
                        await asyncio.sleep(0.001)

        shop.view(view)
        assert (await shop.ask()).json() == 1


# -- what it is made of ----------------------------------------------------------------------------------


def test_what_is_no_pool_for_asyncio_is_refused():
    with ConnectionPool("") as pool, pytest.raises(MisuseError, match="AsyncConnectionPool"):
        Penstock(pool)  # type: ignore[call-overload]
    with pytest.raises(MisuseError, match="got a str"):
        Penstock("postgresql://app@db/shop")  # type: ignore[call-overload]


def test_arguments_that_are_wrong_are_named():
    with pytest.raises(ConfigError, match="transactions"):
        Penstock(transactions="sometimes")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="retry_after"):
        Penstock(retry_after=-1)


@on_a_loop
async def test_a_database_that_is_not_there_is_named_with_those_that_are(shop):
    async with shop:
        with pytest.raises(MisuseError, match="no database 'orders'; there is 'default'"):
            _ = shop.db["orders"].pool
        with pytest.raises(MisuseError, match="no database 'default'; there is none"):
            Penstock().health()


@on_a_loop
async def test_a_full_pool_is_its_own_error_in_the_view(shop_of, driver):
    async with shop_of(driver, timeout=0.05) as shop:

        async def view(request):
            with pytest.raises(PoolTimeout):
                await shop.db.connection()
            return PlainTextResponse("full")

        shop.view(view)
        async with shop.taken():
            assert (await shop.ask()).text == "full"
