"""Forks of the busy process: the child works on the inherited pool and exits; nobody shares a session.

The parent's threads are not there in a child, but its greenlets are, and run on: they find out that they are
copies (`World.ask`) before they send anything.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

from tests.contract.runtimes import driven
from tests.forks import Child
from tests.soak.ledger import DONE, NEVER, UNKNOWN
from tests.soak.world import NEVER_LENT

#: Seconds that a child lives at most: it outlives nothing that waits for it by more.
LONGEST = 100

#: Pieces of work of one child.
PIECES = 6


async def forked(w, b):
    for _ in range(b.rng.randint(1, 3)):
        await one_child(w, b, generations=1)
        await w.pause(b.rng.uniform(0.0, 0.1))


async def forked_twice(w, b):
    """A grandchild, too."""
    await one_child(w, b, generations=2)


async def one_child(w, b, generations):
    w.tell(f"fork, {generations} deep")
    child = Child(lambda: in_child(w, generations))
    told = await w.aside(child.answer)
    for known, keys in told["keys"].items():
        w.journal.heard_of(keys, known)
    for error in told["errors"]:
        b.errors[error.partition("(")[0]] += 1
    errors = told["errors"] if w.harmless else []
    for finding in told["findings"] + errors:
        w.find(f"in a child: {finding}")


def in_child(w, generations):
    """What a child does; its answer goes through a pipe."""
    signal.alarm(LONGEST)  # whatever it does
    w.stop.set()  # for greenlets
    w.findings.clear()
    told: dict[str, Any] = {"keys": {DONE: [], NEVER: [], UNKNOWN: []}, "errors": []}
    work = pay_often(w, told)
    asyncio.run(work) if w.runtime.asynchronous else driven(work)
    told["findings"] = list(w.findings)
    if generations > 1:
        below = Child(lambda: in_child(w, generations - 1)).answer()
        for known, keys in below["keys"].items():
            told["keys"][known] += keys
        told["errors"] += below["errors"]
        told["findings"] += below["findings"]
    return told


async def pay_often(w, told):
    """On the inherited pool; a grandchild's was closed by the child."""
    await w.pool.open()
    for number in range(PIECES):
        key = f"{w.journal.who}.child.{os.getpid()}.{number}"
        known = UNKNOWN
        try:
            query = f"insert into ledger values ('{key}', 'alone') returning key, pg_backend_pid()"
            rows = (await w.pool.execute(query, timeout=20)).fetchall()
            if rows[0][0] != key:
                w.find(f"a wrong answer: inserted {key!r}, and got {rows!r}")
            known = DONE
        except w.errors() as error:
            told["errors"].append(repr(error))
            known = NEVER if isinstance(error, NEVER_LENT) else UNKNOWN
        told["keys"][known].append(key)
    if w.runtime.asynchronous:
        await w.pool.close()


async def child_killed(w, b):
    """A child that is killed while it works: the parent does not notice."""
    w.tell("a forked child is killed")
    child = Child(lambda: in_child(w, 1))
    w.journal.heard_of((f"{w.journal.who}.child.{child.pid}.{n}" for n in range(PIECES)), UNKNOWN)
    await w.pause(b.rng.uniform(0.0, 0.03))
    with suppress(ProcessLookupError):
        child.kill()


ALL = (forked, forked_twice, child_killed)
HARMLESS = ALL
