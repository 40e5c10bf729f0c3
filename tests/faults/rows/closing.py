"""`close()` while borrowers are inside and connects are under way; the interpreter's end with an open pool."""

from __future__ import annotations

import time
from typing import Any

from tests.faults.stage import now

TITLE = "close and interpreter exit, borrowers inside, connects under way"
TIMEOUT = 1.0
KEPT: list[Any] = []  # until the interpreter ends


async def worker(w, *, conninfo, silent):
    """Ends with one connection lent, one idle, others being opened at a server that says nothing."""
    pool = w.pool(conninfo, min_size=2, max_size=8, timeout=None, name="exits")
    w.forget(pool)
    await pool.open(wait=True)
    lease = pool.connection()
    await lease.__aenter__()
    mute = w.pool(silent, min_size=4, max_size=4, timeout=None, name="mute")
    w.forget(mute)
    await mute.open()
    await w.until(lambda: mute.stats().opening, "connects under way")
    KEPT.extend([pool, mute, lease])
    print("ending", flush=True)
    return time.time()


async def play(w):
    server = w.server()
    proxy = w.proxy(server.port)
    conninfo = server.conninfo(port=proxy.port)
    await closes(w, conninfo, proxy)

    proxy.say_nothing()
    child = w.process("closing", conninfo=server.conninfo(), silent=conninfo)
    assert child.line() == "ending"
    began = now()
    await w.aside(lambda: child.process.wait(60))
    w.seconds("the interpreter's end", now() - began, at_most=1.0)
    w.count("exit status", child.process.returncode, exactly=0)


async def closes(w, conninfo, proxy):
    pool = w.pool(conninfo, max_size=8, timeout=20, name="closes")
    inside, may_end = [], w.runtime.event()

    async def stay(number):
        async with pool.connection():
            inside.append(number)
            await w.runtime.wait_for(may_end)

    staying = w.crowd(3, stay)
    await w.until(lambda: len(inside) == 3, "three are inside")
    proxy.say_nothing()
    waiting = w.crowd(3, lambda _number: w.borrow(pool))
    await w.until(lambda: pool.stats().opening and pool.stats().waiting == 3, "connects under way")
    began = now()
    await pool.close(timeout=TIMEOUT)
    took = now() - began
    refused = await waiting.all()
    may_end.set()
    await staying.all()
    proxy.release()
    w.seconds(f"close(timeout={TIMEOUT:g})", took, at_most=TIMEOUT + 0.25)
    w.count("who waited: without an error", sum(each.good for each in refused), exactly=0)
    w.seconds("who waited: told after", max(each.over for each in refused) - began, at_most=0.25)
    await w.until(lambda: pool.stats().size == 0, "nothing left")
