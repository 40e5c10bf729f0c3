"""Openings whose worker does not come back, and how often another is begun beside them.

One job: remember the openings whose right was taken back until their worker has come, and space what is begun
meanwhile. When a right is taken back is progress.py's.

Parts of an opening have no end of their own: a token service that says nothing (conninfo=, kwargs=), a configure=
that waits for something else than its connection, a name server. Their threads cannot be ended, so each attempt
may cost one more, for good. The further attempts come ever more rarely: after a minute about 15 hang, after an
hour about 120, and a service that is well again is found within 8 s, or a minute.

It must not know: what a worker does, threads, what an error says. It is called under the runtime's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .slot import SlotRef

#: Each round of hanging attempts has the next wait so much longer, in seconds.
EVERY: Final = 0.5
#: Attempts that began within so many seconds are one round: a pool's first wave, say.
ONE_ROUND: Final = 1.0


class Hanging:
    """The openings whose right was taken back and whose worker has not come.

    Attributes:
        closing: those whose worker brought a link after all, until it is closed: a fork must find it.
    """

    __slots__ = ("_began", "_refs", "begun_at", "came_at", "closing")

    def __init__(self) -> None:
        self.closing: dict[int, SlotRef] = {}
        self._refs: dict[int, SlotRef] = {}
        self._began: dict[int, float] = {}
        self.begun_at = self.came_at = float("-inf")

    def __len__(self) -> int:
        return len(self._refs)

    def begins(self, now: float) -> None:
        """One more is opened."""
        self.begun_at = now

    def add(self, ref: SlotRef, began: float) -> None:
        """The right of this one is taken back; repeatable."""
        self._began[ref.serial] = began
        self._refs[ref.serial] = ref

    def came(self, ref: SlotRef | None, now: float) -> bool:
        """A worker has come; whether it is one of these. One that is not came in time: things go on again."""
        if ref is None or not self.has(ref):
            self.came_at = now
            return False
        self.forget(ref)
        return True

    def has(self, ref: SlotRef) -> bool:
        """Whether this one's right was taken back, and its worker has not come."""
        return self._refs.get(ref.serial) is ref

    def forget(self, ref: SlotRef) -> None:
        """This one's worker is gone with the slot, or what it brought is closed; repeatable."""
        if self.closing.get(ref.serial) is ref:
            self.closing.pop(ref.serial)
        if self.has(ref):
            self._began.pop(ref.serial, None)
            self._refs.pop(ref.serial)

    def next_at(self) -> float:
        """When one more may be begun; in the past if none hangs, or if one that began later came in time."""
        rounds, last = 0, float("-inf")
        for began in self._began.values():  # as they were taken back: in rounds, nearly in order
            if began > self.came_at and abs(began - last) > ONE_ROUND:
                rounds, last = rounds + 1, began
        return self.begun_at + EVERY * rounds if rounds else float("-inf")
