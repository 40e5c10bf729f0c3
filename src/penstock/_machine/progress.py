"""How far an opening has come, and until when it may take.

One job: say when the right to open is taken back from a worker (`Progress.until`). It must not know: what
becomes of the worker then (hanging.py), what an error says. `Progress` is written by the worker that has
the slot, and read without a lock.
"""

from __future__ import annotations

from typing import Final

#: How long one connect may take, in seconds, unless the user gave connect_timeout. It outlives the borrower who
#: caused it, so that a slow server can be reached by impatient borrowers. The user's callables have as long before it.
CONNECT_SECONDS: Final = 10.0

#: The same for one that is tried beside others that are not answered (`Slot.brief`): one of those has the
#: whole time, so that a server that takes longer than this is reached all the same.
BRIEF_SECONDS: Final = 3.0

#: Seconds more before a right is taken back: what has an end of its own (an alarm, a cancellation) comes first, and
#: says better what was the matter.
GRACE: Final = 0.5


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
