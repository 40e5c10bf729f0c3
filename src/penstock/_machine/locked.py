"""The machine for interpreters without a global lock.

One job: call the two hot moves under the runtime's lock. Publish-then-look (machine.py, facts 1 and
2) needs an order that two deque calls do not promise there. Correct, not tuned.

It must not know what the lock is: `take(seconds)` says whether it could be had, `release()` gives it back, and the
same thread may take it twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .machine import SLOWLY, Machine

if TYPE_CHECKING:
    from .slot import Slot
    from .waiter import Waiter

#: Far beyond a move, in seconds: whoever has the lock for so long is stopped in the middle of one.
BRIEFLY: Final = 0.5


class LockedMachine(Machine):
    """A machine whose hot moves take the pool's lock; the pool gives a new one after a fork."""

    __slots__ = ("lock",)

    def __init__(self, lock: Any, *args: Any, **kwargs: Any) -> None:
        self.lock = lock
        super().__init__(*args, **kwargs)

    def take(self, now: float, holder: int) -> Slot | None:
        """Take, under the lock; nothing where that is not free: the slow way waits as long as it may."""
        lock = self.lock
        if not lock.take(BRIEFLY):
            return None
        try:
            return super().take(now, holder)
        finally:
            lock.release()

    def put(self, slot: Slot) -> int:
        """Put, under the lock; slowly where that is not free."""
        lock = self.lock
        if not lock.take(BRIEFLY):
            return SLOWLY
        try:
            return super().put(slot)
        finally:
            lock.release()

    def waiting(self) -> list[Waiter]:
        """Everybody who waits, under the lock: there an ordered dictionary is not read while it changes.

        Not where it is not free: what this is asked for, an error, must not wait.
        """
        lock = self.lock
        if not lock.take(BRIEFLY):
            return []
        try:
            return super().waiting()
        finally:
            lock.release()
