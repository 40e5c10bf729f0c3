"""When is something due? Pure functions of slots and limits.

One job: say at what times a pool wants to be looked at, so that an idle one wakes nobody.

It must not know: what is done then (`Machine.tick`), which tick is ordered already (`Machine.armed`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .slot import Slot, SlotState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .policy import Limits

#: Seconds after which, at the latest, a pool in use looks for what is too old, or too many.
LOOK_LATER: Final = 60.0

#: The states of a slot whose connection somebody could still give back, or ping.
CONNECTED: Final = frozenset({SlotState.IDLE, SlotState.IN_USE, SlotState.PINGING})


def due_times(
    slots: list[Slot], limits: Limits, now: float, *, shrinkable: bool
) -> Iterator[float]:
    """When each thing that time brings to these slots is due, as far as the hot path lets us know.

    A slot's times only move later when it is borrowed, so a tick at an old one finds nothing to do
    and orders the right one. What comes due while a slot is in use can be done only when it is back,
    and giving back tells nobody: hence a look every LOOK_LATER seconds while there is traffic. Once
    all were idle for ping_after, the next borrow comes the slow way and tells.
    """
    traffic = False
    for slot in slots:
        if slot.state in CONNECTED:
            in_use = slot.state is not SlotState.IDLE
            traffic = traffic or in_use or now - slot.borrowed_at < limits.ping_after
            for due in _due_times_of(slot, limits, shrinkable=shrinkable):
                if due > now or not in_use:
                    yield due
    if traffic:
        yield now + min(limits.overdue_after, LOOK_LATER)


def _due_times_of(slot: Slot, limits: Limits, *, shrinkable: bool) -> Iterator[float]:
    yield slot.retire_at
    if shrinkable:
        yield slot.borrowed_at + limits.max_idle
    if slot.state is SlotState.IN_USE and not slot.told:
        yield slot.borrowed_at + limits.overdue_after
