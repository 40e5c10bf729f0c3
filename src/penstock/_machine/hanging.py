"""Openings whose worker does not come back: until when one may take, and how often another is begun beside them.

One job: say when a right is taken back from an opening (`Progress.until`), remember those whose right was taken
back until their worker has come (`Hanging`), and space what is begun meanwhile.

Parts of an opening have no end of their own: a token service that says nothing (conninfo=, kwargs=), a configure=
that waits for something else than its connection, a name server. Their threads cannot be ended, so each attempt
may cost one more, for good. The further attempts come ever more rarely: after a minute about 15 hang, after an
hour about 120, and a service that is well again is found within 8 s, or a minute.

It must not know: what a worker does, threads, what an error says. `Progress` is written by the worker that
has the slot, and read without a lock; the rest is called under the runtime's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .slot import SlotRef

#: How long one connect may take, in seconds, unless the user gave connect_timeout. It outlives the borrower who
#: caused it, so that a slow server can be reached by impatient borrowers. The user's callables have as long before it.
CONNECT_SECONDS: Final = 10.0

#: The same for one that is tried beside others that are not answered (`Slot.brief`): one of those has the
#: whole time, so that a server that takes longer than this is reached all the same.
BRIEF_SECONDS: Final = 3.0

#: Seconds more before a right is taken back: what has an end of its own (an alarm, a cancellation) comes first, and
#: says better what was the matter.
GRACE: Final = 0.5

#: Each round of hanging attempts has the next wait so much longer, in seconds.
EVERY: Final = 0.5
#: Attempts that began within so many seconds are one round: a pool's first wave, say.
ONE_ROUND: Final = 1.0


class Progress:
    """How far an opening has come: its worker writes, the machine reads. Each write is one store.

    Attributes:
        until: when the right is taken back, unless the worker has come to the next part by then.
        doing: which of the user's callables is running; None: none is.
        since: when that began.
        found: what is known of its failure while more is being found out; opaque here.
        taken_back: the right has been taken back: the worker may stop.
    """

    __slots__ = ("doing", "found", "since", "taken_back", "until")

    def __init__(self, now: float, seconds: float) -> None:
        self.doing: str | None = None
        self.since = now
        self.until = now + seconds + GRACE
        self.found: object = None
        self.taken_back = False

    def comes_to(self, doing: str | None, now: float, seconds: float) -> None:
        """The next part begins, and may take `seconds`."""
        self.until = now + seconds + GRACE  # first: who sees the name sees how long it may take
        self.since = now
        self.doing = doing


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
