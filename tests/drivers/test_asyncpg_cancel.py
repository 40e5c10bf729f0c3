"""Cancelled at each of its suspension points, everything of an asyncpg link leaves what the protocol says."""

from __future__ import annotations

import asyncio
import gc
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import pytest
from tests.drivers.async_links import (
    LOOPS,
    registered,
    run,
    suspensions_of,
    was_cancelled,
)
from tests.drivers.asyncpg_links import SECONDS, comes_true, one, opened, sockets

from penstock._drivers.asyncpg.cancel import ask_to_cancel
from penstock._drivers.asyncpg.driver import driver
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.wire import WireProxy

    from penstock._drivers.asyncpg.link import AsyncpgLink
    from pytest_penstock.postgres import Server

    Link = AsyncpgLink

# What a link stands up to. A cancelled statement is the dearest: asyncpg opens a connection for it.
POINTS = 40


class Scenario(NamedTuple):
    """Something that is cut off, what goes before it, and what must be true after all."""

    before: Callable[[Link], Awaitable[Any]]
    cut: Callable[[Link], Any]
    after: Callable[[Link], Awaitable[Any]]


async def nothing(_: Link) -> None:
    pass


async def begun(link: Link) -> None:
    await link.begin()
    await link.conn.execute("insert into apg values (1)")


async def insert_by_hand(link: Link) -> None:
    await link.conn.execute("begin; insert into apg values (1)")


async def insert_cut_off(link: Link) -> None:
    task = asyncio.ensure_future(link.conn.execute("insert into apg select 1 from pg_sleep(60)"))
    await comes_true(link._is_busy)
    # A request to cancel that overtakes its statement finds nothing to cancel.
    await comes_true(lambda: _has_begun(link.conn.get_server_pid()))
    task.cancel()
    await asyncio.wait({task})
    link.park()


def _has_begun(pid: int) -> bool:
    """Whether the backend has begun its statement, by the title of its process."""
    with suppress(OSError):
        return b" INSERT" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return True


async def prepared(link: Link) -> None:
    await link.execute("select $1::int", (1,))


async def dirty(link: Link) -> None:
    await link.execute("set work_mem to '7MB'")
    await link.conn.execute("listen cut")
    assert link.park()
    assert link.start_reset()


async def clean(link: Link) -> None:
    assert await one(link, "show work_mem") != "7MB"
    assert await one(link, "select count(*) from pg_listening_channels()") == 0


async def committed(link: Link) -> None:
    assert await one(link, "select count(*) from apg") == 1


async def not_committed(link: Link) -> None:
    assert await one(link, "select count(*) from apg") == 0


async def with_codecs(link: Link) -> None:
    await link.conn.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=str)
    await link.conn.add_listener("cut", print)
    link.park()


SCENARIOS = {
    "execute": Scenario(nothing, lambda link: link.execute("select pg_sleep(0.002), 42"), nothing),
    "execute, prepared": Scenario(prepared, prepared, nothing),
    "apply settings": Scenario(nothing, lambda link: link.apply_settings({"a.b": "c"}), nothing),
    "begin": Scenario(nothing, lambda link: link.begin(), nothing),
    "commit": Scenario(begun, lambda link: link.commit(), committed),
    "tidy a transaction": Scenario(insert_by_hand, lambda link: link.tidy(SECONDS), not_committed),
    "tidy a statement": Scenario(insert_cut_off, lambda link: link.tidy(SECONDS), not_committed),
    "tidy codecs": Scenario(with_codecs, lambda link: link.tidy(SECONDS), clean),
    "ping": Scenario(nothing, lambda link: link.ping(SECONDS), nothing),
    "finish a reset": Scenario(dirty, lambda link: link.finish_reset(SECONDS), clean),
    "prepare": Scenario(nothing, lambda link: link.prepare(), nothing),
}


@pytest.fixture(scope="module")
def table(server: Server) -> Any:
    server.execute("create table apg (a int)")
    yield server
    server.execute("drop table apg")


async def came_back(conninfo: str, scenario: Scenario, nth: int, *, late: bool) -> bool:
    """Cut it off there; whether tidy could bring it back, and then everything is as it should be."""
    async with opened(conninfo, reset="session") as link:
        assert link.park()
        link.lend()
        await scenario.before(link)
        await was_cancelled(scenario.cut(link), nth, late=late)
        if link.activity() is Activity.IDLE:
            link.park()
            link.lend()
            assert await one(link, "select 'the answer to this'") == "the answer to this"
        link.park()
        if not await link.tidy(SECONDS):
            return False
        assert link.activity() is Activity.IDLE
        assert link.park()
        link.lend()
        assert await one(link, "select 'the answer to this'") == "the answer to this"
        await scenario.after(link)
        return True


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_cut_off_anywhere_a_link_tells_the_truth_and_comes_back(
    table: Server, name: str, loop: str
) -> None:
    scenario = SCENARIOS[name]
    conninfo = table.conninfo(over="unix")

    async def main() -> None:
        async with opened(conninfo, reset="session") as link:
            assert link.park()
            link.lend()
            await scenario.before(link)
            points = await suspensions_of(scenario.cut(link))
        assert 0 < points < POINTS
        for nth in range(1, points + 1):
            for late in (False, True):
                table.execute("truncate apg")
                assert await came_back(conninfo, scenario, nth, late=late), (nth, points, late)

    run(main(), loop)
    gc.collect()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("over", ["unix", "tls", "name"])
def test_cancelled_anywhere_while_opening_nothing_is_left(
    request: pytest.FixtureRequest, over: str, loop: str
) -> None:
    running: Server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    conninfo = (
        running.conninfo(host="localhost") if over == "name" else running.conninfo(over=over)  # type: ignore[arg-type]
    )
    recipe = Recipe(conninfo=conninfo)

    async def main() -> None:
        before, waiting = sockets(), registered()
        links: list[Link] = []

        async def open_link() -> None:
            links.append(await driver.open(recipe, SECONDS))

        points = await suspensions_of(open_link())
        await links.pop().close()
        assert 2 <= points < POINTS
        for nth in range(1, points + 1):
            for late in (False, True):
                cancelled = await was_cancelled(open_link(), nth, late=late)
                assert cancelled or links
                while links:
                    await links.pop().close()
                await comes_true(lambda: sockets() <= before and registered() == waiting)
                assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main(), loop)
    gc.collect()  # filterwarnings = error: "Task was destroyed" would fail this test


@pytest.mark.parametrize("loop", LOOPS)
def test_asyncio_run_ends_with_an_open_under_way_without_a_complaint(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(port: int) -> None:
        recipe = Recipe(conninfo=f"host=127.0.0.1 port={port} user=me")
        opening = asyncio.ensure_future(driver.open(recipe, None))
        await asyncio.sleep(0.02)
        assert not opening.done()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        run(main(listener.getsockname()[1]), loop)
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("loop", LOOPS)
def test_a_commit_that_was_sent_goes_on_though_its_borrower_is_cancelled(
    table: Server, loop: str
) -> None:
    table.execute(
        "create function nap() returns trigger language plpgsql as "
        "'begin perform pg_sleep(0.2); return null; end'"
    )
    table.execute(
        "create constraint trigger nap after insert on apg "
        "deferrable initially deferred for each row execute function nap()"
    )
    table.execute("truncate apg")

    async def main() -> None:
        async with opened(table.conninfo()) as link:
            await link.begin()
            await link.conn.execute("insert into apg values (1)")
            commit = asyncio.ensure_future(link.commit())
            await comes_true(link._is_busy)
            commit.cancel()
            with pytest.raises(asyncio.CancelledError):
                await commit
            assert not link.park() and link.activity() is Activity.ACTIVE
            assert await link.tidy(SECONDS)
            assert link.activity() is Activity.IDLE and link.park()
            link.lend()
            assert await one(link, "select count(*) from apg") == 1

    run(main(), loop)
    table.execute("drop trigger nap on apg")
    table.execute("drop function nap")


def test_a_failed_commit_whose_borrower_is_gone_makes_no_noise(
    table: Server, caplog: pytest.LogCaptureFixture
) -> None:
    table.execute("create table late (a int unique deferrable initially deferred)")

    async def main() -> None:
        async with opened(table.conninfo()) as link:
            await link.begin()
            await link.conn.execute("insert into late values (1), (1)")
            with pytest.raises(asyncpg.UniqueViolationError):
                await link.commit()
            assert link.park()
            link.lend()
            await link.begin()
            await link.conn.execute("insert into late values (2), (2)")
            commit = asyncio.ensure_future(link.commit())
            await asyncio.sleep(0)
            commit.cancel()
            await asyncio.wait({commit})
            assert link.park() or await link.tidy(SECONDS)
            link.lend()
            assert await one(link, "select count(*) from late") == 0

    run(main())
    gc.collect()
    assert not caplog.records
    table.execute("drop table late")


# --- the request to cancel


async def cut_off_at_once(link: Link, running: Server) -> None:
    """Cancel a statement that the server has begun, and park before the loop has another turn."""
    asleep = f"pid = {link.conn.get_server_pid()} and wait_event = 'PgSleep'"

    async def work() -> None:
        try:
            await link.conn.execute("select pg_sleep(60)")
        finally:
            link.park()

    task = asyncio.ensure_future(work())
    await comes_true(lambda: running.execute(f"select 1 from pg_stat_activity where {asleep}"))
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("over", "mode"),
    [("unix", None), ("tcp", "prefer"), ("tls", None), ("tls", "prefer"), ("tls", "allow")],
)
def test_a_request_to_cancel_reaches_the_server_as_its_connection_did(
    request: pytest.FixtureRequest, over: str, mode: str | None, loop: str
) -> None:
    running: Server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    words = {} if mode is None else {"sslmode": mode}
    if mode is not None:
        over = "tcp"

    async def main() -> None:
        async with opened(running.conninfo(over=over, **words)) as link:  # type: ignore[arg-type]
            await cut_off_at_once(link, running)
            assert await link.tidy(SECONDS)
            assert link.park()
            link.lend()
            assert await one(link, "select 1") == 1

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_request_to_cancel_that_fails_ends_the_session_and_tells(
    server: Server, proxy: WireProxy, loop: str
) -> None:
    async def main() -> None:
        told: list[str] = []
        async with opened(server.conninfo(port=proxy.port)) as link:
            link.on_end(lambda: told.append("end"))
            proxy.refuse()
            await cut_off_at_once(link, server)
            assert not await link.tidy(None)
            assert link.activity() is Activity.BROKEN and told == ["end"]

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("over", ["unix", "tls"])
def test_a_request_to_cancel_that_is_cancelled_anywhere_leaves_nothing(
    request: pytest.FixtureRequest, over: str, loop: str
) -> None:
    running: Server = request.getfixturevalue("tls_server" if over == "tls" else "server")

    async def main() -> None:
        async with opened(running.conninfo(over=over)) as link:  # type: ignore[arg-type]
            before, waiting = sockets(), registered()
            target = link.conn._target()
            points = await suspensions_of(ask_to_cancel(target))
            assert 2 <= points < POINTS
            for nth in range(1, points + 1):
                for late in (False, True):
                    await was_cancelled(ask_to_cancel(target), nth, late=late)
                    await comes_true(lambda: sockets() <= before and registered() == waiting)
                    assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main(), loop)
    gc.collect()
