"""Does the server say nothing? Told from what is under way.

One job: since when the server owes an answer, where that is the reason why nobody could be served, and which
connects have had none for so long that they must not keep the pool from asking again. A host that is frozen
breaks nothing and refuses nothing, so there is no failed attempt to report: there are connects and pings that
do not end.

It must not know: the queue, orders, how a ping is made. Pure functions of slots and times.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final

from .slot import SlotState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .slot import Slot, SlotRef

#: Seconds that a server may take for an answer before it is called silent: a login with TLS and SCRAM over a
#: long line takes half of it.
SILENCE: Final = 0.5
#: And so many times what a connect usually takes, so that a server that is always slow is no silent one.
TIMES_USUAL: Final = 4.0

#: Seconds after which a connect that was not answered is left to itself, and another is tried: a server that
#: answers new ones again is found a second later, and one that does not has one connect a second from us.
PATIENCE: Final = 1.0
#: The same for a server that is slow as a rule (TIMES_USUAL), at most: one late answer makes a long mean.
LONGEST_PATIENCE: Final = 3.0
#: At most so many are tried beside silent ones at a time.
PROBES: Final = 4
#: So many of the pool's rights are kept for them while its first connects are not answered; in a small pool
#: connects with little time have them, and give them back soon.
RESERVE: Final = 3
#: A pool of one has no right beside: every so manieth attempt has the whole time, the others little.
LONG_ONE_OF: Final = 4


def patience(usual: float) -> float:
    """Seconds that a connect may take before it is left to itself; `usual`: see `silent_since`."""
    return min(max(PATIENCE, TIMES_USUAL * usual), LONGEST_PATIENCE)


class Silence:
    """What the connects under way say of the server.

    Attributes:
        under_way: how many may still be answered soon.
        since: when the youngest of the others began; None: there is none.
        brief: how many have a short time, since they were begun beside silent ones.
        patient: whether one has the whole time that a connect may take.
    """

    __slots__ = ("brief", "patient", "since", "under_way")

    def __init__(self, opening: Iterable[SlotRef], now: float, usual: float) -> None:
        self.under_way = self.brief = 0
        self.since: float | None = None
        self.patient = False
        wait = patience(usual)
        for ref in opening:
            self._look_at(ref(), now, wait)

    def _look_at(self, slot: Slot | None, now: float, wait: float) -> None:
        if slot is None:  # lost to an interrupt, and on its way home
            self.under_way += 1
            return
        self.brief += slot.brief
        self.patient = self.patient or not slot.brief
        if now < slot.opened_at + wait:
            self.under_way += 1
        elif self.since is None or slot.opened_at > self.since:
            self.since = slot.opened_at

    def is_general(self, answered_at: float) -> bool:
        """Whether nothing was answered since: one connect that is lost beside others that succeed is no silence."""
        return self.since is not None and self.since >= answered_at


def silent_since(
    slots: Iterable[Slot], unanswered: float | None, now: float, usual: float
) -> float | None:
    """Since when the server has owed an answer, if it is silent; None if it is not known to be.

    A pool that is merely full, with a slow connect beside, is not silent: more of its slots must be waiting for the
    server than are lent, and none may be idle.

    Args:
        slots: the pool's.
        unanswered: since when the borrower who asks has waited for a ping that was not answered, or None.
        now: the time.
        usual: seconds that opening a connection usually takes; 0.0: none was opened yet.
    """
    lent = 0
    asked: list[float] = []
    for slot in slots:
        if slot.state is SlotState.IDLE:
            return None
        if slot.state is SlotState.IN_USE:
            lent += 1
        elif slot.state is SlotState.OPENING:
            asked.append(slot.opened_at)
        elif slot.state is SlotState.PINGING:
            asked.append(slot.asked_at)
    if lent and lent >= len(asked):
        return None
    if unanswered is not None:
        asked.append(unanswered)
    since = min(asked, default=now)
    return since if now - since >= max(SILENCE, TIMES_USUAL * usual) else None


def hanging_since(slots: Iterable[Slot], now: float, usual: float) -> float | None:
    """Since when a callable of the user's has kept the oldest opening; None: none has, or not for long.

    Unlike a server's silence it is known, so it does not count how many connections are lent.

    Args:
        slots: the pool's.
        now: the time.
        usual: as in `silent_since`.
    """
    opening = [slot for slot in slots if slot.state is SlotState.OPENING]
    oldest = min(opening, key=attrgetter("opened_at"), default=None)
    progress = None if oldest is None else oldest.progress
    if progress is None or progress.doing is None:
        return None
    since = progress.since
    return since if now - since >= max(SILENCE, TIMES_USUAL * usual) else None
