"""The lease: the right to use one slot, with a beginning and an end.

One job: the two ends of a borrow, as fast as Python allows. `Lease` is the plain one; `CarefulLease`
is for pools and borrows with options (`on_borrow`, `settings`, a reset, ...), which cost more.

A lease serves one block at a time (_pool/two_ends.py): whoever would store a slot over another's is
refused. On the hot path the slot itself says that somebody is inside, a borrower that has to wait
stores the pool's `Entering` before.

It must not know: how a slot is found when none is idle, how a connection is cleaned; it asks its
pool. It takes no lock. Who borrows is asked of `threading` each time, and not kept by name: gevent
replaces `get_ident` when it patches, and all greenlets of a thread have one native number.

The rules of an interrupt (it can strike after any call of a C function):

* the lease is cleared *before* the slot is put back, so that nobody holds what others may lend; a
  guard clears it if it was this borrower's;
* a guard drops its references and never puts a slot back: no flag can know whether the slot has
  gone back already, the reference count does, and a slot that nobody holds comes home by itself;
* what is still in a local variable of a frame would be held by a stored traceback, so a guard
  clears that, too; and a frame that returns clears it where a ping, a wait or the user's code ran
  below it: an error that was caught there and kept (in a log's record) keeps all frames above it;
* a guard tells the pool (`_cut_short`): a slot may have been stored with a waiter who was not woken,
  or appended while somebody queued up, and a waiter must not sit out his timeout beside it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from penstock._machine.machine import IDLE, IN_USE, LOOK_AGAIN
from penstock._pool.two_ends import (
    Entering,
    InTurns,
    refuse_to_enter,
    refuse_to_leave,
)
from penstock._process import fork
from penstock._process.clock import clock
from penstock._process.fork import page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from penstock._machine.slot import Slot
    from penstock._pool.sync.borrowing import Borrowing

ConnT = TypeVar("ConnT")


class Lease(Generic[ConnT]):
    """``with pool.connection() as conn``: commits at the end, or rolls back on an exception.

    It has no ``__init__``: the pool makes it and sets its two attributes, which saves 40 ns.
    """

    __slots__ = ("_pool", "_slot")

    _pool: Borrowing
    _slot: Slot | Entering | None

    def __enter__(self) -> ConnT:
        pool = self._pool
        slot: Any = None
        try:
            if page[0]:
                slot = pool._machine.take(clock(), threading.get_ident())
            if slot is None:
                if self._slot is not None:
                    return self._enter_again()
                slot = self._slot = pool._entering
                return self._enter_slowly()
            if self._slot is not None:
                pool._give_back(slot, None)
                slot = None
                return self._enter_again()
            self._slot = slot
            link = slot.link
            link.lend()
            return link.conn  # type: ignore[no-any-return]  # a slot's link is opaque to the machine
        except BaseException:
            if self._slot is slot or slot.__class__ is Entering:  # else another borrower's
                self._slot = None
            slot = None
            pool._cut_short()
            raise

    def _enter_again(self) -> ConnT:
        """Somebody is inside: MisuseError, unless a fork has left him behind."""
        self._refuse_to_enter()
        return self.__enter__()

    def _refuse_to_enter(self) -> None:
        refuse_to_enter(self)

    def _drop(self) -> None:
        """In a guard: what it has comes home by itself."""
        self._slot = None
        self._pool._cut_short()

    def _enter_slowly(self) -> ConnT:
        """Wait for a slot, and lend it; here, so that the hot path has nothing to clear."""
        if not page[0]:  # the mark that was just set is the parent's, too
            self._slot = None
            fork.noticed()
            return self.__enter__()
        slot = self._pool._borrow_slowly()
        try:
            self._slot = slot
            slot.link.lend()
            return slot.link.conn  # type: ignore[no-any-return]  # as above
        finally:
            del slot

    def __exit__(
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
            self._pool._give_back(slot, error)
            slot = None
        except BaseException:
            slot = None
            self._pool._cut_short()
            raise


class PgconnLease(Lease[ConnT]):
    """`Lease` for links of psycopg's shape, with everything it calls written out.

    Four calls less (`take`, `put`, `lend`, `park`) are 180 of 700 ns, and the difference between
    slower and faster than a pool that never waits and never checks. The lines are the machine's and
    the link's own: tests/machine/test_written_out.py holds that they stay the same, and the
    interleaver steps through them as well.
    """

    __slots__ = ()

    def __enter__(self) -> ConnT:
        pool = self._pool
        slot: Any = None
        try:
            if page[0]:
                machine = pool._machine
                now = clock()
                try:
                    slot = machine._pop()
                except IndexError:
                    slot = None
                else:
                    if (
                        slot.epoch == machine.epoch
                        and now < slot.retire_at
                        and now - slot.borrowed_at < machine.ping_after
                    ):
                        slot.holder = threading.get_ident()
                        slot.borrowed_at = now
                        slot.state = IN_USE
                        if self._slot is not None:
                            pool._give_back(slot, None)
                            slot = None
                            return self._enter_again()
                        self._slot = slot
                        link = slot.link
                        link.attributes["pgconn"] = link.handle
                        return link.conn  # type: ignore[no-any-return]  # as above
                    machine.aside.append(slot)
                    slot = None
            if self._slot is not None:
                return self._enter_again()
            slot = self._slot = pool._entering
            return self._enter_slowly()
        except BaseException:
            if self._slot is slot or slot.__class__ is Entering:  # else another borrower's
                self._slot = None
            slot = None
            pool._cut_short()
            raise

    def __exit__(
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
            if exc_type is None:
                link = slot.link
                link.attributes["pgconn"] = link.dead
                handle = link.handle
                machine = self._pool._machine
                if not (
                    # IDLE and OFF are 0 in libpq.
                    handle.transaction_status
                    or handle.pipeline_status
                    or link.touched
                    or machine.waiters
                    or slot.epoch != machine.epoch
                ):
                    slot.ref.borrows += 1  # type: ignore[union-attr]  # the epoch: it is ours
                    slot.state = IDLE
                    machine.idle.append(slot)
                    if machine.waiters:
                        self._pool._look_again()
                    return
            self._pool._give_back(slot, error)
            slot = None
        except BaseException:
            slot = None
            self._pool._cut_short()
            raise


class ClassLease(Lease[ConnT]):
    """`Lease` for links of psycopg2's shape, with everything it calls written out.

    As `PgconnLease`, for the same reason and held by the same test.
    """

    __slots__ = ()

    def __enter__(self) -> ConnT:
        pool = self._pool
        slot: Any = None
        try:
            if page[0]:
                machine = pool._machine
                now = clock()
                try:
                    slot = machine._pop()
                except IndexError:
                    slot = None
                else:
                    if (
                        slot.epoch == machine.epoch
                        and now < slot.retire_at
                        and now - slot.borrowed_at < machine.ping_after
                    ):
                        slot.holder = threading.get_ident()
                        slot.borrowed_at = now
                        slot.state = IN_USE
                        if self._slot is not None:
                            pool._give_back(slot, None)
                            slot = None
                            return self._enter_again()
                        self._slot = slot
                        link = slot.link
                        link.real.__class__ = link.live
                        return link.conn  # type: ignore[no-any-return]  # as above
                    machine.aside.append(slot)
                    slot = None
            if self._slot is not None:
                return self._enter_again()
            slot = self._slot = pool._entering
            return self._enter_slowly()
        except BaseException:
            if self._slot is slot or slot.__class__ is Entering:  # else another borrower's
                self._slot = None
            slot = None
            pool._cut_short()
            raise

    def __exit__(
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
            if exc_type is None:
                link = slot.link
                conn = link.real
                conn.__class__ = link.dead
                machine = self._pool._machine
                if not (
                    link.status()  # IDLE is 0 in libpq, and READY 1 in psycopg2
                    or conn.status != 1
                    or link.touched
                    or link.odd_types
                    or machine.waiters
                    or slot.epoch != machine.epoch
                ):
                    slot.ref.borrows += 1  # type: ignore[union-attr]  # the epoch: it is ours
                    slot.state = IDLE
                    machine.idle.append(slot)
                    if machine.waiters:
                        self._pool._look_again()
                    return
            self._pool._give_back(slot, error)
            slot = None
        except BaseException:
            slot = None
            self._pool._cut_short()
            raise


class CarefulLease(Lease[ConnT]):
    """A lease with options: its own timeout, autocommit or settings, or a pool that wants more.

    What more costs is paid here and not by plain borrows.
    """

    __slots__ = ("_autocommit", "_settings", "_timeout")

    _timeout: float | None
    _autocommit: bool | None
    _settings: Mapping[str, Any] | None

    def __enter__(self) -> ConnT:
        if not page[0]:
            fork.noticed()
        pool = self._pool
        if self._slot is not None:
            return self._enter_again()
        self._slot = pool._entering
        slot = None
        try:
            slot = pool._borrow_carefully(self._timeout, self._autocommit, self._settings)
            self._slot = slot
            return slot.link.conn  # type: ignore[no-any-return]  # as above
        except BaseException:
            self._slot = None
            pool._cut_short()
            raise
        finally:
            slot = None

    def __exit__(
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
            if exc_type is None:
                slot.link.park()  # as a plain lease does
            self._pool._give_back(slot, error)
            slot = None
        except BaseException:
            slot = None
            self._pool._cut_short()
            raise


class LeaseInTurns(InTurns, Lease[ConnT]):
    """`Lease` for interpreters without a global lock."""

    __slots__ = ("_round",)

    _round: dict[str, object]


class CarefulLeaseInTurns(InTurns, CarefulLease[ConnT]):
    """`CarefulLease` for interpreters without a global lock."""

    __slots__ = ("_round",)

    _round: dict[str, object]
