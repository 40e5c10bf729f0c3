"""A time in which no connection could be opened: since when, why, and when to try again.

One job: keep what the failed attempts say, and space them (`policy.retry_delay`).

It must not know: slots, waiters. The machine says who wants to know, under the runtime's lock; reports
read it without, so the machine publishes an outage only when it is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .policy import UNHEALABLE_DELAY, retry_delay

if TYPE_CHECKING:
    from collections.abc import Callable


class Outage:
    """A time in which no connection could be opened.

    Attributes:
        since: when the first attempt failed.
        failures: how many failed so far.
        error: what the runtime was told last; opaque here.
        sqlstate: the server's code for it, if it gave one.
        heals: whether trying again can help.
        next_for_waiters: when to try again if somebody waits.
        next_for_nobody: when to try again if nobody does.
        reported: it has lasted longer than the user wants to bear, and that was said.
    """

    __slots__ = (
        "error",
        "failures",
        "heals",
        "next_for_nobody",
        "next_for_waiters",
        "reported",
        "since",
        "sqlstate",
    )

    def __init__(self, since: float) -> None:
        self.since = since
        self.failures = 0
        self.error: Any = None
        self.sqlstate: str | None = None
        self.heals = True
        self.next_for_waiters = since
        self.next_for_nobody = since
        self.reported = False

    def note(
        self,
        error: Any,
        now: float,
        *,
        heals: bool,
        sqlstate: str | None,
        random: Callable[[], float],
    ) -> None:
        """One more attempt failed."""
        self.failures += 1
        self.error, self.sqlstate, self.heals = error, sqlstate, heals
        down_for, chance = now - self.since, random()

        def delay(*, waited_for: bool) -> float:
            return retry_delay(
                self.failures, down_for, waited_for=waited_for, sqlstate=sqlstate, random=chance
            )

        self.next_for_nobody = now + delay(waited_for=False)
        self.next_for_waiters = now + delay(waited_for=True)
        if not heals:
            self.next_for_waiters = now + UNHEALABLE_DELAY
            self.next_for_nobody = max(self.next_for_nobody, self.next_for_waiters)

    def due(self, *, waited_for: bool) -> float:
        """When to try again."""
        return self.next_for_waiters if waited_for else self.next_for_nobody
