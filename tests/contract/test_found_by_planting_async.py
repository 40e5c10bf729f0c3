"""What no other test noticed when it was planted (tests/planted), of pools of asyncio."""

import asyncio
import contextvars

from penstock import AsyncConnectionPool
from penstock._machine.slot import SlotState
from penstock.testing import AsyncFakeDriver, FakeServer

PATIENCE = 10.0  # seconds: the price of a failure


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  it is no event
            await asyncio.sleep(0)


def run(scenario, **options):
    async def bounded():
        with FakeServer() as server:
            async with asyncio.timeout(PATIENCE):
                pool = AsyncConnectionPool(driver=AsyncFakeDriver(server), max_size=1, **options)
                async with pool:
                    await scenario(pool, server)

    asyncio.run(bounded())


def cancel_all(pool):
    """As a loop that is being shut down does, before any of them has taken its first step."""
    assert pool._tasks
    for task in list(pool._tasks):
        task.cancel()


def test_a_give_back_in_the_background_that_is_cancelled_before_it_begins_loses_nothing():
    async def scenario(pool, _server):
        lease = pool.connection()
        conn = await lease.__aenter__()
        await conn.execute("insert")
        await lease.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)
        cancel_all(pool)
        await until(lambda: pool.stats().closed.get("unclean") == 1)
        assert not pool.stats().orphaned

    run(scenario)


def test_a_farewell_that_is_cancelled_before_it_begins_ends_its_session_all_the_same():
    async def scenario(pool, server):
        await pool.execute("select 1")
        await pool.resize(0, 1)
        pool._carry_out(pool._machine.drain(0.0))
        [slot] = pool._machine.slots()
        assert slot.state is SlotState.CLOSING
        del slot
        cancel_all(pool)
        await until(lambda: not server.sessions and not pool.stats().size)

    run(scenario, min_size=0)


def test_what_a_request_keeps_in_context_variables_is_not_seen_by_the_pools_own_tasks():
    user = contextvars.ContextVar("user", default="nobody")
    seen = []

    async def configure(_conn):
        seen.append(user.get())

    async def scenario(pool, _server):
        user.set("alice")
        await pool.execute("select 1")

    run(scenario, min_size=0, configure=configure)
    assert seen == ["nobody"]
