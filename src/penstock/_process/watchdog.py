"""A deadline for what cannot have one of its own: the user's code on a connection.

One job: when the time is up, have the keeper shut the connection's socket down; whatever blocks on it
fails a millisecond later (measured for psycopg 3 and psycopg2), in the thread that blocks.

It must not know: what is being done. `_lock` decides who is first, the end of the work or the alarm:
once `disarm` has returned, the connection is not touched any more. It is held for one system call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from penstock._process import keeper, runtime
from penstock._process.clock import clock

if TYPE_CHECKING:
    from types import TracebackType

FOREVER = float("inf")


class Alarm:
    """``with Alarm(link, seconds):`` shuts the link down if the block takes longer.

    In a forked child nothing rings: a shutdown would act on the parent's session.

    Attributes:
        rang: the time was up.
    """

    __slots__ = ("_armed", "_link", "_lock", "_seconds", "rang")

    def __init__(self, link: Any, seconds: float) -> None:
        self._link = link
        self._seconds = seconds
        self._lock = runtime.Lock()
        self._armed = False
        self.rang = False

    def __enter__(self) -> Self:
        if self._seconds != FOREVER:
            self._armed = True
            keeper.current().ring_at(self, clock() + self._seconds)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._armed = False
        keeper.current().forget_alarm(self)

    def ring(self) -> None:
        """In the keeper: the time is up, unless the block has ended.

        The keeper never waits here: whoever has the lock is ending the block.
        """
        if not self._lock.take(0):
            return
        try:
            if self._armed:
                self.rang = True
                self._link.discard()
        finally:
            self._lock.release()
