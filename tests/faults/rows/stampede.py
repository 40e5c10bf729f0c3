"""Two hundred borrowers at once on a pool that has nothing yet, and each connect takes 200 ms.

Connects under way serve nobody: who comes back first with a connection serves the next. Compared with
the driver's own pool in the same run, where it has one.
"""

from __future__ import annotations

from typing import Any

from tests.contract.runtimes import AsAsync
from tests.faults.stage import now

TITLE = "200 borrowers at once, connect takes 200 ms, max_size 20"
BORROWERS, SIZE, CONNECT = 200, 20, 0.2


async def play(w):
    proxy = w.proxy(w.server().port)
    conninfo = w.server().conninfo(port=proxy.port)
    proxy.slow_connect(CONNECT)
    ours, theirs = [], []
    for _ in range(5 if w.long else 1):
        pool = w.pool(conninfo, max_size=SIZE, timeout=20, name="stampede")
        ours.append(await stampede(w, pool, proxy))
        await pool.close()
        if peer := await peer_of(w, conninfo):
            theirs.append(await stampede(w, peer, proxy))
            await peer.close()
    p99, connects = min(ours)
    w.figure(
        "connects", max(number for _, number in ours), goal="<= 18", met=connects <= 18, holds=True
    )
    if not theirs:
        w.figure("p99", f"{p99:.3f} s", goal="-", met=True, holds=p99 < 15)
        return
    best, number = min(theirs)
    w.figure("p99 of the peer", f"{best:.3f} s, {number} connects", goal="-", met=True)
    w.figure(
        "p99",
        f"{p99:.3f} s, {p99 / best:.2f}",
        goal="<= 1.05 of the peer",
        met=p99 <= 1.05 * best,
        holds=p99 < 15,
    )


async def stampede(w, pool, proxy):
    """The 99th percentile of the time to a connection, and how many were opened."""
    before = len(proxy.arrivals())
    gate = w.runtime.event()
    ready = []

    async def body(number):
        ready.append(number)
        await w.runtime.wait_for(gate)
        began = now()
        async with pool.connection() as conn:
            took = now() - began
            await w.ask(conn, "select 1")
        return took

    crowd = w.crowd(BORROWERS, body)
    await w.until(lambda: len(ready) == BORROWERS, "all stand at the gate")
    gate.set()
    waits = sorted(await crowd.all())
    return waits[BORROWERS * 99 // 100 - 1], len(proxy.arrivals()) - before


async def peer_of(w, conninfo):
    """A pool that grows as far, of the driver's own library; it has nothing yet, either.

    psycopg_pool begins to connect when it is opened, so with min_size=1 it would have a start of the time that
    it takes to make the crowd.
    """
    options: Any = {"min_size": 0, "max_size": SIZE, "timeout": 20.0, "open": False}
    pool: Any = None  # psycopg2's own never waits: 180 of 200 borrowers would have an error
    if w.driver == "psycopg":
        import psycopg_pool

        if w.runtime.asynchronous:
            pool = psycopg_pool.AsyncConnectionPool(conninfo, **options)
        else:
            pool = AsAsync(psycopg_pool.ConnectionPool(conninfo, **options))
        await pool.open()
    if w.driver == "asyncpg":
        pool = Asyncpg(await asyncpg_pool(conninfo))
    return pool


async def asyncpg_pool(conninfo):
    import asyncpg
    from psycopg.conninfo import conninfo_to_dict

    words: Any = conninfo_to_dict(conninfo)
    return await asyncpg.create_pool(
        host=words["host"],
        port=int(words["port"]),
        user=words["user"],
        database=words["dbname"],
        ssl=False,
        min_size=0,
        max_size=SIZE,
    )


class Asyncpg:
    """asyncpg's pool, spelled like the others."""

    def __init__(self, pool):
        self.connection = pool.acquire
        self.close = pool.close
