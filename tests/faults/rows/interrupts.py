"""Interrupts at any point of a borrow, a wait, a use and a return: real signals, cancellations, kills.

*Threads*: a timer of the system strikes the main thread at a random moment; its handler raises
KeyboardInterrupt, SystemExit or an error of its own; other threads borrow meanwhile, so that there is
somebody to wait for and to give to. *gevent*: the same, and greenlets are struck by `gevent.Timeout` and
`kill`. *asyncio*: tasks are cancelled; and in a process of its own the timer's handler raises out of the
event loop, which then goes on (`python -m tests.faults.rows.interrupts`).

Who borrows writes his name beside the session and reads it again at the end: a session that was lent
twice has another's. At the end all of the pool must be borrowable at once, and the server must have as
many sessions as the pool.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

from tests.contract.runtimes import Gevent
from tests.faults.stage import PATIENCE, ROOT, Stage, now

TITLE = "KeyboardInterrupt, SystemExit, errors of signal handlers, cancellations, kills"
SIZE, OTHERS = 3, 4
SHORT, LONG = 200, 10_000
#: Seconds within which the timer strikes: a borrow takes a fraction of that, a wait more.
LATEST = 0.0012
#: Borrowers wait so long, seconds: who gets nothing in this time has found a dead lock.
TIMEOUT = 20.0

_numbers = itertools.count()


class Struck(Exception):
    """An error of the program's own signal handler."""


RAISED = (KeyboardInterrupt, SystemExit, Struck)


async def play(w):
    wanted = LONG if w.long else SHORT
    seen: Counter[str] = Counter()
    for reset in ("rollback", "session"):
        await storm(w, seen, reset, wanted // 2)
    if w.driver == "asyncpg":
        why = "not tried: asyncpg's own C code ends the process (SIGSEGV) when it goes on"
        w.figure("out of the event loop", why, goal="-", met=True)
    elif w.runtime.asynchronous:
        await out_of_the_loop(w, seen, wanted // 10)
    w.figure("interrupts", seen["struck"], goal=f">= {wanted}", met=seen["struck"] >= wanted)
    for kind in ("raised by a handler", "cancelled", "killed or timed out"):
        if seen[kind]:
            w.figure(f"of these, {kind}", seen[kind], goal="-", met=True)
    w.figure("borrows that came to their end", seen["served"], goal="-", met=True)
    w.count("lost slots", seen["lost"], exactly=0)
    w.count("dead-locked", seen["hung"], exactly=0)
    w.count("lent twice, or a wrong answer", seen["twice"], exactly=0)
    w.count("errors of others", seen["errors"], exactly=0)
    w.count("sessions of the server beyond or below the pool's size", seen["sessions"], exactly=0)


async def storm(w, seen, reset, wanted):
    server = w.server()
    pool = w.pool(
        server.conninfo(over="unix"),
        min_size=SIZE,
        max_size=SIZE,
        timeout=TIMEOUT,
        reset=reset,
        name=f"struck-{reset}",
    )
    await pool.open(wait=True)
    if w.runtime.asynchronous:
        await Tasks(w, pool, seen, wanted).go()
    elif isinstance(w.runtime, Gevent):
        await Greenlets(w, pool, seen, wanted).go()
    else:
        await Threads(w, pool, seen, wanted).go()
    await whole(w, server, pool, seen)


async def whole(w, server, pool, seen):
    """All of the pool is there, at once, and the server has its sessions and no others."""

    def rests():
        stats = pool.stats()
        return stats.idle == stats.size == SIZE and not stats.waiting

    deadline = now() + TIMEOUT
    while not rests() and now() < deadline:
        await w.pause(0.01)
    leases, lost = [pool.connection(timeout=2.0) for _ in range(SIZE)], 0
    entered = []
    for lease in leases:
        try:
            conn = await lease.__aenter__()
            entered.append(lease)
            number = next(_numbers)
            seen["twice"] += (await w.ask(conn, f"select {number}"))[0][0] != number
        except Exception as error:
            print("#", type(error).__name__, error)
            lost += 1
    for lease in entered:
        await lease.__aexit__(None, None, None)
    seen["lost"] += lost
    query = (
        "select count(*) from pg_stat_activity"
        f" where application_name like '%/{pool.name}/%' and backend_type = 'client backend'"
    )
    while (
        beyond := abs(int(server.execute(query)[0][0]) - pool.stats().size)
    ) and now() < deadline:
        await w.pause(0.05)
    seen["sessions"] += beyond


class Borrower:
    """What is common to all three: a borrow that notices what should not be."""

    def __init__(self, w, pool, seen, wanted):
        self.w, self.pool, self.seen, self.wanted = w, pool, seen, wanted
        self.rng = random.Random(f"{w.name} {pool.name} {w.rng.random()}")
        self.struck = 0
        self.over = False
        self.users: dict[int, int] = {}

    def is_enough(self):
        return self.over or self.struck >= self.wanted

    def moment(self):
        """When to strike: while it waits for a connection, in its use, or at its return."""
        return self.rng.choice((1, 5, 20)) * self.rng.uniform(1e-6, LATEST)

    async def borrow(self):
        """One of several ways; a lost interrupt is none, so nothing is caught here."""
        way = self.rng.random()
        me = next(_numbers)
        if way < 0.2:
            rows = (await self.pool.execute(f"select {me}")).fetchall()
            self.notice(rows[0][0] != me)
            return
        wants = {"timeout": TIMEOUT} if way < 0.4 else {}
        if self.w.driver == "asyncpg" and way > 0.7:
            wants["transaction"] = True
        async with self.pool.connection(**wants) as conn:
            self.users[id(conn)] = me
            rows = await self.w.ask(conn, f"select {me}")
            if way > 0.8:
                await self.w.ask(conn, "select pg_sleep(0.0005)")
            self.notice(rows[0][0] != me or self.users[id(conn)] != me)
        self.seen["served"] += 1

    def notice(self, wrong):
        self.seen["twice"] += bool(wrong)

    async def other(self, _number):
        """One who is not struck: he must be served, each time."""
        while not self.is_enough():
            try:
                await self.borrow()
            except Exception as error:
                print("#", type(error).__name__, error)
                self.seen["errors"] += 1
            await self.w.runtime.pause(self.rng.uniform(0, 0.0005))


class Threads(Borrower):
    """The main thread is struck by a timer."""

    armed = False

    def raises(self, *_signal):
        if not self.armed:
            return
        if not self.may_be_struck():
            signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-6, LATEST))
            return
        self.armed = False
        self.struck += 1
        self.seen["raised by a handler"] += 1
        raise self.rng.choice(RAISED)

    def may_be_struck(self):
        return threading.current_thread() is threading.main_thread()

    async def go(self):
        self.armed = False
        others = self.w.crowd(OTHERS, self.other)
        before = signal.signal(signal.SIGALRM, self.raises)
        try:
            while not self.is_enough():
                with suppress(*RAISED):  # one that came a moment later than it was meant to
                    await self.strike_on()
        finally:
            self.armed, self.over = False, True
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.seen["struck"] += self.struck
        await self.ended(others)

    async def strike_on(self):
        while not self.is_enough():
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-6, LATEST))
                while self.armed:
                    await self.borrow()
            except RAISED:
                continue

    async def ended(self, others):
        deadline = now() + TIMEOUT + 5
        flights = others._flights
        while not all(flight.done for flight in flights) and now() < deadline:
            await self.w.pause(0.01)
        self.seen["hung"] += sum(not flight.done for flight in flights)
        self.seen["errors"] += sum(flight.error is not None for flight in flights if flight.done)


class Greenlets(Threads):
    """Greenlets are struck by the timer's handler, by `Timeout` and by `kill`.

    One that a handler has struck ends, and another one begins: gevent's own waits leave their timer behind
    when they are interrupted in the wrong moment, and it would go off in whatever comes next.
    """

    def may_be_struck(self):
        import gevent

        return gevent.getcurrent() in self.inside

    async def go(self):
        import gevent

        self.inside = set()  # before and after, what a handler raises would be the program's end
        self.victims = {gevent.spawn(self.victim) for _ in range(SIZE + 1)}
        others = self.w.crowd(2, self.other)
        before = signal.signal(signal.SIGALRM, self.raises)
        try:
            while not self.is_enough():
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-6, LATEST))
                gevent.sleep(self.moment())
                self.kill_one(self.rng.choice(sorted(self.victims, key=id)))
        finally:
            self.armed, self.over = False, True
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.seen["struck"] += self.struck
        gevent.joinall(self.victims, timeout=TIMEOUT)
        self.seen["hung"] += sum(not victim.dead for victim in self.victims)
        await self.ended(others)

    def kill_one(self, victim):
        import gevent

        if not victim.dead:
            self.inside.discard(victim)
            victim.kill(block=False)
            self.struck += 1
            self.seen["killed or timed out"] += 1
        dead = {each for each in self.victims if each.dead or each is victim}
        self.victims = (self.victims - dead) | {gevent.spawn(self.victim) for _ in dead}

    def victim(self):
        """Times out again and again, until it is killed or struck, or all is over."""
        import gevent

        with suppress(*RAISED):
            self.inside.add(gevent.getcurrent())
            while not self.is_enough():
                try:
                    with gevent.Timeout(self.moment()):
                        self.w.runtime.run(self.borrow())
                except gevent.Timeout:
                    self.struck += 1
                    self.seen["killed or timed out"] += 1
            self.inside.discard(gevent.getcurrent())


class Tasks(Borrower):
    """Tasks are cancelled, some twice."""

    async def go(self):
        others = self.w.crowd(2, self.other)
        victims = self.w.crowd(SIZE + 1, self.victim)
        try:
            await victims.all()
            await others.all()
        except AssertionError:
            self.seen["hung"] += 1
        self.seen["struck"] += self.struck
        self.seen["cancelled"] += self.struck

    async def victim(self, _number):
        loop = asyncio.get_running_loop()
        while not self.is_enough():
            task = asyncio.create_task(self.borrow())
            for _ in range(1 + (self.rng.random() < 0.1)):
                loop.call_later(self.moment(), task.cancel)
            await asyncio.wait({task})
            if task.cancelled():
                self.struck += 1
            elif task.exception() is not None:
                print("#", repr(task.exception()))
                self.seen["errors"] += 1


# -- out of an event loop -------------------------------------------------------------------------


async def out_of_the_loop(w, seen, wanted):
    """In a process of its own, whose event loop is interrupted and goes on."""
    command = [
        sys.executable,
        "-m",
        __name__,
        w.name,
        w.server().conninfo(over="unix"),
        str(wanted),
    ]
    run = partial(
        subprocess.run,
        command,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
        cwd=ROOT,
        check=False,
    )
    done = await w.aside(run)
    if done.returncode:
        print("#", done.returncode, repr(done.stderr[-3000:]))
        seen["hung"] += 1
        return
    lines = done.stdout.splitlines()
    for line in lines[:-1]:
        print(line)
    seen.update(json.loads(lines[-1]))


class Loop(Borrower):
    """A task is struck, the loop ends with what the handler raised, and is run again.

    Only in the code of borrowers, drivers and pools: between two tasks an interrupt makes asyncio lose what it
    was about to call, and in its own code one can leave its heap of timers, or its selector, out of order. (`asyncio.run` has a
    handler of its own for SIGINT, which does not raise there either.)
    """

    armed = False
    loop: Any = None

    def raises(self, _signal, frame):
        if not self.armed:
            return
        inside = str(frame.f_globals.get("__name__"))
        if asyncio.current_task(self.loop) is None or inside.startswith(
            ("asyncio", "heapq", "selectors")
        ):
            signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-6, LATEST / 10))
            return
        self.armed = False
        self.struck += 1
        raise self.rng.choice((KeyboardInterrupt, SystemExit))

    def strike(self, loop):
        self.armed, self.loop = False, loop
        tasks: set[asyncio.Task[Any]] = set()
        signal.signal(signal.SIGALRM, self.raises)
        while not self.is_enough():
            try:
                tasks = {task for task in tasks if not task.done()}
                while len(tasks) <= SIZE:
                    tasks.add(loop.create_task(self.borrow()))
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.moment())
                while self.armed:
                    finish(loop, asyncio.sleep(LATEST))
            except (KeyboardInterrupt, SystemExit):
                continue
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        left = [task for task in tasks if not task.done()]
        if left:
            done, pending = finish(loop, asyncio.wait(left, timeout=TIMEOUT + 5))
            self.seen["hung"] += len(pending)
            errors = [task.exception() for task in done]
            errors = [error for error in errors if isinstance(error, Exception)]
            for error in errors:
                print("#", repr(error))
            self.seen["errors"] += len(errors)


def finish(loop, coro):
    """Run a coroutine to its end; the end of one that was interrupted before may stop the loop again."""
    task = loop.create_task(coro)
    while not task.done():
        try:
            return loop.run_until_complete(task)
        except RuntimeError as error:
            if "stopped before" not in str(error):
                raise
    return task.result()


def main(name, conninfo, wanted):
    from penstock import AsyncConnectionPool

    w: Any = Stage(name, seed="out of the loop")
    seen: Counter[str] = Counter()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # KeyboardInterrupt was not retrieved
    pool = AsyncConnectionPool[Any](
        conninfo, driver=w.driver, min_size=SIZE, max_size=SIZE, timeout=TIMEOUT, name="loop"
    )
    loop.run_until_complete(pool.open(wait=True))
    struck = Loop(w, pool, seen, int(wanted))
    struck.strike(loop)
    gc.collect()  # a task that was struck holds its error, that a traceback, that its frames
    seen["struck"] += struck.struck
    seen["raised by a handler"] += struck.struck
    server = type("Server", (), {"execute": staticmethod(partial(ask, conninfo))})
    finish(loop, whole(w, server, pool, seen))
    finish(loop, pool.close(timeout=1.0))
    print(json.dumps(seen))


def ask(conninfo, query):
    import psycopg

    with psycopg.connect(conninfo, autocommit=True) as conn:
        return conn.execute(query).fetchall()


if __name__ == "__main__":
    main(*sys.argv[1:])
