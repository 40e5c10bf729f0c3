"""Every way a request can end, in every transaction mode: the connection is back, the work is where
it should be, and no request has two connections (the pool has one)."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from tests.integrations.asgi.conftest import on_a_loop

from penstock import MisuseError

MODES = ["request", "explicit", "autocommit"]


class Refused(Exception):
    """An error that the app has a handler for."""


@dataclass
class Ending:
    """One way to end.

    Attributes:
        view: called with the shop; writes the note "work" and ends.
        status: what is answered.
        commits: whether mode "request" keeps the work.
        warns: whether, in mode "request", somebody must be told that it was not kept.
    """

    view: Any
    status: int
    commits: bool
    warns: bool = False
    prepare: Any = lambda shop: None


def answering(make, *args, **options):
    async def view(shop):
        await shop.write("work")
        return make(*args, **options)

    return view


def raising(error):
    async def view(shop):
        await shop.write("work")
        raise error

    return view


def handled_by(status):
    async def handle(request, error):
        return PlainTextResponse("handled", status)

    return lambda shop: shop.errors.update({Refused: handle})


async def violates_at_commit(shop):
    await shop.write("work", 1)
    await shop.write("work too", 1)
    return PlainTextResponse("written")


async def kills_its_session(shop):
    await shop.write("work")
    with contextlib.suppress(Exception):
        await shop.run("select pg_terminate_backend(pg_backend_pid())")
        await shop.run("select 1")
    return PlainTextResponse("as if nothing had happened")


async def swallows(shop):
    await shop.write("work")
    with contextlib.suppress(Exception):
        await shop.write("work")
    return PlainTextResponse("never mind")


async def streams(shop):
    await shop.write("work")

    async def body():
        yield str(await shop.value("select count(*) from note"))

    return StreamingResponse(body())


async def rolls_back(shop):
    await shop.write("work")
    await shop.db.rollback()
    return PlainTextResponse("on purpose")


async def commits_before_it_fails(shop):
    await shop.write("work")
    await shop.db.commit()
    raise ZeroDivisionError


ENDINGS = {
    "an answer": Ending(answering(PlainTextResponse, "done"), 200, commits=True),
    "no content": Ending(answering(Response, status_code=204), 204, commits=True),
    "a redirect": Ending(answering(RedirectResponse, "/elsewhere"), 307, commits=True),
    "a refusal": Ending(answering(PlainTextResponse, "no", 409), 409, commits=False, warns=True),
    "an abort": Ending(raising(HTTPException(422)), 422, commits=False, warns=True),
    "an answer of 500": Ending(answering(PlainTextResponse, "oh", 500), 500, commits=False),
    "an unhandled error": Ending(raising(ZeroDivisionError()), 500, commits=False),
    "an error handled as 200": Ending(
        raising(Refused()), 200, commits=True, prepare=handled_by(200)
    ),
    "an error handled as 400": Ending(
        raising(Refused()), 400, commits=False, warns=True, prepare=handled_by(400)
    ),
    "a commit that fails": Ending(violates_at_commit, 500, commits=False),
    "a session that is lost": Ending(kills_its_session, 500, commits=False),
    "a failed statement, swallowed": Ending(swallows, 200, commits=False, warns=True),
    "a stream": Ending(streams, 200, commits=True),
    "a rollback": Ending(rolls_back, 200, commits=False),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=list(ENDINGS))
@on_a_loop
async def test_the_status_decides_and_the_connection_comes_back(ending, shop):
    async with shop:
        ending.prepare(shop)
        shop.view(lambda request: ending.view(shop))
        answer = await shop.ask("/", "POST")
        assert answer.status_code == ending.status, answer.text
        assert ("work" in shop.kept()) is ending.commits
        assert shop.in_use() == 0
        told = [text for text in shop.warnings() if "thrown away" in text]
        assert len(told) == ending.warns, shop.warnings()
        again = await shop.ask("/", "POST")  # the one connection is as good as new
        assert again.status_code in {ending.status, 500}


@on_a_loop
async def test_a_warning_names_the_route_and_the_answer(shop):
    async with shop:
        shop.view(lambda request: answering(PlainTextResponse, "no", 409)(shop), "/orders/{id}/pay")
        await shop.ask("/orders/7/pay", "POST")
        (told,) = shop.warnings()
        assert told.startswith("POST /orders/")
        assert " answered 409: uncommitted work on pool 'shop' was thrown away" in told


@on_a_loop
async def test_what_was_committed_by_hand_stays_whatever_comes_after(shop):
    async with shop:

        async def view(request):
            await shop.write("before")
            await shop.db.commit()
            await shop.write("after")
            raise ZeroDivisionError

        shop.view(view)
        assert (await shop.ask()).status_code == 500
        assert shop.kept() == {"before"}


@on_a_loop
async def test_a_connection_kept_over_a_commit_is_in_a_transaction_again(shop):
    """asyncpg's would commit each statement by itself."""
    async with shop:

        async def view(request):
            conn = await shop.db.connection()
            await shop.write("before")
            await shop.db.commit()
            await conn.execute("insert into note values ('after')")
            return PlainTextResponse("no", 500)

        shop.view(view)
        await shop.ask()
        assert shop.kept() == {"before"}


@on_a_loop
async def test_a_transaction_that_is_ended_by_sql_leaves_nothing_to_the_next_request(shop):
    async with shop:

        async def view(request):
            conn = await shop.db.connection()
            await conn.execute("insert into note values ('by hand')")
            await conn.execute("commit")
            return PlainTextResponse("done")

        async def nested(request):
            conn = await shop.db.connection()
            async with conn.transaction():
                await conn.execute("insert into note values ('nested')")
            return PlainTextResponse("done")

        shop.view(view)
        shop.view(nested, "/nested")
        assert (await shop.ask()).status_code == 200
        assert (await shop.ask("/nested")).status_code == 200
        assert shop.kept() == {"by hand", "nested"}


@on_a_loop
async def test_explicit_commits_what_is_committed_and_warns_of_the_rest(shop_of, driver):
    async with shop_of(driver, "explicit") as shop:

        async def view(request):
            await shop.write("one")
            await shop.db.commit()
            await shop.write("two")
            return PlainTextResponse("done")

        shop.view(view)
        assert (await shop.ask()).status_code == 200
        assert shop.kept() == {"one"}
        (told,) = shop.warnings()
        assert "nobody committed it" in told


@on_a_loop
async def test_explicit_warns_of_a_failed_statement_that_was_swallowed_and_commit_refuses_it(
    shop_of, driver
):
    async with shop_of(driver, "explicit") as shop:

        async def commits(request):
            await swallows(shop)
            with pytest.raises(MisuseError, match="a statement failed: it was rolled back"):
                await shop.db.commit()
            return PlainTextResponse("refused")

        shop.view(lambda request: swallows(shop))
        shop.view(commits, "/commits")
        assert (await shop.ask()).status_code == 200
        (told,) = shop.warnings()
        assert "nobody committed it" in told
        assert (await shop.ask("/commits")).text == "refused"
        assert shop.kept() == set()


@on_a_loop
async def test_autocommit_keeps_each_statement(shop_of, driver):
    async with shop_of(driver, "autocommit") as shop:

        async def view(request):
            await shop.write("one")
            raise ZeroDivisionError

        shop.view(view)
        assert (await shop.ask()).status_code == 500
        assert shop.kept() == {"one"}
        assert shop.warnings() == []


@on_a_loop
async def test_a_request_that_asks_for_nothing_borrows_nothing(shop):
    async with shop:

        async def view(request):
            return PlainTextResponse("hello")

        shop.view(view)
        assert (await shop.ask()).text == "hello"
        assert not shop.pool.opened


@on_a_loop
async def test_a_commit_that_fails_raises_its_own_error_to_the_server(shop_of):
    """Starlette says "response already started" when a handler of its own is in between."""

    async with shop_of("psycopg") as shop:
        shop.view(lambda request: violates_at_commit(shop))

        async def handle(request, error):
            return PlainTextResponse("handled", 400)

        import psycopg

        shop.errors[psycopg.Error] = handle
        import httpx

        transport = httpx.ASGITransport(shop.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            with pytest.raises(psycopg.errors.UniqueViolation):
                await client.post("/")
        assert shop.in_use() == 0


@on_a_loop
async def test_a_statement_that_is_under_way_at_the_answer_is_an_error_and_nothing_is_committed(
    shop,
):
    async with shop:
        tasks = []

        async def view(request):
            await shop.write("work")
            conn = await shop.db.connection()
            tasks.append(asyncio.create_task(conn.execute("select pg_sleep(0.3)")))
            await asyncio.sleep(0.05)
            return PlainTextResponse("too early")

        shop.view(view)
        answer = await shop.ask()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert answer.status_code == 500
        await shop.comes_back()
        assert shop.kept() == set()
