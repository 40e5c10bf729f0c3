"""A time in which no connection could be opened: since when, why, and when to try again.

One job: keep what the failed attempts say, and space them (`policy.retry_delay`).

It must not know: slots, waiters. The machine says who wants to know, under the runtime's lock; reports
read it without, so the machine publishes an outage only when it is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .policy import ASKED_JITTER, UNHEALABLE_DELAY, retry_delay

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER: Final = float("inf")


class Outage:
    """A time in which no connection could be opened.

    Attributes:
        since: when the first attempt failed.
        failures: how many failed so far.
        error: what the runtime was told last; opaque here.
        sqlstate: the server's code for it, if it gave one.
        heals: whether trying again can help.
        next_for_waiters: when to try again if somebody waits.
        next_question: where what was refused may change (a callable gives the password): when to ask whether
            it has; infinite where it need not be asked before `next_for_waiters`.
        questions: how often that was asked in vain since the last attempt.
        next_for_asked: when to try again if nobody does, and somebody asks how the pool is.
        next_for_nobody: when to try again if nobody does either.
        reported: it has lasted longer than the user wants to bear, and that was said.
    """

    __slots__ = (
        "error",
        "failures",
        "heals",
        "next_for_asked",
        "next_for_nobody",
        "next_for_waiters",
        "next_question",
        "questions",
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
        self.next_for_asked = since
        self.next_for_nobody = since
        self.next_question = NEVER
        self.questions = 0
        self.reported = False

    def note(
        self,
        error: Any,
        now: float,
        *,
        heals: bool,
        sqlstate: str | None,
        random: Callable[[], float],
        may_change: bool = False,
    ) -> None:
        """One more attempt failed; `may_change`: what was refused may be another thing at any time."""
        self.failures += 1
        self.error, self.sqlstate, self.heals = error, sqlstate, heals
        down_for, chance = now - self.since, random()

        def delay(*, waited_for: bool = False, asked: bool = False) -> float:
            return retry_delay(
                self.failures,
                down_for,
                waited_for=waited_for,
                sqlstate=sqlstate,
                random=chance,
                asked=asked,
            )

        self.next_for_nobody = now + delay()
        self.next_for_asked = now + delay(asked=True)
        self.next_for_waiters = now + delay(waited_for=True)
        self.questions, self.next_question = 0, NEVER
        if may_change and not heals:
            self.next_question = now + self._question_delay()
        if not heals:
            self.next_for_waiters = now + UNHEALABLE_DELAY
            self.next_for_asked = self.next_for_waiters + ASKED_JITTER * chance
            self.next_for_nobody = max(self.next_for_nobody, self.next_for_asked)

    def due(self, *, waited_for: bool, asked: bool) -> float:
        """When to try again, or to ask whether there is something new to try."""
        if waited_for:
            return min(self.next_for_waiters, self.next_question)
        return min(self.next_for_asked, self.next_for_nobody) if asked else self.next_for_nobody

    def asks(self, now: float) -> bool:
        """Whether what is due now is the question only, and no attempt."""
        return not self.heals and now < self.next_for_waiters

    def is_hopeless(self, now: float) -> bool:
        """Whether to send borrowers away at once: nothing new can be tried, and the last try was refused.

        Where it may have changed they wait for the next question, 0.2 s at most.
        """
        return self.asks(now) and self.next_question == NEVER

    def unchanged(self, now: float) -> None:
        """It was asked, and there is nothing new to try."""
        self.questions += 1
        self.next_question = now + self._question_delay()

    def _question_delay(self) -> float:
        return retry_delay(self.questions + 1, 0.0, waited_for=True, sqlstate=None, random=0.0)
