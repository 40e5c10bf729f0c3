"""Does the server say nothing? Told from what is under way, when a borrower's time is up.

One job: since when the server owes an answer, where that is the reason why nobody could be served. A host that
is frozen breaks nothing and refuses nothing, so there is no failed attempt to report: there are connects and
pings that do not end.

It must not know: the queue, orders, how a ping is made. Pure functions of slots and times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .slot import SlotState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .slot import Slot

#: Seconds that a server may take for an answer before it is called silent: a login with TLS and SCRAM over a
#: long line takes half of it.
SILENCE: Final = 0.5
#: And so many times what a connect usually takes, so that a server that is always slow is no silent one.
TIMES_USUAL: Final = 4.0


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
    lent, asked = 0, []
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
    since = min([*asked, *([] if unanswered is None else [unanswered])], default=now)
    return since if now - since >= max(SILENCE, TIMES_USUAL * usual) else None
