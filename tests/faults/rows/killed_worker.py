"""A worker is killed with -9 in the middle of a statement of ten seconds: when are its locks free?

The server learns of a client's end when it next talks to it, unless it is told to look
(`server_check_interval`).
"""

from __future__ import annotations

import time

import psycopg
from tests.faults.stage import now

TITLE = "a worker killed -9 in a query of 10 s"


async def worker(w, *, conninfo):
    pool = w.pool(conninfo, name="victim")
    async with pool.connection() as conn:
        await w.ask(conn, "select pg_advisory_lock(4711)")
        print("locked", flush=True)
        await w.ask(conn, "select pg_sleep(10)")


async def play(w):
    server = w.server()
    victim = w.process("killed_worker", conninfo=server.conninfo())
    assert victim.line() == "locked"
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        wait_for(conn, "select 1 from pg_stat_activity where query = 'select pg_sleep(10)'")
        victim.kill()
        killed = now()
        wait_for(conn, "select 1 where pg_try_advisory_lock(4711)")
        w.seconds("locks free after", now() - killed, at_most=1.0, fails_at=8.0)


def wait_for(conn, query):
    while not conn.execute(query).fetchall():
        time.sleep(0.005)
