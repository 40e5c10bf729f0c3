"""What no other test noticed when it was planted (tests/planted), of pools of asyncio."""

import asyncio
import contextvars

from penstock import AsyncConnectionPool
from penstock._machine.machine import Machine, Waiter
from penstock._machine.slot import SlotState
from penstock.testing import AsyncFakeDriver, FakeServer, Mode

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
        assert not pool.stats().orphaned

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


async def cancel_in_the_middle(work, server):
    """Cancel it where it waits for the server's answer; a lost slot would be told as an orphan."""
    task = asyncio.get_running_loop().create_task(work)
    server.mode = Mode.HANGING
    await until(lambda: any(each._in_use_by for each in server.sessions.values()))
    task.cancel()
    await asyncio.wait({task})
    server.mode = Mode.UP
    assert task.cancelled()


async def borrow(pool):
    async with pool.connection():
        pass


def test_a_ping_that_is_cancelled_loses_no_slot():
    async def scenario(pool, server):
        await pool.execute("select 1")
        pool._machine._doubt()
        await cancel_in_the_middle(borrow(pool), server)
        await pool.execute("select 1")
        assert not pool.stats().orphaned

    run(scenario)


def test_a_check_that_is_cancelled_loses_no_slot():
    async def check(conn):
        await conn.execute("select 'check'")

    async def scenario(pool, server):
        await pool.execute("select 1")
        await cancel_in_the_middle(borrow(pool), server)
        await pool.execute("select 1")
        assert not pool.stats().orphaned

    run(scenario, check=check)


def test_an_on_borrow_that_is_cancelled_loses_no_slot():
    async def on_borrow(conn):
        await conn.execute("select 'on_borrow'")

    async def scenario(pool, server):
        await pool.execute("select 1")
        await cancel_in_the_middle(borrow(pool), server)
        await pool.execute("select 1")
        assert not pool.stats().orphaned

    run(scenario, on_borrow=on_borrow)


def test_a_rollback_that_is_cancelled_loses_no_slot():
    async def scenario(pool, server):
        await pool.execute("select 1")
        conn = await pool.getconn()
        await conn.execute("insert")
        await cancel_in_the_middle(pool.putconn(conn), server)
        await pool.execute("select 1")
        assert not pool.stats().orphaned

    run(scenario)


def test_who_leaves_by_a_cancellation_waits_for_no_answer():
    async def scenario(pool, server):
        lease = pool.connection()
        conn = await lease.__aenter__()
        await conn.execute("insert")
        server.mode = Mode.HANGING
        leaving = lease.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)
        task = asyncio.get_running_loop().create_task(leaving)
        for _ in range(5):  # steps, of which it needs one
            await asyncio.sleep(0)
        assert task.done()
        server.mode = Mode.UP

    run(scenario)


def test_a_borrower_who_is_destroyed_in_another_thread_makes_no_move_there(monkeypatch):
    moves: list[None] = []

    def give_up(*_args, **_options):
        moves.append(None)
        return []

    async def scenario(pool, _server):
        conn = await pool.getconn()
        waiter = Waiter(0, list)
        pool._queue_up(waiter)
        with monkeypatch.context() as patch:
            patch.setattr(Machine, "give_up", give_up)
            await asyncio.to_thread(pool._leave_queue, waiter)
        assert not moves
        pool._leave_queue(waiter)
        await pool.putconn(conn)

    run(scenario)


def test_a_connect_that_is_cancelled_is_told_to_the_machine():
    async def scenario(pool, server):
        server.mode = Mode.HANGING
        await until(lambda: pool._connects)
        for _ in range(5):  # steps: it has begun
            await asyncio.sleep(0)
        for task in list(pool._connects):
            task.cancel()
        await until(lambda: pool.stats().open_failures == 1)
        server.mode = Mode.UP

    run(scenario)
