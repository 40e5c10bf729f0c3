"""Does somebody ask how the pool is? An unready service gets no requests, so nobody waits: its probes ask.

One job: remember when `health()` was last asked, and say whether that was lately.

It must not know: outages, the queue, what is done about it. No lock: each method is one store or one
comparison of times, and two callers at once do what one does.
"""

from __future__ import annotations

from typing import Final

#: Seconds for which a question counts: three periods of Kubernetes' default readiness probe.
LATELY: Final = 30.0
#: The background hears of a question at most so often, in seconds. The machine compares with LATELY, thirty
#: times as long: a question that nobody was woken for is seen by all who decide meanwhile.
WAKE_EVERY: Final = 1.0


class Asked:
    """When somebody asked last.

    Attributes:
        at: when that was.
        woke_at: when a question last woke the background.
    """

    __slots__ = ("at", "woke_at")

    def __init__(self) -> None:
        self.at = self.woke_at = float("-inf")

    def note(self, now: float) -> None:
        """Somebody asks."""
        self.at = now  # first: a tick that is caused by this question sees it

    def wakes(self, now: float) -> bool:
        """Whether this question is one to wake the background for."""
        if now - self.woke_at < WAKE_EVERY:
            return False
        self.woke_at = now
        return True

    def lately(self, now: float) -> bool:
        """Whether somebody asked a short time ago, and so will ask again."""
        return now - self.at < LATELY
