"""A server that says nothing to the first connects and answers later ones: nobody waits for the first to end.

Judged by the order: all are served while the first connects are still not answered.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.faults.proxy import FaultProxy

from penstock import ConnectionPool
from penstock._pool.aio.pool import AsyncConnectionPool

BORROWERS, SIZE = 8, 10
#: The first wave before anything was heard, of a pool of this size.
FIRST = 7


@pytest.fixture
def mute(server):
    with FaultProxy("127.0.0.1", server.port) as proxy:
        proxy.say_nothing()
        yield proxy
        proxy.release()


def test_threads_are_served_while_the_first_connects_are_not_answered(server, mute):
    def borrow(_number: int) -> int:
        with pool.connection() as conn:
            row = conn.execute("select 1").fetchone()
            assert row == (1,)
            opening: int = pool.stats().opening
            return opening

    with (
        ConnectionPool(
            server.conninfo(port=mute.port), max_size=SIZE, timeout=8.0, name="mute"
        ) as pool,
        ThreadPoolExecutor(BORROWERS) as crowd,
    ):
        tries = [crowd.submit(borrow, number) for number in range(BORROWERS)]
        _until_probed(mute)
        mute.answer_new()
        assert min(each.result(30) for each in tries) >= FIRST, "the first connects were over"
        assert pool.health().ready
        mute.release()


def _until_probed(mute: FaultProxy) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if len(mute.arrivals()) > FIRST:
            return
        pause.wait(0.01)
    raise AssertionError("nothing is tried beside connects that are not answered")


@pytest.mark.parametrize("driver", ["asyncpg"])
def test_tasks_are_served_while_the_first_connects_are_not_answered(server, mute, driver):
    async def borrow(pool) -> int:
        async with pool.connection() as conn:
            assert await conn.fetchval("select 1") == 1
            opening: int = pool.stats().opening
            return opening

    async def play() -> None:
        async with AsyncConnectionPool(
            server.conninfo(port=mute.port),
            driver=driver,
            max_size=SIZE,
            timeout=8.0,
            name="mute",
        ) as pool:
            tries = [asyncio.ensure_future(borrow(pool)) for _ in range(BORROWERS)]
            await asyncio.to_thread(_until_probed, mute)
            mute.answer_new()
            assert min(await asyncio.gather(*tries)) >= FIRST, "the first connects were over"
            assert pool.health().ready
            mute.release()

    asyncio.run(play())
