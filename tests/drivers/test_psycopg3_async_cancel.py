"""Cancelled at each of its suspension points, everything of a link on asyncio leaves what the protocol says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.drivers.async_links import (
    LOOPS,
    SECONDS,
    one,
    opened,
    registered,
    run,
    suspensions_of,
    was_cancelled,
)

from penstock._drivers.psycopg3.aio_driver import AsyncPsycopg3Link
from penstock.drivers import Activity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pytest_penstock.postgres import Server

Link = AsyncPsycopg3Link


class Scenario(NamedTuple):
    """Something that is cut off, what goes before it, and what must be true after all."""

    before: Callable[[Link], Awaitable[Any]]
    cut: Callable[[Link], Any]
    after: Callable[[Link], Awaitable[Any]]


async def nothing(_: Link) -> None:
    pass


async def begun(link: Link) -> None:
    await link.conn.execute("insert into cut values (1)")


async def long_insert(link: Link) -> None:
    link.handle.send_query(b"insert into cut select 1 from pg_sleep(60)")
    link.handle.flush()
    link.park()


async def many_prepared(link: Link) -> None:
    for _ in range(4):
        await link.execute("select %s::int", (1,))


async def dirty(link: Link) -> None:
    await link.execute("set work_mem to '7MB'")
    await link.execute("listen cut")
    link.park()
    assert link._reset is not None
    link._reset += b"; select pg_sleep(0.01)"  # so that there is something to wait for
    assert link.start_reset()


async def clean(link: Link) -> None:
    assert await one(link, "show work_mem") != "7MB"
    assert await one(link, "select count(*) from pg_listening_channels()") == 0


async def committed(link: Link) -> None:
    assert await one(link, "select count(*) from cut") == 1


async def not_committed(link: Link) -> None:
    assert await one(link, "select count(*) from cut") == 0


async def execute_twice_prepared(link: Link) -> None:
    for value in range(3):
        await link.execute("select %s::int", (value,))


async def settings(link: Link) -> None:
    await link.apply_settings({"app.user": "me"})


SCENARIOS = {
    "execute": Scenario(nothing, lambda link: link.execute("select pg_sleep(0.005), 42"), nothing),
    "execute, prepared": Scenario(many_prepared, execute_twice_prepared, nothing),
    "apply settings": Scenario(nothing, settings, nothing),
    "commit": Scenario(begun, lambda link: link.commit(), committed),
    "tidy a transaction": Scenario(begun, lambda link: link.tidy(SECONDS), not_committed),
    "tidy a statement": Scenario(long_insert, lambda link: link.tidy(SECONDS), not_committed),
    "ping": Scenario(nothing, lambda link: link.ping(SECONDS), nothing),
    "finish a reset": Scenario(dirty, lambda link: link.finish_reset(SECONDS), clean),
    "prepare": Scenario(nothing, lambda link: link.prepare(), nothing),
}


@pytest.fixture(scope="module")
def table(server: Server) -> Any:
    server.execute("create table cut (a int)")
    yield server
    server.execute("drop table cut")


async def came_back(conninfo: str, scenario: Scenario, nth: int, *, late: bool) -> bool:
    """Cut it off there; whether tidy could bring it back, and then everything is as it should be."""
    async with opened(conninfo, reset="session") as link:
        await scenario.before(link)
        waiting = registered()
        await was_cancelled(scenario.cut(link), nth, late=late)
        assert registered() == waiting
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
        if scenario.after in (committed, not_committed):
            table.execute("truncate cut")
        async with opened(conninfo, reset="session") as link:
            await scenario.before(link)
            points = await suspensions_of(scenario.cut(link))
        assert points
        lost = 0
        for late in (False, True):
            for nth in range(1, points + 1):
                if scenario.after is committed:
                    table.execute("truncate cut")
                lost += not await came_back(conninfo, scenario, nth, late=late)
        # A request to cancel whose end was not seen could hit the next statement: not lent again.
        assert lost == 0 or (name == "tidy a statement" and lost < 2 * points)

    run(main(), loop)
