"""What is looked at after each step, when everybody is through.

Its one job: find out whether all is as it must be, and say so by `World.find`. Each check is one function; they
go from what the server has to what the process has.

It must not know: which faults there were. No lock: nobody else is at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.contract.runtimes import settled
from tests.soak.ledger import compare
from tests.soak.levels import (
    MEGABYTES,
    OBJECTS,
    Growth,
    Level,
    census,
    descriptors,
    resident,
    threads,
)
from tests.soak.world import NEVER_LENT, PATIENCE, now

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from tests.soak.world import Borrower, World

#: How long whatever is on its way out may take, in seconds: workers, threads of the driver's.
LEAVING = 15.0


#: Connect workers that there may be, and were not yet; greenlets' `Dummy` threads are workers, too.
WORKERS = 18


#: What asyncpg keeps of each statement that a connection caches; and how many these are at most.
CACHED = tuple(
    f"asyncpg:{kind}"
    for kind in ("_StatementCacheEntry", "PreparedStatementState", "RecordDescriptor")
)
CACHE_SIZE = 100


class Levels:
    """What may not grow from step to step."""

    def __init__(self) -> None:
        self.descriptors = Level("descriptors")
        self.threads = Level("threads", slack=WORKERS)
        self.census = Level("objects", slack=60)
        self.objects = Growth("objects that the collector knows", OBJECTS)
        self.memory = Growth("memory in MB", MEGABYTES)


async def after_step(w: World, levels: Levels, counted: Borrower) -> int:
    """All of them; how many were made."""
    checks: list[Callable[[], Any]] = [
        lambda: rests(w),
        lambda: ledger_agrees(w),
        lambda: all_can_be_borrowed(w, counted),
        lambda: counters_agree(w, counted),
        lambda: nobody_is_left(w),
        lambda: levels_hold(w, levels),
    ]
    for number, check in enumerate(checks, 1):
        await check()
        if w.findings:
            return number
    return len(checks)


async def rests(w: World) -> None:
    """Nobody waits, nothing is under way, and the server has as many sessions as the pool."""
    if why := await w.all_at_rest():
        w.find(why)


async def ledger_agrees(w: World) -> None:
    """What was acknowledged is there, once; what failed is not; nothing is torn. Then the table is emptied."""
    rows = await w.execute("select key, part from ledger")
    ((balance,),) = await w.execute("select sum(balance) from account")
    if found := compare(w.journal.entries, [(key, part) for key, part in rows], int(balance)):
        w.find(f"the ledger: {found}")
    await w.execute("truncate ledger")


async def all_can_be_borrowed(w: World, b: Borrower) -> None:
    """All at the same time, each its own session; and the server has these and no others."""
    held, pids = [], []
    try:
        for _ in range(w.pool.stats().max_size):
            conn = await borrowed(w, b)
            held.append(conn)
            ((pid,),) = await w.ask(b, conn, "select pg_backend_pid()")
            pids.append(int(pid))
        there = await w.sessions()
        if len(set(pids)) != len(pids) or set(pids) != there:
            w.find(f"all are lent: to {sorted(pids)}, and the server has {sorted(there)}")
    except w.errors() as error:
        w.find(f"at rest, {len(held)} were borrowed, and then {error!r}")
    finally:
        for conn in held:
            if w.driver != "asyncpg":
                await settled(conn.rollback())
            await w.pool.putconn(conn)
            b.sure += 1


async def borrowed(w: World, b: Borrower) -> Any:
    """One; after a refusal the pool may refuse for a second more."""
    deadline = now() + PATIENCE
    while True:
        b.attempts += 1
        try:
            return await w.pool.getconn(timeout=PATIENCE / 2)
        except NEVER_LENT:
            if now() > deadline:
                raise
            await w.pause(0.05)


async def counters_agree(w: World, b: Borrower) -> None:
    """The pool's figures are those of a recount, at a moment when nothing is under way."""
    deadline = now() + PATIENCE
    while now() < deadline:
        stats = w.pool.stats()
        if not stats.opening + stats.closing + stats.in_use + stats.pinging:
            break
        await w.pause(0.005)
    there = stats.opened - sum(stats.closed.values())
    if there != stats.size:
        w.find(f"{there} are open by the counters, and the size is {stats.size}: {stats}")
    # What came back broken is counted with those that were closed, not with the borrows.
    broken = stats.closed.get("broken", 0) + stats.closed.get("unclean", 0)
    if not (b.sure <= stats.borrows + broken and stats.borrows <= b.attempts):
        w.find(
            f"{b.sure} to {b.attempts} borrows were made; {stats.borrows} are counted,"
            f" and {broken} that came back broken or unclean"
        )


async def nobody_is_left(w: World) -> None:
    """Nothing failed unseen in the loop, where there is one."""
    for unseen in getattr(w.runtime, "unseen", ()):
        w.find(f"the loop was told: {unseen}")


async def levels_hold(w: World, levels: Levels) -> None:
    """Descriptors, threads, objects and memory are where they were."""
    await level_holds(w, levels.descriptors, lambda: others(descriptors(w.proxy.port)))
    await level_holds(w, levels.threads, threads)
    await level_holds(w, levels.census, census_of_parts)
    cached, connections = census()[CACHED[0]], w.pool.stats().size
    if cached > (connections + 1) * CACHE_SIZE:
        w.find(f"{cached} statements are cached, and there are {connections} connections")
    for growth, value in (
        (levels.objects, float(census()["all"])),
        (levels.memory, resident()),
    ):
        if why := growth.read(value):
            w.find(why)


async def level_holds(w: World, level: Level, read: Callable[[], Counter[str]]) -> None:
    """What is too much may be on its way out."""
    deadline = now() + LEAVING
    while level.excess(counts := read()) and now() < deadline:
        await w.pause(0.1)
    if why := level.read(counts):
        w.find(why)


def others(counts: Counter[str]) -> Counter[str]:
    """Without the pool's own, which follow its size."""
    del counts["connections"]
    return counts


def census_of_parts() -> Counter[str]:
    """Without what follows the number of statements."""
    found = census()
    for each in ("all", *CACHED):
        del found[each]
    return found
