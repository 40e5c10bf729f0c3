"""One step after the other: borrowers at work, a fault or two, all heals, all is served again, all is checked.

Its one job: the order of these, and what is told of each step. What is drawn depends on the seed, the combination
and the step's number alone, so that `--first N` goes straight to a step.

It must not know: any fault. No lock.
"""

from __future__ import annotations

import faulthandler
import sys
import traceback
from typing import TYPE_CHECKING, Any

from tests.soak.checks import Levels, after_step
from tests.soak.faults import FAULTS, Fault, drawn
from tests.soak.work import work_on
from tests.soak.world import PATIENCE, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.soak.world import Borrower, World

#: Steps of one pool.
ERA = 4
#: Seconds after which a step hangs: the process ends with all of its threads' stacks on standard error.
HANGS = 150.0


async def soak(
    w: World, seconds: float, first: int, only: list[str], tell: Callable[..., None]
) -> None:
    """Steps until the time is up or one fails; `tell` is called with each."""
    ends, number, levels = now() + seconds, first, Levels()
    await begin_era(w, number)
    while now() < ends and not w.findings:
        if (number - 1) % ERA == 0 and number != first:
            await end_era(w)
            await begin_era(w, number)
        w.begin_step(number)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        faults = [FAULTS[w.rng.choice(only)]] if only else drawn(w.rng, w.runtime.name)
        tell(**await told_step(w, number, faults, levels))
        number += 1
    faulthandler.cancel_dump_traceback_later()
    if not w.findings:
        await end_era(w)
        if left := await sessions_after_close(w):
            tell(failed=f"sessions are left after close(): {left}", story=[], step=number)


async def begin_era(w: World, number: int) -> None:
    w.new_pool((number - 1) // ERA)


async def end_era(w: World) -> None:
    await w.pool.close(timeout=PATIENCE)


async def sessions_after_close(w: World) -> set[int]:
    """A server process needs milliseconds to end."""
    deadline = now() + PATIENCE
    while (left := await w.sessions()) and now() < deadline:
        await w.pause(0.02)
    return left


async def told_step(w: World, number: int, faults: list[Fault], levels: Levels) -> dict[str, Any]:
    """Play one step; its figures, and its story if it failed."""
    served, checks = 0.0, 0
    began = now()
    try:
        served = await play(w, faults)
        counted = w.era_borrows
        for each in w.borrowers:
            counted.add(each)
        if not w.findings:
            checks = await after_step(w, levels, counted)
    except Exception:
        w.find(traceback.format_exc())
    queries = sum(each.queries for each in w.borrowers)
    errors = sum((each.errors for each in w.borrowers), w.totals.errors.__class__())
    told: dict[str, Any] = {
        "step": number,
        "faults": [fault.name for fault in faults],
        "seconds": now() - began,
        "served": served,
        "borrowers": len(w.borrowers),
        "queries": queries,
        "done": w.journal.count("done"),
        "never": w.journal.count("never"),
        "unknown": w.journal.count("unknown"),
        "errors": dict(errors),
        "checks": checks,
    }
    if w.findings:
        told |= {"failed": "\n".join(w.findings), "story": [str(w.options), *w.story, repr(w.pool)]}
    return told


async def play(w: World, faults: list[Fault]) -> float:
    """The borrowers, and what befalls them; how long after healing all were served again."""
    quiet = any(fault.quiet for fault in faults)
    w.harmless = all(fault.harmless for fault in faults)
    crowd = 0 if quiet else w.rng.randint(2, 2 * w.options["max_size"])
    load = [w.borrower() for _ in range(crowd)]
    w.tell(f"{crowd} borrowers; {w.options}")
    flights = [w.spawn(work_on(w, each)) for each in load]
    await all_served(w, load, since=0.0, what="the load begins")
    others = [w.spawn(befalls(w, fault)) for fault in faults[1:]]
    try:
        await befalls(w, faults[0])
        await ended(w, others, "a fault")
        healed = now()
        w.tell("healed")
        await all_served(w, load, since=healed, what="served again")
        served = now() - healed
    finally:
        w.stop.set()
    await ended(w, flights, "a borrower")
    w.tell("all are through")
    if w.harmless:
        nobody_failed(w, load)
    return served if crowd else 0.0


async def befalls(w: World, fault: Fault) -> None:
    """One fault; what another one waits for is healed at once."""
    try:
        await fault.play(w, w.borrower())
    finally:
        if fault.realm == "network":
            w.heal_network()
        if fault.realm == "servers":
            await w.heal_server()


async def all_served(w: World, load: list[Borrower], since: float, what: str) -> None:
    """Everybody has done something since then."""
    deadline = now() + PATIENCE
    while not all(each.last_good > since for each in load) and not w.findings:
        if now() > deadline:
            late = sum(each.last_good <= since for each in load)
            w.find(f"{what}: {late} of {len(load)} are not served; {w.pool!r}")
            return
        await w.pause(0.01)


async def ended(w: World, flights: list[Any], who: str) -> None:
    """They come to their end, and by nothing that was not caught."""
    deadline = now() + PATIENCE
    while not all(each.done for each in flights):
        if now() > deadline:
            faulthandler.dump_traceback(file=sys.stderr)
            w.find(f"{who} does not come to its end; {w.pool!r}")
            return
        await w.pause(0.005)
    w.are_ends(flights)


def nobody_failed(w: World, load: list[Borrower]) -> None:
    """What befell others is no error of anybody else's; a full queue is his own."""
    own = {"Deliberate", "TooManyRequests", "PoolTimeout"}
    for each in load:
        if failed := {name: times for name, times in each.errors.items() if name not in own}:
            w.find(f"a borrower got errors by what was not to be noticed: {failed}")
