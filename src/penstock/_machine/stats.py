"""The figures of a pool at one moment, as users read them.

One job: `Stats`, and the snapshot of a machine that fills it. It must not know: how anything is counted
(tally.py). Read under the runtime's lock, or without it: then figures of different moments may meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .slot import SlotState
from .tally import WAIT_EDGES, bucket

if TYPE_CHECKING:
    from .machine import Machine


def wait_quantile(share: float, borrows: int, waits: list[int]) -> float:
    """The wait that `share` of all borrows did not exceed, served or not; 0.0: no wait.

    Borrows that found an idle connection count as waits of 0. The result is the upper edge of
    its bucket, so it is at most a factor of two too high.
    """
    waited = sum(waits)
    rank = share * max(borrows, waited) - (max(borrows, waited) - waited)
    if waited == 0 or rank <= 0:
        return 0.0
    seen = 0
    for index, edge in enumerate(WAIT_EDGES):
        seen += waits[index]
        if seen >= rank:
            return edge
    return float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One pool at one moment. Times in seconds, counts since the pool was made in this process.

    Attributes:
        name: the pool's name.
        state: "new", "open" or "closed".
        min_size: connections kept open at least.
        max_size: connections open at most.
        opening: slots whose connection is being opened.
        idle: connections ready to be lent.
        in_use: connections lent.
        pinging: connections being asked whether they live.
        closing: connections being closed.
        size: the sum of these five.
        waiting: borrowers in the queue now.
        longest_waiting: how long the first of them has waited.
        borrows: connections lent and given back.
        queued: borrowers that had to wait and do no more, served or not (a timeout, a refusal).
        waited: the sum of these waits.
        longest_wait: the longest wait of all, of those that go on now, too.
        wait_p50: the wait that half of all borrowers did not exceed: those that were served at once,
            those that waited, served or not, and those that wait now.
        wait_p99: the wait that 99 % of them did not exceed.
        timeouts: borrowers whose timeout passed.
        refused: borrowers refused at once (max_waiting, or a server that cannot be reached).
        opened: connections opened.
        opening_time: the time that this took, summed.
        open_failures: attempts to open one that failed.
        orphaned: leases dropped without being given back; their connections were replaced.
        closed: connections closed, by reason.
        generation: how often the pool was drained.
    """

    name: str
    state: str
    min_size: int
    max_size: int
    opening: int
    idle: int
    in_use: int
    pinging: int
    closing: int
    size: int
    waiting: int
    longest_waiting: float
    borrows: int
    queued: int
    waited: float
    longest_wait: float
    wait_p50: float
    wait_p99: float
    timeouts: int
    refused: int
    opened: int
    opening_time: float
    open_failures: int
    orphaned: int
    closed: dict[str, int] = field(default_factory=dict)
    generation: int = 0


def snapshot(machine: Machine, name: str, now: float) -> Stats:
    """All figures of a machine at one moment."""
    counts, waiting, tally = machine.count(), machine.waiting(), machine.tally
    borrows = machine.borrows()
    now_waiting = [now - waiter.queued_at for waiter in waiting]
    waits = list(tally.waits)
    for seconds in now_waiting:
        waits[bucket(seconds)] += 1
    asked = borrows + tally.unserved + len(waiting)
    return Stats(
        name=name,
        state=machine.phase.value,
        min_size=machine.limits.min_size,
        max_size=machine.limits.max_size,
        opening=counts[SlotState.OPENING],
        idle=counts[SlotState.IDLE],
        in_use=counts[SlotState.IN_USE],
        pinging=counts[SlotState.PINGING],
        closing=counts[SlotState.CLOSING],
        size=sum(counts.values()),
        waiting=len(waiting),
        longest_waiting=now_waiting[0] if waiting else 0.0,
        borrows=borrows,
        queued=tally.queued,
        waited=tally.waited_seconds,
        longest_wait=max(tally.longest_wait, *now_waiting, 0.0),
        wait_p50=wait_quantile(0.50, asked, waits),
        wait_p99=wait_quantile(0.99, asked, waits),
        timeouts=tally.timeouts,
        refused=tally.refused,
        opened=tally.opened,
        opening_time=tally.opening_seconds,
        open_failures=tally.open_failures,
        orphaned=tally.orphaned,
        closed=dict(tally.closed),
        generation=machine.generation,
    )
