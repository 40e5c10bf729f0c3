"""A process with a busy pool forks, in every way and at every bad moment; children use the pool at once.

The moments: borrowers wait and use (busy), the forking one is inside its own block (mid-borrow), connects
are under way (mid-connect), sessions are being reset (mid-reset). The ways: os.fork, a fork that runs no
at-fork hook, the three of multiprocessing. Every child has a child of its own.

Each answer carries who asked, and the session that answered. What happened is counted over all of them:
wrong answers, errors, children that hung, sessions of the parent that are not there any more, sessions
that outlive their process.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from tests.contract.runtimes import AsAsync
from tests.faults.stage import PATIENCE, Stage, now
from tests.forks import Child, quiet_libc_fork

TITLE = "fork of a busy pool, also mid-borrow, mid-connect, mid-reset, and to grandchildren"
SIZE, BORROWERS = 4, 8
HUNG = 30.0  # seconds: the price of a failure
WORDS = {"asked", "wrong", "errors"}

_numbers = itertools.count()


@dataclass
class Seen:
    """What the row counts, over all of its forks."""

    of_children: Counter[str] = field(default_factory=Counter)
    of_parents: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    shared: int = 0
    outlived: int = 0
    hung: int = 0
    errors: list[str] = field(default_factory=list)


# -- who uses a pool ------------------------------------------------------------------------------


async def asked(w, pool, told):
    """One borrow, whose answer must be its own."""
    mine = f"{os.getpid()}-{next(_numbers)}"
    this = await w.borrow(pool, f"select '{mine}', pg_backend_pid()")
    told["asked"] += 1
    if not this.good:
        told["errors"] += 1
        return f"{type(this.error).__name__}: {this.error}"
    ((said, backend),) = this.answer
    told["wrong"] += said != mine
    told[f"session {backend}"] += 1
    return ""


async def used_hard(w, pool, times, below=None):
    """What a child does at once; and then it has a child of its own."""
    told: Counter[str] = Counter()
    errors = []

    async def body(_number):
        errors.extend([await asked(w, pool, told) for _ in range(times)])

    await w.crowd(BORROWERS, body).all()
    if below is not None:
        grandchild = Child(partial(in_child, w, pool, max(1, times // 2)), fork=below)
        await body(0)
        answer = await w.aside(partial(grandchild.answer, HUNG))
        told.update(answer["told"])
        errors += answer["errors"]
    await pool.close(timeout=5.0)
    return {"told": told, "errors": [error for error in errors if error]}


def in_child(w, pool, times, below=None):
    return type(w.runtime)().run(used_hard(w, pool, times, below))


def in_process(name, pool, times, writer):
    """In a process of multiprocessing, to which the pool came by fork or by pickle."""
    w = Stage(name)
    found = in_child(w, pool if w.runtime.asynchronous else AsAsync(pool), times)
    writer.send(found)
    writer.close()


class Busy:
    """The parent's borrowers, who go on over all forks; in a child that copies them, they end."""

    def __init__(self, w, pool):
        self._w, self._pool, self._pid = w, pool, os.getpid()
        self.told: Counter[str] = Counter()
        self.errors: list[str] = []
        self._stop = w.runtime.event()

    async def __aenter__(self):
        self._crowd = self._w.crowd(BORROWERS, self._go_on)
        await self._w.until(lambda: self.told["asked"] > 2 * BORROWERS, "the parent is busy")
        return self

    async def _go_on(self, _number):
        while not self._stop.is_set() and os.getpid() == self._pid:
            error = await asked(self._w, self._pool, self.told)
            if os.getpid() == self._pid and error:
                self.errors.append(error)
            await self._w.runtime.pause(0.0005)

    async def __aexit__(self, *_exc):
        before = self.told["asked"]
        await self._w.until(lambda: self.told["asked"] > before + BORROWERS, "the parent goes on")
        self._stop.set()
        await self._crowd.all()


# -- the row --------------------------------------------------------------------------------------


async def play(w):
    server, seen = w.server(), Seen()
    forks = 6 if w.long else 1
    for reset in ("rollback", "session"):
        await busy(w, server, seen, forks, reset)
    await mid_borrow(w, server, seen)
    await mid_connect(w, server, seen)
    for method in ("fork", "spawn", "forkserver") if w.long else ("fork",):
        await by_multiprocessing(w, server, seen, method)
    if w.driver and not w.name.startswith("gevent"):  # gevent itself needs its hooks
        await unhooked(w, server, seen)
    await killed(w, server, seen)

    children, parents = seen.of_children, seen.of_parents
    w.figure("asked by children", children["asked"], goal="-", met=True)
    w.figure("asked by parents meanwhile", parents["asked"], goal="-", met=True)
    w.count("wrong answers", children["wrong"] + parents["wrong"], exactly=0)
    w.count("errors", children["errors"] + parents["errors"], exactly=0)
    w.count("children that hung", seen.hung, exactly=0)
    w.count("sessions of parents that are gone", seen.lost, exactly=0)
    w.count("sessions used by two processes", seen.shared, exactly=0)
    w.count("sessions that outlive their process", seen.outlived, exactly=0)
    for error in seen.errors[:5]:
        print("#", error)


def times_of(w):
    return 12 if w.long else 3


async def opened(w, conninfo, name, **options):
    pool = w.pool(conninfo, min_size=SIZE, max_size=SIZE, timeout=HUNG, name=name, **options)
    await pool.open(wait=True)
    return pool


async def heard(w, child, seen, mine):
    """A child's answer; `mine` are the parent's sessions."""
    try:
        answer = await w.aside(partial(child.answer, HUNG))
    except AssertionError as failure:
        seen.hung += 1
        seen.errors.append(str(failure))
        return
    count(answer, seen, mine)


def count(answer, seen, mine):
    seen.of_children.update(answer["told"])
    seen.errors += answer["errors"]
    seen.shared += len({f"session {pid}" for pid in mine} & answer["told"].keys())


def sessions(server, name, pid=None):
    """The sessions that pools of this name have, of one process or of all."""
    of = "%" if pid is None else str(pid)
    rows = server.execute(
        f"select pid from pg_stat_activity where application_name like '%/{name}/{of}'"
    )
    return {int(backend) for (backend,) in rows}


async def settle(w, server, seen, pool, before):
    """When the children are gone, the server has the parent's sessions as before, and no others."""
    deadline = now() + 10
    while (left := sessions(server, pool.name)) != before and now() < deadline:
        await w.pause(0.02)
    seen.outlived += len(left - before)
    seen.lost += len(before - left)


async def busy(w, server, seen, forks, reset):
    """Borrowers wait and use; with a reset, some sessions have not answered to it at the fork."""
    proxy = w.proxy(server.port)
    conninfo = server.conninfo(port=proxy.port)
    pool = await opened(w, conninfo, f"busy-{reset}", reset=reset)
    proxy.delay(0.002)
    before = sessions(server, pool.name)
    async with Busy(w, pool) as going:
        for _ in range(forks):
            child = Child(partial(in_child, w, pool, times_of(w), os.fork))
            await heard(w, child, seen, before)
    told(seen, going, before)
    await settle(w, server, seen, pool, before)


def told(seen, going, before):
    seen.of_parents.update(going.told)
    seen.errors += going.errors
    seen.lost += len(going.told.keys() - {f"session {pid}" for pid in before} - WORDS)


async def mid_borrow(w, server, seen):
    """The borrower forks inside of its block; the child leaves it, as by returning through it."""
    pool = await opened(w, server.conninfo(), "mid-borrow")
    before = sessions(server, pool.name)
    async with Busy(w, pool) as going:
        for fork_again in (None, os.fork):
            wants = {"transaction": True} if w.driver == "asyncpg" else {}
            block = pool.connection(**wants)
            conn = await block.__aenter__()
            await w.ask(conn, "create temp table if not exists mine (n int) on commit delete rows")
            await w.ask(conn, "insert into mine values (1)")
            child = Child(partial(leave_and_use, w, pool, block, fork_again))
            await heard(w, child, seen, before)
            await w.ask(conn, "insert into mine values (2)")
            rows = await w.ask(conn, "select n from mine order by n")
            seen.of_parents["wrong"] += rows != [(1,), (2,)]
            await block.__aexit__(None, None, None)
    told(seen, going, before)
    await settle(w, server, seen, pool, before)


def leave_and_use(w, pool, block, below):
    async def leave():
        with suppress(Exception):  # that it is the parent's is what it says
            await block.__aexit__(None, None, None)
        return await used_hard(w, pool, times_of(w), below)

    return type(w.runtime)().run(leave())


async def mid_connect(w, server, seen):
    """All connects are under way, and borrowers wait for them."""
    proxy = w.proxy(server.port)
    conninfo = server.conninfo(port=proxy.port)
    pool = w.pool(conninfo, min_size=SIZE, max_size=SIZE, timeout=HUNG, name="mid-connect")
    proxy.hold(old=False, new=True)
    waiting = w.crowd(BORROWERS, lambda _number: w.borrow(pool, "select pg_backend_pid()"))
    await w.until(lambda: pool.stats().opening == SIZE, "connects under way")
    child = Child(partial(in_child, w, pool, times_of(w), os.fork))
    await w.pause(0.05)
    proxy.release()
    tries = await waiting.all()
    seen.of_parents["asked"] += len(tries)
    seen.of_parents["errors"] += sum(not each.good for each in tries)
    seen.errors += [str(each.error) for each in tries if not each.good]
    await w.until(lambda: pool.stats().idle == SIZE, "all are open")
    before = sessions(server, pool.name, os.getpid())
    await heard(w, child, seen, before)
    await settle(w, server, seen, pool, before)


async def by_multiprocessing(w, server, seen, method):
    pool = await opened(w, server.conninfo(), f"mp-{method}")
    before = sessions(server, pool.name)
    context = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    travels = pool if w.runtime.asynchronous else pool.sync
    async with Busy(w, pool) as going:
        process: Any = context.Process(
            target=in_process, args=(w.name, travels, times_of(w), writer)
        )
        process.start()
        writer.close()
        deadline = now() + HUNG
        while not reader.poll() and now() < deadline:
            await w.pause(0.01)
        if reader.poll():
            count(reader.recv(), seen, before)
        else:
            seen.hung += 1
            process.kill()
    reader.close()
    told(seen, going, before)
    await settle(w, server, seen, pool, before)
    await w.aside(partial(process.join, 5.0))


async def unhooked(w, server, seen):
    """As uWSGI forks by default. Only a process at rest can: that is C's and Python's rule."""
    pool = await opened(w, server.conninfo(), "unhooked")
    before = sessions(server, pool.name)
    for _ in range(4 if w.long else 1):
        child = Child(
            partial(in_child, w, pool, times_of(w), quiet_libc_fork), fork=quiet_libc_fork
        )
        await heard(w, child, seen, before)
    mine: Counter[str] = Counter()
    for _ in range(2 * SIZE):
        seen.errors += filter(None, [await asked(w, pool, mine)])
    seen.of_parents.update(mine)
    await settle(w, server, seen, pool, before)


# -- a parent that is killed ----------------------------------------------------------------------

KEY = 4712


async def worker(w, *, conninfo, slow):
    """Forks with one connection lent, one idle, one being opened; the child stays in a statement."""
    pool = w.pool(conninfo, min_size=2, max_size=2, timeout=HUNG, name="killed")
    await pool.open(wait=True)
    lease = pool.connection()
    await lease.__aenter__()
    late = w.pool(slow, min_size=2, max_size=2, timeout=HUNG, name="late")
    await late.open()
    await w.until(lambda: late.stats().opening, "a connect is under way")
    await w.pause(0.05)  # until libpq has a socket
    if not os.fork():
        try:
            type(w.runtime)().run(stay(w, pool))
        finally:
            os._exit(0)
    print("forked", flush=True)
    await w.pause(10 * PATIENCE)


async def stay(w, pool):
    await w.borrow(pool, f"select pg_advisory_lock_shared({KEY})")


async def killed(w, server, seen):
    proxy = w.proxy(server.port)
    with psycopg.connect(server.conninfo(), autocommit=True) as keeps:
        keeps.execute(f"select pg_advisory_lock({KEY})")
        proxy.hold(old=False, new=True)
        slow = server.conninfo(port=proxy.port)
        parent = w.process("fork", conninfo=server.conninfo(), slow=slow)
        assert parent.line() == "forked"
        pid = parent.process.pid

        def theirs():
            return sessions(server, "killed", pid) | sessions(server, "late", pid)

        def childs():
            return sessions(server, "killed") - theirs()

        await w.until(childs, "the child's session")
        proxy.release()
        await w.until(lambda: len(theirs()) == 4, "all are opened after the fork")
        parent.kill()
        deadline = now() + 5
        while theirs() and now() < deadline:
            await w.pause(0.02)
        seen.outlived += len(theirs())
        seen.lost += not childs()
    await w.until(lambda: not sessions(server, "killed"), "the child is gone")
