"""Forks of processes whose asyncio pool is busy: nothing is shared, nobody is disturbed.

A child runs a loop of its own, in which the inherited pool opens anew; the parent's tasks go on.
"""

from __future__ import annotations

import asyncio
import os

import psycopg
import pytest
from tests.forks import Child, libc_fork, until

from penstock import AsyncConnectionPool

LOOPS = ["asyncio", "uvloop"]
DRIVERS = ["psycopg", "asyncpg"]


def run(loop, coroutine):
    factory = None
    if loop == "uvloop":
        factory = pytest.importorskip("uvloop", reason="needs uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine)


async def ask(pool, driver, number):
    """The number back, and which session said so."""
    async with pool.connection() as conn:
        if driver == "asyncpg":
            row = await conn.fetchrow("select $1::int, pg_backend_pid(), pg_sleep(0.001)", number)
        else:
            query = "select %s::int, pg_backend_pid(), pg_sleep(0.001)"
            row = await (await conn.execute(query, (number,))).fetchone()
        return row[0], row[1]


async def ask_often(pool, driver, times):
    """The sessions that answered; every answer must be right."""
    found = set()
    for number in range(times):
        said, pid = await ask(pool, driver, number)
        assert said == number
        found.add(pid)
    return found


def in_child(pool, driver, loop, generations):
    """What a child does: 4 tasks on a pool of 2, and a child of its own."""

    async def work():
        found = await asyncio.gather(*[ask_often(pool, driver, 5) for _ in range(4)])
        sessions = set().union(*found)
        below = []
        if generations > 1:
            grandchild = Child(lambda: in_child(pool, driver, loop, generations - 1))
            answer = asyncio.get_running_loop().run_in_executor(None, grandchild.answer)
            await ask_often(pool, driver, 5)
            below = await answer
        await pool.close()
        return [*sessions, *below]

    return run(loop, work())


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_children_and_grandchildren_of_a_busy_loop_share_nothing(server, driver, loop):
    pool = AsyncConnectionPool(
        server.conninfo(), driver=driver, min_size=2, max_size=2, name="forked"
    )

    async def parent():
        await pool.open(wait=True)
        stop = asyncio.Event()

        async def hammer():
            found = set()
            while not stop.is_set():
                found |= await ask_often(pool, driver, 3)
            return found

        tasks = [asyncio.create_task(hammer()) for _ in range(6)]
        answers = []
        for _ in range(5):
            await asyncio.sleep(0)
            child = Child(lambda: in_child(pool, driver, loop, 2))
            answers.append(await asyncio.get_running_loop().run_in_executor(None, child.answer))
        stop.set()
        mine = set().union(*await asyncio.gather(*tasks))
        stats = pool.stats()
        await pool.close()
        return mine, answers, stats

    mine, answers, stats = run(loop, parent())
    assert len(mine) == 2, "the parent's sessions were the same all the time"
    assert (stats.size, stats.orphaned, stats.open_failures) == (2, 0, 0)
    for answer in answers:
        assert not mine & set(answer)
    everybody = [pid for answer in answers for pid in answer]
    assert len(everybody) == len(set(everybody)), "no two processes shared a session"
    # A server process needs milliseconds to end.
    until(lambda: not sessions_of(server, [*mine, *everybody]), "no session outlives its process")


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("fork", [os.fork, libc_fork], ids=["with hooks", "without hooks"])
def test_a_master_that_left_its_pool_open_forks_workers(server, driver, fork):
    """As under --preload: the master's loop has ended, the pool was not closed."""
    pool = AsyncConnectionPool(server.conninfo(), driver=driver, max_size=2, name="preloaded")

    async def look():
        return (await ask(pool, driver, 1))[1]

    async def work():
        async with pool.connection():
            pass
        return sorted(await ask_often(pool, driver, 5))

    kept = asyncio.new_event_loop()
    try:
        master = kept.run_until_complete(look())
        children = [Child(lambda: asyncio.run(work()), fork=fork) for _ in range(3)]
        answers = [child.answer() for child in children]
        assert not {master} & {pid for answer in answers for pid in answer}
        assert kept.run_until_complete(look()) == master, "its session lives"
        until(lambda: not sessions_of(server, [pid for answer in answers for pid in answer]))
        kept.run_until_complete(pool.close())
    finally:
        kept.close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_lease_held_over_a_fork_is_the_parents(server, driver):
    pool = AsyncConnectionPool(server.conninfo(), driver=driver, max_size=1, name="held")

    async def parent():
        async with pool.connection(transaction=driver == "asyncpg") as conn:
            await conn.execute("create temporary table held (n int)")

            def work():
                async def use():
                    try:
                        await conn.execute("insert into held values (1)")
                    except Exception as error:
                        return f"{type(error).__name__}: {error}"
                    return "it could be used"

                return asyncio.run(use())

            said = await asyncio.get_running_loop().run_in_executor(None, Child(work).answer)
            await conn.execute("insert into held values (2)")
        rows = (await pool.execute("select n from held")).fetchall()
        await pool.close()
        return said, [tuple(row) for row in rows]

    said, rows = asyncio.run(parent())
    assert "before the fork" in said or "given back" in said, said
    assert rows == [(2,)]


def sessions_of(server, pids):
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        query = "select pid from pg_stat_activity where pid = any(%s)"
        return [pid for (pid,) in conn.execute(query, (list(pids),))]
