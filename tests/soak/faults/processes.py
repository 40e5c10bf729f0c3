"""Forks of the busy process: the child works on the inherited pool and exits; nobody shares a session.

The parent's threads are not there in a child, but its greenlets are, and run on: they find out that they are
copies (`World.ask`) before they send anything.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from tests.contract.runtimes import driven
from tests.forks import Child
from tests.soak.ledger import DONE

#: Pieces of work of one child.
PIECES = 6


async def forked(w, b):
    for _ in range(b.rng.randint(1, 3)):
        await one_child(w, generations=1)
        await w.pause(b.rng.uniform(0.0, 0.1))


async def forked_twice(w, b):
    """A grandchild, too."""
    await one_child(w, generations=2)


async def one_child(w, generations):
    w.tell(f"fork, {generations} deep")
    child = Child(lambda: in_child(w, generations))
    told = await w.aside(child.answer)
    w.journal.heard_of(told["paid"], DONE)
    for finding in told["findings"]:
        w.find(f"in a child: {finding}")


def in_child(w, generations):
    """What a child does; its answer goes through a pipe."""
    w.stop.set()  # for greenlets
    w.findings.clear()
    paid = asyncio.run(work(w)) if w.runtime.asynchronous else driven(work(w))
    if generations > 1:
        below = Child(lambda: in_child(w, generations - 1)).answer()
        paid += below["paid"]
        w.findings += below["findings"]
    return {"paid": paid, "findings": w.findings}


async def work(w):
    paid = []
    await w.pool.open()  # a grandchild's was closed by the child
    for number in range(PIECES):
        key = f"{w.journal.who}.child.{os.getpid()}.{number}"
        query = f"insert into ledger values ('{key}', 'alone') returning key, pg_backend_pid()"
        rows = (await w.pool.execute(query, timeout=20)).fetchall()
        if rows[0][0] != key:
            w.find(f"a wrong answer: inserted {key!r}, and got {rows!r}")
        paid.append(key)
    if w.runtime.asynchronous:
        await w.pool.close()
    return paid


async def child_killed(w, b):
    """A child that is killed while it works: the parent does not notice."""
    w.tell("a forked child is killed")
    child = Child(lambda: in_child(w, 1))
    w.journal.heard_of((f"{w.journal.who}.child.{child.pid}.{n}" for n in range(PIECES)), "unknown")
    await w.pause(b.rng.uniform(0.0, 0.03))
    with suppress(ProcessLookupError):
        child.kill()


ALL = (forked, forked_twice, child_killed)
HARMLESS = ALL
