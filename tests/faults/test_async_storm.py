"""Ten thousand cancellations at random times: nothing is lost, nobody gets another one's answer.

One job: borrowers on asyncio that are cancelled while they borrow, query and give back, through each
driver, on a real server; and what the pool and the server have afterwards. In the suite there are fewer
through psycopg, where a cancelled statement costs three times as much; ``PENSTOCK_CANCELS=10000`` asks
for so many through each, and has the figures printed.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import Any

import pytest

from penstock import AsyncConnectionPool

ASKED_FOR = int(os.environ.get("PENSTOCK_CANCELS", "0"))
POOL = 6
BORROWERS = 16

#: How long after it has come to this a borrower is cancelled at the latest, in seconds; some are
#: through by then.
LATEST = {"borrow": 0.005, "query": 0.002, "return": 0.001}

#: How long anything may take in the end: a failure's price.
PATIENCE = 60.0


class Storm:
    """Borrowers, where they stood when they were struck, and what they were told."""

    def __init__(self, pool, rng, driver, cancels):
        self.pool = pool
        self.rng = rng
        self.wants: dict[str, Any] = {"transaction": True} if driver == "asyncpg" else {}
        self.driver = driver
        self.cancels = cancels
        self.numbers = 0
        self.struck: Counter[str] = Counter()
        self.served = 0
        self.wrong: list[Any] = []

    async def ask(self, conn, query, params=()):
        if self.driver == "asyncpg":
            return [tuple(row) for row in await conn.fetch(query, *params)]
        cursor = await conn.execute(query.replace("$1", "%s").replace("$2", "%s"), params)
        return await cursor.fetchall() if cursor.description else []

    async def borrow(self, fate):
        """One borrower, who is struck as his fate is."""
        self.numbers += 1
        number = self.numbers
        fate.comes_to("borrow")
        async with self.pool.connection(**self.wants) as conn:
            fate.comes_to("query")
            kind = self.rng.random()
            if kind < 0.1:  # slow
                query = "select $1::int from pg_sleep($2::float)"
                answer = await self.ask(conn, query, (number, self.rng.uniform(0, 0.004)))
            elif kind < 0.3:  # both or none
                for half in ("one", "two"):
                    await self.ask(conn, "insert into storm values ($1::int, $2)", (number, half))
                answer = [(number,)]
            else:
                answer = await self.ask(conn, f"select {number}")
            if answer != [(number,)]:
                self.wrong.append((number, answer))
            fate.comes_to("return")
        self.served += 1

    async def strike(self):
        """One borrower, and a cancellation that comes when it comes."""
        fate = Fate(self.rng)
        task = asyncio.create_task(self.borrow(fate))
        try:
            await asyncio.wait({task})
        finally:
            for timer in fate.timers:
                timer.cancel()
        if task.cancelled():
            self.struck[fate.place] += 1
        else:
            task.result()

    async def go_on(self):
        while self.struck.total() < self.cancels:
            await self.strike()


class Fate:
    """Where and when one borrower is cancelled; one in ten is cancelled twice."""

    def __init__(self, rng):
        self.timers: list[Any] = []
        self.place = ""
        self._rng = rng
        self._chosen = rng.choice(list(LATEST))

    def comes_to(self, place):
        self.place = place
        if place == self._chosen:
            for _ in range(1 + (self._rng.random() < 0.1)):
                seconds = self._rng.uniform(0, LATEST[place])
                task, loop = asyncio.current_task(), asyncio.get_running_loop()
                assert task is not None
                self.timers.append(loop.call_later(seconds, task.cancel))


async def until(condition, pool):
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  the server tells nobody
            await asyncio.sleep(0.005)
    return pool


@pytest.mark.parametrize(("driver", "cancels"), [("psycopg", 4000), ("asyncpg", 10000)])
def test_cancelled_at_random_times_nothing_is_lost_and_nobody_gets_a_wrong_answer(
    server, rng, driver, cancels, capsys
):
    server.psql("drop table if exists storm; create table storm (number int, half text)")
    unseen: list[Any] = []

    async def storm():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, told: unseen.append(told))
        async with AsyncConnectionPool(
            server.conninfo(over="unix"),
            driver=driver,
            name=f"storm-{driver}",
            min_size=POOL,
            max_size=POOL,
            timeout=PATIENCE,
        ) as pool:
            await pool.open(wait=True)
            going = Storm(pool, rng, driver, ASKED_FOR or cancels)
            async with asyncio.TaskGroup() as group:
                for _ in range(BORROWERS):
                    group.create_task(going.go_on())
            await check_whole(pool, going)
            return going, pool.stats()

    going, stats = asyncio.run(storm())
    assert not unseen, unseen
    alone = "select count(*) from (select number from storm group by 1 having count(*) <> 2) x"
    assert server.psql(alone, "postgres", "-At").strip() == "0"
    with capsys.disabled():
        if ASKED_FOR:
            print(f"\n{driver}: {dict(going.struck)} struck, {going.served} served, {stats}")


async def check_whole(pool, going):
    """All of the pool is there, and answers; the server has its sessions and no others."""

    async def at_rest():
        stats = pool.stats()
        others = stats.in_use + stats.waiting + stats.pinging + stats.opening + stats.closing
        return others == 0 and stats.size == POOL

    await until(at_rest, pool)
    assert not going.wrong
    assert pool.stats().orphaned == 0, "it took the garbage collector"
    assert pool.stats().timeouts == 0
    least = going.struck.total() / 20
    assert all(going.struck[place] > least for place in ("borrow", "query", "return")), going.struck
    conns = [await pool.getconn(timeout=PATIENCE) for _ in range(POOL)]
    for number, conn in enumerate(conns):
        assert await going.ask(conn, f"select {number}") == [(number,)]
    for conn in conns:
        if going.driver == "psycopg":
            await conn.rollback()
        await pool.putconn(conn)

    async def sessions_are_the_pools():
        query = (
            "select count(*) from pg_stat_activity "
            f"where application_name like '%/{pool.name}/%' and pid <> pg_backend_pid()"
        )
        return (await pool.execute(query)).fetchall()[0][0] == POOL - 1

    await until(sessions_are_the_pools, pool)
    assert pool.stats().size == POOL
