"""`asyncio.run` ends at once and in silence, whatever a pool was doing, and no session stays.

One job: programs that leave a pool unclosed in the middle of something, on a real server; a server
that accepts a connection and never answers; a name that is never resolved. All of one driver's and
loop's run one after the other in a process of their own, with every warning shown.

How long a connect may take is set to minutes there: who waited for it would be noticed by the deadline.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import penstock

DEADLINE = 60.0  # seconds for everything in one process; a failure's price

PROGRAM = """
import asyncio, gc, socket, sys, threading
import penstock._pool.aio.dedicated, penstock._pool.aio.executor
from penstock import AsyncConnectionPool

driver, loop, conninfo = sys.argv[1:]
for module in (penstock._pool.aio.dedicated, penstock._pool.aio.executor):
    module.CONNECT_SECONDS = 300.0
if loop == "uvloop":
    import uvloop
factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop

def pool_of(address=conninfo, **options):
    return AsyncConnectionPool(address, **{"driver": driver, "name": "endings", "timeout": 300, **options})

async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)

def begin(coro):
    task = asyncio.ensure_future(coro)
    kept.append(task)
    return task

kept = []

async def idle_connections():
    pool = pool_of(min_size=3)
    kept.append(pool)
    await pool.open(wait=True)

async def a_pool_that_was_dropped():
    await pool_of().execute("select 1")
    gc.collect()

async def a_pool_that_was_closed():
    pool = pool_of(min_size=2)
    await pool.open(wait=True)
    await pool.close()
    kept.append(pool)

async def a_lease_that_is_held():
    pool = pool_of(max_size=2)
    kept.append(pool)
    lease = pool.connection()
    conn = await lease.__aenter__()
    await conn.execute("begin" if driver == "asyncpg" else "select 1")

async def a_statement_under_way():
    pool = pool_of(max_size=2)
    kept.append(pool)
    begin(pool.execute("select pg_sleep(300)"))
    await until(lambda: pool.stats().in_use == 1)
    await asyncio.sleep(0.02)

async def a_transaction_and_somebody_who_waits():
    pool = pool_of(max_size=1)
    kept.append(pool)
    async def work():
        async with pool.connection() as conn:
            await conn.execute("begin" if driver == "asyncpg" else "select 1")
            await asyncio.Event().wait()
    begin(work())
    await until(lambda: pool.stats().in_use == 1)
    begin(pool.execute("select 1"))
    await until(lambda: pool.stats().waiting == 1)

async def a_connect_to_a_server_that_says_nothing():
    listening = socket.create_server(("127.0.0.1", 0))
    kept.append(listening)
    port = listening.getsockname()[1]
    pool = pool_of(f"host=127.0.0.1 port={port} user=x dbname=x connect_timeout=300")
    kept.append(pool)
    begin(pool.execute("select 1"))
    await until(lambda: pool.stats().opening == 1)
    listening.setblocking(False)
    async def has_sent_what_comes_first():
        accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
        kept.append(accepted)
        await asyncio.get_running_loop().sock_recv(accepted, 1)
    await has_sent_what_comes_first()
    async def dedicated():
        async with pool.dedicated():
            pass
    begin(dedicated())
    # Sooner, asyncpg has a future that nobody would look at: it says so when it is freed.
    await has_sent_what_comes_first()

async def a_name_that_is_never_resolved():
    never, asked = threading.Event(), threading.Event()
    def hang(*args, **options):
        if options.get("flags", 0) & socket.AI_NUMERICHOST:  # nobody is asked
            return real(*args, **options)
        asked.set()
        never.wait()
    real, socket.getaddrinfo = socket.getaddrinfo, hang
    try:
        pool = pool_of("host=never.invalid user=x dbname=x connect_timeout=300")
        kept.append(pool)
        begin(pool.execute("select 1"))
        await until(asked.is_set)
    finally:
        socket.getaddrinfo = real

for case in (
    idle_connections, a_pool_that_was_dropped, a_pool_that_was_closed, a_lease_that_is_held,
    a_statement_under_way, a_transaction_and_somebody_who_waits,
    a_connect_to_a_server_that_says_nothing, a_name_that_is_never_resolved,
):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(case())
    print(case.__name__, flush=True)
    assert sys.stdin.readline() == "go on\\n"
    for each in kept:
        if isinstance(each, socket.socket):
            each.close()
    kept.clear()
    gc.collect()
"""

CASES = [
    *("idle_connections", "a_pool_that_was_dropped", "a_pool_that_was_closed"),
    *("a_lease_that_is_held", "a_statement_under_way", "a_transaction_and_somebody_who_waits"),
    *("a_connect_to_a_server_that_says_nothing", "a_name_that_is_never_resolved"),
]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_asyncio_run_ends_in_silence_and_leaves_no_session(server, driver, loop):
    child = subprocess.Popen(
        [sys.executable, "-Walways", "-c", PROGRAM, driver, loop, server.conninfo(over="unix")],
        env={"PYTHONPATH": str(Path(penstock.__file__).parent.parent), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(DEADLINE, child.kill)
    watchdog.start()
    try:
        with child:
            assert child.stdin is not None and child.stdout is not None
            ended = []
            for name in child.stdout:
                ended.append(name.strip())
                wait_until_gone(server, child.pid, name)
                child.stdin.write("go on\n")
                child.stdin.flush()
            assert child.stderr is not None
            said = child.stderr.read()
    finally:
        watchdog.cancel()
    assert said == ""
    assert ended == CASES
    assert child.returncode == 0


def wait_until_gone(server, pid, what):
    """Until the server has no session of this process: one needs 2 to 3 ms to end."""
    count = f"select count(*) from pg_stat_activity where application_name like '%/endings/{pid}'"
    deadline = time.monotonic() + DEADLINE / 4
    while int(server.psql(count)):
        assert time.monotonic() < deadline, f"{what.strip()}: a session stays"
