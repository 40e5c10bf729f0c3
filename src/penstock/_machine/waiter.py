"""A borrower in the queue, and why one is sent away.

One job: name them. Who is served when is the machine's (`machine.py`).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .slot import Slot


class Refusal(Enum):
    """Why a borrower is sent away."""

    CLOSED = "closed"
    TOO_MANY = "too many waiting"
    UNREACHABLE = "the server cannot be reached, and trying again cannot help"
    DEADLOCK = "would wait for itself"


class Waiter:
    """A borrower in the queue. Whoever waits holds it; the queue refers to it weakly.

    Attributes:
        owner: who waits, to be compared with `Slot.holder`; 0 when unknown.
        keeps: serials of the slots that cannot come back while it waits: the runtime has seen that it
            is this waiter who gives them back.
        wake: lets the borrower run; a C function that may be called more than once.
        slot: what was given to it. Its state tells whether a ping is due before it is used.
        refusal: why it gets nothing.
        ticket: its key in the queue, 0 before it queued.
        queued_at: since when it waits.
        unanswered: when the first ping was sent that was not answered while it waited, by whomever; or None.
        silent_since: set when its time is up: since when the server has owed an answer, if that is why it
            got nothing.
    """

    __slots__ = (
        "__weakref__",
        "keeps",
        "owner",
        "queued_at",
        "refusal",
        "silent_since",
        "slot",
        "ticket",
        "unanswered",
        "wake",
    )

    def __init__(self, owner: int, wake: Callable[[], object]) -> None:
        self.owner = owner
        self.keeps: Collection[int] = ()
        self.wake = wake
        self.slot: Slot | None = None
        self.refusal: Refusal | None = None
        self.ticket = 0
        self.queued_at = 0.0
        self.unanswered: float | None = None
        self.silent_since: float | None = None
