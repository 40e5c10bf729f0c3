"""`close()` while borrowers are inside and connects are under way; the interpreter's end, however it comes.

Each end is a process of its own with one connection lent, one in a statement, one held by a borrower beside the main
one, and a second pool whose server says nothing, with connects under way and somebody who waits. Its exit status is the
program's, nothing is printed that is not the program's, and the server has none of its sessions any more.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from tests.contract.runtimes import driven
from tests.faults.stage import now

from penstock import PenstockError, PoolClosed

TITLE = "close and interpreter exit, borrowers inside, connects under way"
KEPT: list[Any] = []  # until the interpreter ends
SLACK = 0.25
CLOSING = 0.5  # the timeout of a close() in an end, in seconds

#: How a program ends, and its exit status.
ENDS = {
    "return": 0,
    "sys.exit": 3,
    "os._exit": 4,
    "an exception": 1,
    "KeyboardInterrupt": -signal.SIGINT,
    "SIGTERM": -signal.SIGTERM,
    "close in a signal handler": 0,
    "close in atexit": 0,
    "borrow in atexit": 0,
    "close in __del__": 0,
    "borrow in __del__": 0,
    "a thread that is no daemon": 0,
}
SHORT = ("an exception", "close in a signal handler")
RAISES = ("an exception", "KeyboardInterrupt")
CLOSE = tuple(end for end in ENDS if end.startswith("close in"))

#: What nobody wants to read when a program has ended, but for an exception of its own.
COMPLAINTS = ("Traceback", "Exception ignored", "was never", "was destroyed", "Fatal Python error")


async def play(w):
    server = w.server()
    proxy = w.proxy(server.port)
    conninfo = server.conninfo(port=proxy.port)
    ways = ("once", "twice", "two at once", "a borrower inside") if w.long else ("once",)
    waited = [await closes(w, how, conninfo, proxy) for how in ways]
    unnamed, told = map(max, zip(*waited, strict=True))
    w.count("who waited: without PoolClosed", unnamed, exactly=0)
    w.seconds("who waited: told after", told, at_most=SLACK)
    await dropped(w, server)
    proxy.say_nothing()
    await ends(w, server, conninfo)


# -- close() --------------------------------------------------------------------------------------


async def closes(w, how, conninfo, proxy):
    """How many of those who waited were not told that it is closed, and when the last of them was told."""
    timeout = 1.0 if w.long else 0.3
    pool = w.pool(conninfo, max_size=8, timeout=20, name="closes")
    inside, may_end, insider = [], w.runtime.event(), w.runtime.event()

    async def stay(number):
        async with pool.connection():
            inside.append(number)
            await w.runtime.wait_for(insider if number == 0 else may_end)
            if number == 0 and how == "a borrower inside":
                await close()

    async def close(_number=0):
        await pool.close(timeout=timeout)
        return now()

    staying = w.crowd(3, stay)
    await w.until(lambda: len(inside) == 3, "three are inside")
    proxy.say_nothing()
    waiting = w.crowd(3, lambda _number: w.borrow(pool))
    await w.until(lambda: pool.stats().opening and pool.stats().waiting == 3, "connects under way")
    began = now()
    if how == "a borrower inside":
        insider.set()
        await w.until(lambda: pool.stats().in_use == 2, "he has closed it, and left")
        ended = now()
    else:
        ended = max(await w.crowd(2 if how == "two at once" else 1, close).all())
        if how == "twice":
            ended = await close()
    refused = await waiting.all()
    insider.set()
    may_end.set()
    await staying.all()
    proxy.release()
    w.seconds(f"close(timeout={timeout:g}), {how}", ended - began, at_most=timeout + SLACK)
    await w.until(lambda: pool.stats().size == 0, "nothing left")
    unnamed = sum(not isinstance(each.error, PoolClosed) for each in refused)
    return unnamed, max(each.over for each in refused) - began


async def dropped(w, server):
    """A pool that nobody holds any more, and nobody has closed."""
    pool = w.pool(server.conninfo(), min_size=4, name="dropped")
    await pool.open(wait=True)
    w.forget(pool)
    del pool
    gc.collect()
    took = await gone(w, server, "dropped")
    w.seconds("dropped without close(): its sessions end after", took, at_most=1.0)


async def gone(w, server, like):
    """Seconds until there is no such session any more; 30 where they stay."""
    began = now()
    query = f"select count(*) from pg_stat_activity where application_name like '%/{like}%'"
    while now() < began + 30:
        ((found,),) = await w.aside(lambda: server.execute(query))
        if not int(found):
            return now() - began
        await w.pause(0.01)
    return 30.0


# -- the interpreter's end ------------------------------------------------------------------------


async def ends(w, server, silent):
    seen = {}
    for end in (each for each in (ENDS if w.long else SHORT) if is_for(w, each)):
        seen[end] = await one_end(w, server, silent, end)
        if seen[end].took > limit_of(end):  # the machine may have been busy: what hangs hangs again
            seen[end] = seen[end].or_better(await one_end(w, server, silent, end))
    for what, ways in (
        ("the interpreter's end", [end for end in seen if end not in CLOSE]),
        ("with a close() in it", [end for end in seen if end in CLOSE]),
    ):
        longest(w, f"{what}: longest", {end: seen[end].took for end in ways}, limit_of(ways[0]))
    longest(w, "ends: its sessions are gone after", {e: seen[e].gone for e in seen}, 1.0)
    for what, bad in (
        ("exit status not the program's", [end for end in seen if seen[end].status != ENDS[end]]),
        ("something printed that is not the program's", [e for e in seen if seen[e].complaints]),
    ):
        w.figure(f"ends: {what}", "; ".join([str(len(bad)), *bad]), goal="0", met=not bad)


def limit_of(end):
    """A second; what the program has asked for comes on top."""
    return 1.0 + (end in CLOSE) * CLOSING


def longest(w, what, times, limit):
    took, end = max((took, end) for end, took in times.items())
    w.figure(
        what, f"{took:.3f} s ({end})", goal=f"<= {limit:g} s", met=took <= limit, holds=took < 30
    )


class Ended(NamedTuple):
    """Seconds until the process has ended, and its sessions then; what it said."""

    took: float
    gone: float
    status: int
    complaints: int

    def or_better(self, other):
        return Ended(
            min(self.took, other.took),
            min(self.gone, other.gone),
            other.status,
            max(self.complaints, other.complaints),
        )


async def one_end(w, server, silent, end):
    child = w.process("closing", quiet=True, conninfo=server.conninfo(), silent=silent, end=end)
    while child.line() != "ending":
        assert child.process.poll() is None, (end, child.errors())
    began = now()
    try:
        await w.aside(lambda: child.process.wait(30))
    except subprocess.TimeoutExpired:
        child.process.send_signal(signal.SIGABRT)  # faulthandler tells where it stands
        await w.aside(child.process.wait)
    took, told, status = now() - began, child.errors(), child.process.returncode
    complaints = sum(told.count(word) for word in COMPLAINTS) - (end in RAISES)
    if complaints or status != ENDS[end]:
        print(f"{end}: {told}", file=sys.stderr)
    return Ended(took, await gone(w, server, f"%/{child.process.pid}"), status, complaints)


def is_for(w, end):
    """What is awaited cannot be in `__del__`, and tasks are no threads."""
    return not w.runtime.asynchronous or end not in (
        "close in __del__",
        "borrow in __del__",
        "a thread that is no daemon",
    )


async def worker(w, *, conninfo, silent, end):
    """The program: everything under way, and then the end."""
    faulthandler.enable()
    pool = w.pool(conninfo, min_size=2, max_size=8, timeout=3, name="exits")
    mute = w.pool(silent, min_size=4, max_size=4, timeout=None, name="mute")
    for each in (pool, mute):
        w.forget(each)
    await pool.open(wait=True)
    lease = pool.connection()
    await lease.__aenter__()
    KEPT.extend([pool, mute, lease])
    # No shorter than the longest end: who is inside is inside.
    w.spawn(w.borrow(pool, "select pg_sleep(30)"))
    w.spawn(w.borrow(pool, hold=30.0))
    w.spawn(w.borrow(mute))
    await w.until(lambda: pool.stats().in_use == 3, "two are inside")
    await w.until(lambda: mute.stats().opening and mute.stats().waiting, "connects under way")
    if end not in ("a thread that is no daemon", "close in a signal handler"):
        print("ending", flush=True)
    await Ending(w, pool, mute).come(end)


class Ending:
    """What a program does last."""

    def __init__(self, w, pool, mute):
        self.w, self.pool, self.mute = w, pool, mute

    async def come(self, end):
        match end:
            case "return":
                return
            case "sys.exit":
                sys.exit(3)
            case "os._exit":
                os._exit(4)
            case "an exception":
                raise RuntimeError("of the program's own")
            case "KeyboardInterrupt":
                raise KeyboardInterrupt
            case "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                await self.w.pause(60)
            case "close in a signal handler":
                await self.by_signal()
            case _:
                self.prepare(end)

    def prepare(self, end):
        """Have it happen after the program's last line."""
        what = self.close if end.startswith("close") else self.borrow
        if end.endswith("atexit"):
            atexit.register(self.run, what)
        elif end.endswith("__del__"):
            KEPT.append(Late(self.run, what))
        else:
            threading.Thread(target=self.run, args=(self.late,), daemon=False).start()

    def run(self, what):
        """Where nothing runs any more: on asyncio in a loop of its own."""
        asyncio.run(what()) if self.w.runtime.asynchronous else driven(what())

    async def close(self):
        await self.pool.close(timeout=CLOSING)
        await self.mute.close(timeout=CLOSING)

    async def borrow(self):
        """It is served, or told why not; any other exception is printed."""
        with contextlib.suppress(PenstockError):
            async with self.pool.connection() as conn:
                assert await self.w.ask(conn, "select 1") == [(1,)]

    async def late(self):
        """A thread that the interpreter waits for, with what it needs one more connection for."""
        async with self.pool.connection():
            await self.w.pause(0.5)
        await self.borrow()
        print("ending", flush=True)

    async def by_signal(self):
        """SIGTERM comes while the main thread, or the main task, waits for a connection."""
        loop = asyncio.get_running_loop() if self.w.runtime.asynchronous else None

        def close_here(_number, _frame):
            driven(self.close())
            sys.exit(0)

        def close_in_loop():
            KEPT.append(asyncio.get_running_loop().create_task(self.close()))

        if loop is None:
            signal.signal(signal.SIGTERM, close_here)
        else:
            loop.add_signal_handler(signal.SIGTERM, close_in_loop)
        self.w.spawn(self.kill())
        await self.w.borrow(self.mute)
        if loop is not None:
            await KEPT[-1]

    async def kill(self):
        await self.w.until(lambda: self.mute.stats().waiting == 2, "the main one waits, too")
        # A signal that comes between a thread's last look and its sleep wakes it not: that is CPython's.
        await self.w.pause(0.1)
        print("ending", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)


class Late:
    """Something that lives until the interpreter takes its modules apart."""

    def __init__(self, run, what):
        self.run, self.what = run, what

    def __del__(self):
        self.run(self.what)
