"""Counting: what happened in a pool, as plain numbers.

One job: hold the slow path's counters; stats.py makes what users read of them. The hot path's one counter
is in each slot's reference, where its owner writes without a lock; it is summed when somebody asks.

The machine writes the tally under the runtime's lock.
"""

from __future__ import annotations

from typing import Final

#: Upper edges of the histogram of waits, in seconds: powers of two from 0.12 ms to 64 s.
WAIT_EDGES: Final = tuple(2.0**n for n in range(-13, 7))


class Tally:
    """Counters of one pool, of its slow path only."""

    __slots__ = (
        "borrows_of_gone",
        "closed",
        "last_opening",
        "longest_wait",
        "open_failures",
        "opened",
        "opening_seconds",
        "orphaned",
        "queued",
        "refused",
        "timeouts",
        "unserved",
        "waited_seconds",
        "waits",
    )

    def __init__(self) -> None:
        self.borrows_of_gone = 0
        self.queued = 0
        self.unserved = 0
        self.timeouts = 0
        self.refused = 0
        self.waited_seconds = 0.0
        self.longest_wait = 0.0
        self.waits = [0] * (len(WAIT_EDGES) + 1)
        self.opened = 0
        self.opening_seconds = 0.0
        self.last_opening = 0.0
        self.open_failures = 0
        self.orphaned = 0
        self.closed: dict[str, int] = {}

    def wait_ended(self, seconds: float, *, served: bool) -> None:
        """A borrower waited this long, and was served or not (a timeout, a refusal, given up)."""
        self.queued += 1
        self.unserved += not served
        self.waited_seconds += seconds
        self.longest_wait = max(self.longest_wait, seconds)
        self.waits[bucket(seconds)] += 1

    def connection_opened(self, seconds: float) -> None:
        """Opening one took this long."""
        self.opened += 1
        self.opening_seconds += seconds
        self.last_opening = seconds

    def usual_opening(self) -> float:
        """Seconds that opening one takes: the mean, or the last if that was quicker; 0.0: none was opened yet.

        A connect that was stuck in an outage for ten seconds must not be believed for the next thousand.
        """
        return min(self.last_opening, self.opening_seconds / self.opened) if self.opened else 0.0

    def connection_closed(self, reason: str, borrows: int) -> None:
        """A slot is gone: keep what it counted."""
        self.closed[reason] = self.closed.get(reason, 0) + 1
        self.borrows_of_gone += borrows


def bucket(seconds: float) -> int:
    """The place of a wait in the histogram."""
    for index, edge in enumerate(WAIT_EDGES):
        if seconds <= edge:
            return index
    return len(WAIT_EDGES)
