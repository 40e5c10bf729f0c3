"""The asyncio driver of `penstock.testing` does as it is told, and tells what was done wrong.

One job: what the suite relies on, where its fake driver is asyncio's.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from penstock.drivers import Activity, Recipe
from penstock.testing import (
    AsyncFakeDriver,
    DoubleUse,
    FakeInterfaceError,
    FakeOperationalError,
    FakeServer,
    Mode,
)


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


async def opened(server, **options):
    link = await AsyncFakeDriver(server, **options).open(Recipe(), 20)
    link.lend()
    return link


def run(scenario, server):
    """On a loop of its own; the descriptors that it opened are closed."""

    async def bounded():
        async with asyncio.timeout(20):
            await scenario(server)

    before = descriptors()
    asyncio.run(bounded())
    server.hang_up()
    assert descriptors() <= before


def descriptors():
    return len(list(Path("/proc/self/fd").glob("*")))  # none where there is no such folder


def test_a_statement_begins_a_transaction_that_commit_ends(server):
    async def scenario(server):
        link = await opened(server)
        server.answers["select 7"] = [(7,), (8,)]
        cursor = await link.conn.execute("select 7")
        assert link.activity() is Activity.IN_TRANSACTION
        assert await cursor.fetchone() == (7,)
        assert [row async for row in cursor] == [(8,)]
        await link.conn.commit()
        assert link.activity() is Activity.IDLE
        assert [text for _, text in server.statements] == ["select 7", "COMMIT"]
        await link.close()

    run(scenario, server)


def test_a_cancelled_statement_is_pending_until_tidy_has_read_its_reply(server):
    async def scenario(server):
        link = await opened(server)
        server.mode = Mode.HANGING
        task = asyncio.create_task(link.conn.execute("insert"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert link.activity() is Activity.ACTIVE
        with pytest.raises(FakeInterfaceError):
            await link.conn.execute("select 1")
        assert not link.park()
        assert not await link.tidy(0.01)
        server.mode = Mode.UP
        assert await link.tidy(20)
        assert link.activity() is Activity.IDLE
        assert [text for _, text in server.statements] == ["insert", "ROLLBACK"]
        await link.close()

    run(scenario, server)


def test_two_tasks_on_one_connection_and_two_lends_are_told(server):
    async def scenario(server):
        link = await opened(server)
        with pytest.raises(DoubleUse, match="lent to"):
            link.lend()
        both = [link.conn.execute("one"), link.conn.execute("two")]
        results = await asyncio.gather(*both, return_exceptions=True)
        assert [type(each) for each in results if isinstance(each, Exception)] == [DoubleUse]
        await link.close()

    run(scenario, server)


def test_a_slow_connect_waits_on_the_loop_and_is_admitted_from_any_thread(server):
    async def scenario(server):
        server.mode = Mode.SLOW
        both = [asyncio.create_task(opened(server)) for _ in range(2)]
        while server.connects < 2:  # noqa: ASYNC110  it is no event
            await asyncio.sleep(0)
        threading.Thread(target=server.admit).start()
        done, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(waiting), len(server.sessions)) == (1, 1, 1)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await done.pop().result().close()
        with pytest.raises(FakeOperationalError, match="expired"):
            await AsyncFakeDriver(server).open(Recipe(), 0.01)

    run(scenario, server)


@pytest.mark.parametrize("tells", [True, False])
def test_the_end_of_a_session_is_seen_by_whoever_waits_and_told_if_it_tells(server, tells):
    async def scenario(server):
        link = await opened(server, tells=tells)
        told = asyncio.Event()
        assert link.on_end(told.set) is tells
        server.mode = Mode.HANGING
        task = asyncio.create_task(link.conn.execute("select 1"))
        await asyncio.sleep(0)
        threading.Thread(target=server.hang_up).start()
        with pytest.raises(FakeOperationalError) as caught:
            await task
        assert caught.value.sqlstate == "57P01"
        if tells:
            await told.wait()
        assert link.activity() is Activity.BROKEN
        link.discard()
        await link.close()

    run(scenario, server)
