"""The address changes, the password changes, the process is stopped for a while and goes on.

Where to connect and with which password is asked for at each connect (`conninfo` and `kwargs` may be callables).
A process that is stopped finds on its return what happened meanwhile.
"""

from __future__ import annotations

import signal

from tests.faults.stage import now

from penstock.launcher import HBA

TITLE = "address change, password rotation, stopped and continued"
STOPPED = 1.0


async def worker(w, *, conninfo, seconds):
    """Borrows every 20 ms, and tells when it had its first answer after a pause of more than half a second."""
    pool = w.pool(conninfo, min_size=2, name="stopped")
    await pool.open(wait=True)
    print("ready", flush=True)
    errors, late, ends = [], 0.0, now() + seconds
    while (began := now()) < ends:
        this = await w.borrow(pool, "select 1")
        errors += [] if this.good else [repr(this.error)]
        await w.pause(0.02)
        if now() - began > STOPPED / 2:
            late = (await w.borrow(pool, "select 1")).took
    return {"errors": errors, "late": late}


async def play(w):
    await new_address(w)
    await new_password(w)
    await stopped(w)


async def new_address(w):
    first, second = w.fresh_server(), w.server()
    where = [first.conninfo()]
    pool = w.pool(lambda: where[0], min_size=4, timeout=5, name="moves")
    await pool.open(wait=True)
    where[0] = second.conninfo()
    await w.aside(first.close)
    await w.until(lambda: pool.stats().closed.get("hung up", 0) >= 4, "all hang-ups heard")
    tries = [await w.borrow(pool, "select 1") for _ in range(20)]
    errors = sum(not each.good for each in tries)
    w.count("address: errors of 20 borrows", errors, exactly=0)
    w.seconds("address: longest borrow", max(each.took for each in tries), at_most=1.0)
    await pool.close()


async def new_password(w):
    server = w.fresh_server(hba=("host all rotates 127.0.0.1/32 scram-sha-256", *HBA))
    server.execute("create role rotates login password 'old'")
    words = {"password": "old"}
    conninfo = server.conninfo(user="rotates")
    pool = w.pool(conninfo, kwargs=lambda: dict(words), max_size=4, timeout=5, name="rotates")
    await w.borrow(pool, "select 1")
    server.execute("alter role rotates password 'new'")
    server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotates'"
    )
    await w.until(lambda: pool.stats().closed.get("hung up", 0), "it was heard")
    refused = await w.borrow(pool, "select 1")
    w.figure("password: the old one", type(refused.error).__name__, goal="-", met=not refused.good)
    words["password"] = "new"
    rotated = now()
    while not (await w.borrow(pool, "select 1")).good:
        await w.pause(0.02)
    w.seconds("password: served after the new one is there", now() - rotated, at_most=1.5)
    await pool.close()


async def stopped(w):
    server = w.fresh_server()
    child = w.process("things_move", conninfo=server.conninfo(), seconds=STOPPED + 1.5)
    assert child.line() == "ready"
    await w.pause(0.2)
    child.process.send_signal(signal.SIGSTOP)
    await w.aside(server.restart)
    await w.pause(STOPPED)
    child.process.send_signal(signal.SIGCONT)
    told = await w.aside(child.answer)
    # One may have been between two messages when it was stopped.
    w.count("stopped, server restarted meanwhile: errors", len(told["errors"]), at_most=1)
    w.seconds("stopped: served after it goes on", told["late"], at_most=1.0)
