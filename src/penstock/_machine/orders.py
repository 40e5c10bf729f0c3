"""Orders: what the machine asks of a runtime, instead of doing it.

One job: name them. An order in flight owns its slot: it holds the only strong reference, so an
order that is lost to an interrupt frees the slot, and the keeper brings it home.

Waking a waiter is no order: a wake-up postponed can be a wake-up lost, so the machine calls the
function that the waiter brought with it (see `machine.Waiter.wake`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .slot import Reason, Slot


@dataclass(frozen=True, slots=True)
class Open:
    """Open a connection for this slot, then tell `Machine.opened` or `Machine.open_failed`.

    `if_changed`: only if it would be tried with something else than what was refused (the user's callable gives
    another password, a file was replaced); else tell `Machine.unchanged`, and leave the server alone.
    """

    slot: Slot
    if_changed: bool = False


@dataclass(frozen=True, slots=True)
class TakeBack:
    """This opening has had all its time: say what it hangs at to `Machine.take_back`, which takes the right back."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Close:
    """End this slot's connection, then tell `Machine.closed`.

    `discard`: without a word to the server, since it is not there any more, or since somebody
    may still be using the connection.
    """

    slot: Slot
    reason: Reason
    discard: bool


@dataclass(frozen=True, slots=True)
class TickAt:
    """Call `Machine.tick` at this time, or earlier."""

    when: float


@dataclass(frozen=True, slots=True)
class Overdue:
    """Warn, once, that this slot has been lent for longer than promised."""

    slot: Slot
    seconds: float


@dataclass(frozen=True, slots=True)
class ReportOutage:
    """Tell the user, once, that no connection could be opened for `reconnect_timeout`."""

    seconds: float


Order = Open | TakeBack | Close | TickAt | Overdue | ReportOutage
