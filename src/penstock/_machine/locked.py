"""The machine for interpreters without a global lock.

One job: call the two hot moves under the runtime's lock. Publish-then-look (machine.py, facts 1 and
2) needs an order that two deque calls do not promise there. Correct, not tuned.

It must not know what the lock is: whatever `with` takes, and the same thread may take twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .machine import Machine

if TYPE_CHECKING:
    from .slot import Slot


class LockedMachine(Machine):
    """A machine whose hot moves take the pool's lock; the pool gives a new one after a fork."""

    __slots__ = ("lock",)

    def __init__(self, lock: Any, *args: Any, **kwargs: Any) -> None:
        self.lock = lock
        super().__init__(*args, **kwargs)

    def take(self, now: float, holder: int) -> Slot | None:
        """Take, under the lock."""
        with self.lock:
            return super().take(now, holder)

    def put(self, slot: Slot) -> int:
        """Put, under the lock."""
        with self.lock:
            return super().put(slot)
