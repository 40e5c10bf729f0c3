"""What only asyncio has: loops that a pool belongs to, task groups, scopes, and their ends.

One job: the promises of `AsyncConnectionPool` beside those that all pools make, over a server that does
as it is told. Endings of processes are in tests/faults/test_async_endings.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
from importlib.util import find_spec

import pytest

from penstock import AsyncConnectionPool, MisuseError, PenstockError, PoolTimeout
from penstock.testing import AsyncFakeDriver, FakeServer, Mode
from tests.contract.runtimes import PATIENCE, Asyncio, Eager, Uvloop

#: Where uvloop is missing, test_contract.py says so.
LOOPS = [Asyncio, *([Uvloop] if find_spec("uvloop") else []), *([Eager] if Eager.there else [])]


@pytest.fixture
def fake():
    with FakeServer() as server:
        yield server


@pytest.fixture
def pool(fake):
    return AsyncConnectionPool(
        driver=AsyncFakeDriver(fake), name="shop", max_size=2, timeout=PATIENCE
    )


@pytest.fixture(params=LOOPS, ids=lambda kind: kind.name)
def runtime(request):
    return request.param()


@pytest.fixture
def run(runtime):
    """Runs a coroutine on a loop of its own; nothing may be left of it."""
    return runtime.run


@pytest.fixture
def loop_factory(runtime):
    return runtime.loop_factory


async def check_whole(pool, fake):
    """All of it can be borrowed at once; what is idle is all that the server has."""
    conns = [await pool.getconn() for _ in range(pool.stats().max_size)]
    assert len({id(conn) for conn in conns}) == len(conns)
    for conn in conns:
        cursor = await conn.execute("select 1")
        assert await cursor.fetchall() == [(1,)]
        await conn.rollback()
        await pool.putconn(conn)
    stats = pool.stats()
    assert (stats.idle, stats.in_use, stats.waiting) == (stats.max_size, 0, 0)
    assert stats.orphaned == 0
    assert len(fake.sessions) == stats.size


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  it is no event
            await asyncio.sleep(0.001)


# -- the loop that a pool belongs to --------------------------------------------------------------


def test_a_pool_is_made_without_a_loop_and_belongs_to_the_first_that_uses_it(pool, fake, run):
    async def use():
        assert (await pool.execute("select 1")).fetchall() == [(1,)]
        await pool.close()

    run(use())
    assert not fake.sessions


def test_a_second_loop_is_told_and_does_no_harm(pool, fake, run):
    told: list[BaseException] = []

    async def intrude():
        for ask in (
            pool.connection().__aenter__,
            pool.getconn,
            pool.dedicated().__aenter__,
            lambda: pool.execute("select 1"),
            pool.open,
            pool.close,
            pool.drain,
            lambda: pool.resize(1, 2),
        ):
            try:
                await ask()
            except MisuseError as error:
                told.append(error)

    async def use():
        await check_whole(pool, fake)
        thread = threading.Thread(target=lambda: asyncio.run(intrude()))
        thread.start()
        await until(lambda: not thread.is_alive())
        await check_whole(pool, fake)
        await pool.close()

    run(use())
    assert len(told) == 8, told
    assert all("loop" in str(error) for error in told)


def test_what_was_borrowed_on_one_loop_is_not_given_back_on_another(pool, fake, run):
    told: list[BaseException] = []

    async def intrude(conn):
        try:
            await pool.putconn(conn)
        except MisuseError as error:
            told.append(error)

    async def use():
        conn = await pool.getconn()
        thread = threading.Thread(target=lambda: asyncio.run(intrude(conn)))
        thread.start()
        await until(lambda: not thread.is_alive())
        await pool.putconn(conn)
        await check_whole(pool, fake)
        await pool.close()

    run(use())
    assert len(told) == 1


def test_after_its_loop_has_ended_a_pool_says_so_until_it_is_closed(pool, fake, run):
    async def use():
        await check_whole(pool, fake)

    async def use_again():
        with pytest.raises(MisuseError, match="loop"):
            await pool.getconn()
        with pytest.raises(MisuseError, match="loop"):
            async with pool.connection():
                pass
        await pool.close()
        await pool.open(wait=True)
        await check_whole(pool, fake)
        await pool.close()

    run(use())
    assert not fake.sessions  # the loop took them along
    run(use_again())
    assert not fake.sessions


def test_a_closed_pool_is_opened_on_another_loop(pool, fake, run):
    async def use():
        await pool.open(wait=True)
        await check_whole(pool, fake)
        await pool.close()

    for _ in range(3):
        run(use())
        assert not fake.sessions
    assert pool.stats().size == 0


def test_a_pool_that_is_not_closed_ends_with_its_loop(pool, fake, run, caplog):
    async def use():
        await check_whole(pool, fake)

    run(use())
    assert not fake.sessions
    assert pool.stats().size == 0
    assert not caplog.text


@pytest.mark.parametrize("mode", [Mode.SLOW, Mode.HANGING, Mode.DOWN])
def test_a_loop_ends_with_a_connect_under_way(pool, fake, loop_factory, mode):
    async def use():
        fake.mode = mode
        with pytest.raises(PenstockError):
            await pool.getconn(timeout=0.01)
        assert pool.stats().opening == (mode is not Mode.DOWN)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(use())
    assert not fake.sessions
    assert pool.stats().size == 0


def test_what_is_lent_beyond_its_loop_ends_when_it_is_dropped_or_the_pool_closed(pool, fake):
    kept = []

    async def use():
        kept.append(pool.connection())
        await kept[0].__aenter__()
        kept.append(await pool.getconn())

    asyncio.run(use())
    kept.pop(0)
    gc.collect()
    assert len(fake.sessions) == 1  # that of getconn() is still held
    asyncio.run(pool.close())
    assert not fake.sessions
    assert pool.stats().size == 0


def test_a_dropped_pool_ends_its_sessions(fake, run):
    async def use():
        pool = AsyncConnectionPool(driver=AsyncFakeDriver(fake), min_size=2)
        await pool.open(wait=True)
        assert len(fake.sessions) == 2
        del pool
        gc.collect()
        await until(lambda: not fake.sessions)

    run(use())


# -- tasks that end each other --------------------------------------------------------------------


def test_a_sibling_that_fails_in_a_task_group_costs_nobody_a_connection(pool, fake, run):
    async def work(number):
        async with pool.connection() as conn:
            await conn.execute(f"select {number}")
            await asyncio.sleep(0)
            if number == 7:
                raise ZeroDivisionError

    async def use():
        for _ in range(20):
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    for number in range(12):
                        group.create_task(work(number))
            await check_whole(pool, fake)
        await pool.close()

    run(use())


def test_a_timeout_of_the_borrowers_own_ends_his_wait_and_not_the_next_ones(pool, fake, run):
    async def use():
        held = [await pool.getconn() for _ in range(2)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pool.getconn()
        assert pool.stats().waiting == 0
        waiter = asyncio.create_task(pool.getconn())
        await until(lambda: pool.stats().waiting == 1)
        await pool.putconn(held.pop())
        held.append(await waiter)
        for conn in held:
            await pool.putconn(conn)
        await check_whole(pool, fake)
        await pool.close()

    run(use())


def test_the_pools_own_timeout_is_told_from_the_borrowers(pool, run):
    async def use():
        held = [await pool.getconn() for _ in range(2)]
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(PoolTimeout):
                await pool.getconn(timeout=0.01)
        for conn in held:
            await pool.putconn(conn)
        await pool.close()

    run(use())


def test_a_timeout_in_the_middle_of_a_statement_costs_no_connection(pool, fake, run):
    async def use():
        await pool.open(wait=True)
        for _ in range(5):
            fake.mode = Mode.HANGING
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005), pool.connection() as conn:
                    await conn.execute("insert")
            fake.mode = Mode.UP
            await until(lambda: pool.stats().in_use == 0)
            await check_whole(pool, fake)
        assert pool.stats().opened == 2  # the reply was read, and the connection kept
        await pool.close()

    run(use())


def test_a_server_that_never_answers_the_rollback_costs_a_connection_and_nobodys_time(
    pool, fake, run, monkeypatch
):
    monkeypatch.setattr("penstock._pool.aio.borrowing.TIDY_SECONDS", 0.05)

    async def use():
        await pool.open(wait=True)
        fake.mode = Mode.HANGING
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.005), pool.connection() as conn:
                await conn.execute("insert")
        await until(lambda: sum(pool.stats().closed.values()) == 1)
        fake.mode = Mode.UP
        await check_whole(pool, fake)
        await pool.close()

    run(use())


def test_anyios_scopes_cancel_again_and_again_and_nothing_is_lost(pool, fake):
    anyio = pytest.importorskip("anyio", reason="anyio is not installed")

    async def work(number, seconds):
        with anyio.move_on_after(seconds):
            async with pool.connection() as conn:
                await conn.execute(f"select {number}")
                await anyio.sleep(seconds / 2)
                await conn.commit()

    async def use():
        for turn in range(5):
            async with anyio.create_task_group() as group:
                for number in range(40):
                    group.start_soon(work, number, 0.0002 * (number % 20))
            async with anyio.create_task_group() as group:
                for number in range(20):
                    group.start_soon(work, number, 1)
                await anyio.sleep(0.001 * turn)
                group.cancel_scope.cancel()
            with anyio.fail_after(PATIENCE):
                while pool.stats().in_use:
                    await anyio.sleep(0.001)
                await check_whole(pool, fake)
        await pool.close()

    anyio.run(use, backend="asyncio")
    assert not fake.sessions


def test_a_shielded_scope_of_anyio_is_a_borrow_like_any_other(pool, fake):
    anyio = pytest.importorskip("anyio", reason="anyio is not installed")

    async def use():
        with anyio.CancelScope() as scope:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                async with pool.connection() as conn:
                    await conn.execute("insert")
        await check_whole(pool, fake)
        await pool.close()

    anyio.run(use, backend="asyncio")
    assert [text for _, text in fake.statements][:2] == ["insert", "COMMIT"]


def test_a_block_that_a_generator_leaves_open_is_given_back_when_it_is_closed(pool, fake, run):
    async def rows():
        async with pool.connection() as conn:
            for number in range(3):
                yield await conn.execute(f"select {number}")

    async def use():
        async for _ in rows():  # left in the middle: the loop closes it
            break
        gc.collect()
        await until(lambda: pool.stats().in_use == 0 and pool.stats().idle)
        going = rows()
        await anext(going)
        await going.aclose()
        await until(lambda: pool.stats().in_use == 0)
        await check_whole(pool, fake)
        await pool.close()

    run(use())


# -- interrupts -----------------------------------------------------------------------------------


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, also where this process was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_keyboard_interrupt_ends_the_program_and_leaves_no_session(pool, fake):
    places: list[str] = []

    async def work():
        async with pool.connection() as conn:
            places.append("borrowed")
            await conn.execute("insert")
            fake.mode = Mode.HANGING
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            await conn.execute("select 1")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
    assert places == ["borrowed"]
    assert not fake.sessions
    assert "COMMIT" not in [text for _, text in fake.statements]


def test_an_interrupt_that_leaves_the_loop_and_a_loop_that_goes_on(pool, fake):
    loop = asyncio.new_event_loop()

    def strike():
        raise KeyboardInterrupt

    async def work(number):
        async with pool.connection() as conn:
            await conn.execute(f"select {number}")
            await asyncio.sleep(0)

    async def crowd():
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(work(number))

    async def check():
        await until(lambda: pool.stats().in_use == 0)
        await check_whole(pool, fake)

    for turns in range(30):
        task = loop.create_task(crowd())
        delays = iter(range(turns))

        def soon(delays=delays):
            if next(delays, None) is None:
                strike()
            loop.call_soon(soon)

        loop.call_soon(soon)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        # Whoever goes on has the work that was struck go on, too.
        loop.run_until_complete(asyncio.wait({task}))
        assert task.exception() is None
        loop.run_until_complete(check())
    loop.run_until_complete(pool.close())
    loop.close()
    assert not fake.sessions


def test_a_reset_that_is_struck_is_not_called_a_second_time(fake):
    calls = []

    async def reset(_conn):
        calls.append("reset")
        raise SystemExit

    async def scenario():
        pool = AsyncConnectionPool(driver=AsyncFakeDriver(fake), max_size=1, reset=reset)
        for number in (1, 2):
            with contextlib.suppress(SystemExit):
                async with pool.connection() as conn:
                    await conn.execute("select 1")
            for _ in range(20):  # whatever the pool's own tasks would do about it
                await asyncio.sleep(0)
            assert len(calls) == number
        assert pool.stats().in_use == 0
        await pool.close()

    asyncio.run(scenario())
    assert not fake.sessions
