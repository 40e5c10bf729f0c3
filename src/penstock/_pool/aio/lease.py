"""The lease of an asyncio pool: the right to use one slot, with a beginning and an end.

One job: the two ends of a borrow, as fast as Python allows. `AsyncLease` is the plain one: it awaits
nothing when a clean slot is idle, and nothing when a clean one is given back. `AsyncCarefulLease` is
for pools and borrows with options.

It must not know: how a slot is found when none is idle, how a connection is cleaned; it asks its
pool. No lock, and none is needed: between two awaits nobody else runs on this loop.

The rules of an interrupt are `_pool/sync/lease.py`'s. A cancellation is simpler: it arrives at an await, and
those of a lease are all in its pool's `_borrow_...` and `_give_back`, which see to it.
"""

from __future__ import annotations

from asyncio import current_task
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from penstock._machine.machine import LOOK_AGAIN
from penstock._pool.two_ends import refuse_to_enter, refuse_to_leave
from penstock._process import fork
from penstock._process.clock import clock
from penstock._process.fork import page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from penstock._machine.slot import Slot
    from penstock._pool.aio.borrowing import AsyncBorrowing
    from penstock._pool.two_ends import Entering

ConnT = TypeVar("ConnT")


class AsyncLease(Generic[ConnT]):
    """``async with pool.connection() as conn``: commits at the end, or rolls back on an exception.

    It has no ``__init__``: the pool makes it and sets its two attributes.
    """

    __slots__ = ("_pool", "_slot")

    _pool: AsyncBorrowing
    _slot: Slot | Entering | None

    async def __aenter__(self) -> ConnT:
        pool = self._pool
        if self._slot is not None:
            return await self._enter_again()
        self._slot = pool._entering
        slot = None
        try:
            # The thread, since a loop runs in one; the task, since a thread may run another loop.
            if page[0] and get_ident() == pool._thread:
                task = current_task(pool._loop)
                if task is not None:
                    slot = pool._machine.take(clock(), id(task))
            if slot is None:
                return await self._enter_slowly()
            self._slot = slot
            link = slot.link
            link.lend()
            return link.conn  # type: ignore[no-any-return]  # a slot's link is opaque to the machine
        except BaseException:
            slot = self._slot = None
            pool._cut_short()
            raise

    async def _enter_again(self) -> ConnT:
        """Somebody is inside: MisuseError, unless a fork or the end of a loop has left it behind."""
        refuse_to_enter(self)
        return await self.__aenter__()

    async def _enter_slowly(self) -> ConnT:
        """Wait for a slot, and lend it; here, so that the hot path has nothing to clear."""
        if not page[0]:  # the mark that was just set is the parent's, too
            self._slot = None
            fork.noticed()
            return await self.__aenter__()
        slot = await self._pool._borrow_slowly()
        try:
            self._slot = slot
            slot.link.lend()
            return slot.link.conn  # type: ignore[no-any-return]  # as above
        finally:
            del slot

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        slot = self._slot
        if not slot:
            refuse_to_leave(self, error)
            return
        self._slot = None
        try:
            if exc_type is None and slot.link.park():
                answer = self._pool._machine.put(slot)
                if not answer:  # DONE
                    return
                if answer == LOOK_AGAIN:  # the slot is not ours any more
                    self._pool._look_again()
                    return
            place = [slot]
            slot = None  # what awaits below holds it, and nobody else
            await self._pool._give_back(place, error)
        except BaseException:
            slot = None
            self._pool._cut_short()
            raise


class AsyncCarefulLease(AsyncLease[ConnT]):
    """A lease with options: its own timeout, autocommit or settings, or a pool that wants more."""

    __slots__ = ("_autocommit", "_settings", "_timeout", "_transaction")

    _timeout: float | None
    _autocommit: bool | None
    _settings: Mapping[str, Any] | None
    _transaction: bool

    async def __aenter__(self) -> ConnT:
        if not page[0]:
            fork.noticed()
        pool = self._pool
        if self._slot is not None:
            return await self._enter_again()
        self._slot = pool._entering
        slot = None
        try:
            slot = await pool._borrow_carefully(
                self._timeout, self._autocommit, self._settings, transaction=self._transaction
            )
            self._slot = slot
            return slot.link.conn  # type: ignore[no-any-return]  # as above
        except BaseException:
            self._slot = None
            pool._cut_short()
            raise
        finally:
            slot = None

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        slot = self._slot
        if not slot:
            refuse_to_leave(self, error)
            return
        self._slot = None
        place = [slot]
        slot = None
        try:
            await self._pool._give_back(place, error)
        except BaseException:
            self._pool._cut_short()
            raise
