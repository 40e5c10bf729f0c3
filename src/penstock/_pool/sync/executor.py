"""The half of a pool that works in the keeper's thread and its workers: it carries out orders.

One job: open and close connections as the machine orders, have the watcher look after them, tick,
bring orphaned slots home, and say in the log what people should know.

It must not know: who waits for what, how a connection is given back, what the user called. It takes
the pool's `_lock` for one move of the machine at a time, and never while it connects or closes. The
keeper and the workers wait for it as long as it takes; what users call, as long as the user would.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from penstock._drivers import gevent_waits
from penstock._machine.orders import Close, Open, Order, Overdue, ReportOutage, TakeBack, TickAt
from penstock._machine.progress import BRIEF_SECONDS, CONNECT_SECONDS
from penstock._machine.slot import Reason, Slot, SlotRef
from penstock._pool.opener import (
    DIAGNOSE_SECONDS,
    DRIVER_GRACE,
    Failure,
    NotWanted,
    SameAgain,
    explain_hanging,
    go_on,
)
from penstock._pool.procedures import LONGEST_SLEEP
from penstock._process import keeper, runtime, watch
from penstock._process.clock import clock
from penstock.errors import PenstockError, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock._machine.machine import Machine
    from penstock._pool.opener import Opener
    from penstock._pool.reporter import Reporter
    from penstock._process.lock import Lock
    from penstock.config.pool_config import PoolConfig


#: So long a return waits for the pool's lock, in seconds.
RETURN_LOCK_SECONDS: Final = 5.0

#: Whoever has less time left waits for the pool's lock so long, in seconds. A move takes
#: microseconds, but on a busy machine the thread that makes it waits for its turn to run.
LEAST_LOCK_SECONDS: Final = 0.5

_log = logging.getLogger("penstock")


class Upkeep:
    """What the keeper sees of a pool."""

    name: str
    _config: PoolConfig
    _lock: Lock
    _timeout: float
    _machine: Machine
    _opener: Opener
    _reporter: Reporter
    _getconns: dict[int, Slot]
    _onlookers: list[Callable[[], object]]

    # -- the lock ---------------------------------------------------------------------------------

    def _take_lock(self, seconds: float) -> Lock:
        """Take the pool's lock for a borrower who has `seconds` left, and give it.

        Nothing may stand between this and the `try` that releases it (see `Lock`).

        Raises:
            PoolTimeout: whoever has it keeps it: a signal handler or a finalizer that waits for something
                may run in the middle of a move, in the thread that makes it.
        """
        lock = self._lock
        if lock.take(0.0):
            return lock  # mostly
        patience = min(max(seconds, LEAST_LOCK_SECONDS), LONGEST_SLEEP)
        if not lock.take(patience):
            raise self._reporter.locked(lock.owner(), max(seconds, 0.0), patience)
        return lock

    # -- moves of the pool as a whole -------------------------------------------------------------

    def _move(
        self,
        decide: Callable[[float], list[Order]],
        carry_out: Callable[[list[Order]], None] | None = None,
        *,
        seconds: float | None = None,
    ) -> None:
        """A move of the pool as a whole; what an interrupt cuts off, the keeper does.

        `seconds`: how long it waits for the lock; None: the pool's timeout.
        """
        try:
            lock = self._take_lock(self._timeout if seconds is None else seconds)
            try:
                orders = decide(clock())
            finally:
                lock.release()
            (carry_out or self._carry_out)(orders)
        except BaseException:
            self._cut_short()
            raise

    def _open_by(self, opener: Opener) -> Opener:
        """Have connections opened by another opener from now on, and those that are replaced.

        A seam for `pytest_penstock.undone`: the pool keeps its machine, its leases and its errors,
        and only what it opens is something else. First the opener, then the drain: what was opened
        before is of an older generation, and never lent. Returns the former opener.
        """
        former, self._opener = self._opener, opener
        self._move(self._machine.drain)
        return former

    def _doubt(self) -> None:
        """A statement was given up: idle connections are pinged before they are lent."""
        self._move(self._machine.doubt)

    def _ask(self) -> None:
        """Somebody decides by the pool's state whether it gets work. Takes no lock and opens nothing itself."""
        if self._machine.ask(clock()):
            keeper.current().tell(self._tick)

    def _look_again(self) -> None:
        """After a return: serve who began to wait meanwhile; where the lock is not free, the keeper does."""
        try:
            lock = self._take_lock(RETURN_LOCK_SECONDS)
        except PoolTimeout:
            keeper.current().tell(self._tick)
            return
        try:
            orders = self._machine.look_again(clock())
        finally:
            lock.release()
        self._carry_out(orders)

    def _cut_short(self) -> None:
        """In a guard: a move may have been cut in two; the tick repeats what is left of it.

        In the keeper, because one `put` in C is all that a second interrupt could cut off here.
        An error of penstock's own is a move that came to its end.
        """
        if not isinstance(sys.exception(), PenstockError):
            keeper.current().tell(self._tick)

    # -- orders -----------------------------------------------------------------------------------

    def _carry_out(self, orders: list[Order]) -> None:
        """Carry out and forget: a caller's list must not hold a slot that others borrow by now."""
        orders.reverse()
        while orders:
            self._carry_out_one(orders.pop(), keeper.current().tell)

    def _carry_out_here(self, orders: list[Order]) -> None:
        """Close in the calling thread: for close(), which is to have closed when it returns."""
        orders.reverse()
        while orders:
            self._carry_out_one(orders.pop(), _call)

    def _carry_out_one(self, order: Order, close: Callable[[Callable[[], object]], object]) -> None:
        match order:
            case Open(slot, if_changed):
                keeper.current().submit(partial(self._open_slot, [slot], if_changed=if_changed))
            case TakeBack(slot):
                self._take_back(slot)
            case Close():
                close(partial(self._close_slot, order))
            case TickAt(when):
                keeper.current().call_at(self._machine.home, when)  # type: ignore[arg-type]
            case Overdue(slot, seconds):
                self._warn_overdue(slot, seconds)
            case ReportOutage(seconds):
                self._report_outage(seconds)

    def _open_slot(self, place: list[Slot], *, if_changed: bool = False) -> None:
        """In a worker: open a connection for the slot in this place.

        Neither the job nor this frame holds the slot once the machine has it: else one that was lent
        and dropped would not come home, and would look as if its borrower had it still.
        """
        slot = place.pop()
        prepare_drivers()
        try:
            seconds = min(BRIEF_SECONDS, CONNECT_SECONDS) if slot.brief else CONNECT_SECONDS
            link = self._opener.open(seconds, if_changed=if_changed, progress=slot.progress)
            _watch(link, slot.ref)
        except SameAgain:
            self._unchanged(slot)
            return
        except BaseException as error:  # noqa: BLE001  also a SystemExit of a user's callable
            if self._machine.has(slot):
                self._open_failed(slot, error, may_change=not if_changed)
            else:  # its right was taken back; or it is the parent's, and this a forked child
                self._failed_late(slot)
            return
        with self._lock:
            outage = self._machine.outage
            orders = self._machine.opened(slot, link, clock())
            del slot
        self._carry_out(orders)
        self._tell_onlookers()
        if outage is not None:
            _log.warning("pool %r: connections can be opened again", self.name)

    def _unchanged(self, slot: Slot) -> None:
        with self._lock:
            orders = self._machine.unchanged(slot, clock())
        self._carry_out(orders)
        self._tell_onlookers()

    def _failed_late(self, slot: Slot) -> None:
        with self._lock:
            orders = self._machine.failed_late(slot, clock())
        self._carry_out(orders)

    def _take_back(self, slot: Slot) -> None:
        """In the keeper, mostly: this opening has had all its time."""
        if slot.progress is None:
            return  # it was opened just now
        failure = explain_hanging(slot.progress)
        with self._lock:
            before = self._machine.outage
            orders = self._machine.take_back(slot, failure, clock())
        if self._machine.has(slot):
            return  # it has come to its next part just now
        self._carry_out(orders)
        self._tell_onlookers()
        if before is None or before.error.text != failure.text:
            # In a worker: a log handler may block, or use this very pool.
            keeper.current().submit(partial(_warn_unreachable, self.name, failure))

    def _open_failed(self, slot: Slot, error: BaseException, *, may_change: bool) -> None:
        if slot.progress is not None:
            slot.progress.found = self._opener.explain_at_once(error)
        try:
            if slot.progress is not None:
                go_on(slot.progress, None, DIAGNOSE_SECONDS + DRIVER_GRACE)
        except NotWanted:
            self._failed_late(slot)
            return
        failure = self._opener.explain(error)
        del error
        may_change = may_change and self._opener.may_change()
        with self._lock:
            before = self._machine.outage
            orders = self._machine.open_failed(
                slot,
                failure,
                clock(),
                heals=failure.heals,
                sqlstate=failure.sqlstate,
                may_change=may_change,
            )
        self._carry_out(orders)
        self._tell_onlookers()
        if before is None or before.error.text != failure.text:
            _warn_unreachable(self.name, failure)

    def _close_slot(self, order: Close) -> None:
        """In the keeper, or in close(): end this slot's connection."""
        slot = order.slot
        link = slot.link
        if link is not None:
            _end_link(link, order)
            slot.link = None
        with self._lock:
            orders = self._machine.closed(slot, order.reason, clock())
        self._carry_out(orders)
        self._tell_onlookers()

    def _warn_overdue(self, slot: Slot, seconds: float) -> None:
        holder = self._reporter.holder_of(slot)
        # In a worker: a log handler may block, or use this very pool.
        warn = partial(
            _log.warning,
            "pool %r: a connection has been lent for %.0f s (overdue_after=%s): %s",
            self.name,
            seconds,
            self._config.overdue_after,
            holder or "its holder is not known",
        )
        keeper.current().submit(warn)

    def _report_outage(self, seconds: float) -> None:
        keeper.current().submit(partial(self._say_outage, seconds))

    def _say_outage(self, seconds: float) -> None:
        _log.error("pool %r: no connection could be opened for %.0f s", self.name, seconds)
        failed = self._config.reconnect_failed
        if failed is not None:
            failed(self)

    # -- what the keeper and the watcher call -----------------------------------------------------

    def _tick(self) -> None:
        with self._lock:
            orders = self._machine.tick(clock())
        self._carry_out(orders)

    def _bring_home(self, ref: SlotRef) -> None:
        with self._lock:
            orders = self._machine.bring_home(ref, clock())
        if orders:
            self._forget_lease_of(ref.link)
        self._carry_out(orders)

    def _forget_lease_of(self, link: Any) -> None:
        if link is not None:
            self._getconns.pop(id(link.conn), None)

    def _hung_up(self, ref: SlotRef) -> None:
        slot = ref()
        if slot is None:
            return  # orphaned: it is on its way home
        with self._lock:
            orders = self._machine.hung_up(slot, clock())
        self._carry_out(orders)

    def _tell_onlookers(self) -> None:
        for tell in list(self._onlookers):
            tell()


def prepare_drivers() -> None:
    """Before a connection is opened: on gevent, have the drivers' libraries wait in the hub."""
    if runtime.has_green_waits():
        gevent_waits.put_right()
    else:
        runtime.when_patched(gevent_waits.put_right)


def _call(job: Callable[[], object]) -> None:
    job()


def _warn_unreachable(name: str, failure: Failure) -> None:
    code = f" (SQLSTATE {failure.sqlstate})" if failure.sqlstate else ""
    _log.warning("pool %r: cannot open a connection: %s%s", name, failure.text, code)


def _watch(link: Any, ref: SlotRef | None) -> None:
    """Have the end of this session noticed; before it can be lent, so that none goes unnoticed."""
    if ref is None or link.fd < 0:
        return
    try:
        ref.watched = _watcher().add(link.fd, ref)
    except BaseException:
        link.discard()
        raise


def _end_link(link: Any, order: Close) -> None:
    ref = order.slot.ref
    if ref is not None and ref.watched:
        # Before the close, since numbers are reused; and by the serial, since libpq closes a broken
        # connection's socket by itself: the number may be another connection's already.
        _watcher().remove(link.fd, ref.watched)
    try:
        if order.reason is Reason.ORPHANED:
            link.park()  # somebody may still hold the connection: its next use raises
        if order.discard:
            link.discard()
        else:
            link.close()
    except Exception:  # noqa: BLE001  drivers promise not to; one that does must not keep the right
        _log.exception("a driver could not end a connection; it is dropped")


def _let_go_of(ref: SlotRef) -> None:
    """In the keeper: a slot's pool is garbage, and so is the slot, but not yet its connection.

    Without the watcher's reference Python closes it, politely, as soon as nobody holds it.
    """
    link, ref.link = ref.link, None
    if link is not None and ref.watched:
        _watcher().remove(link.fd, ref.watched)


keeper.on_stray(_let_go_of)


# -- one watcher per process ----------------------------------------------------------------------


def _told_of_end(ref: SlotRef, fd: int) -> None:
    """In the watcher's thread: flag the slot, and have the keeper see to it."""
    slot = ref()
    if slot is None or slot.ref is not ref:
        return
    link = slot.link
    if link is not None and link.fd != fd:
        return
    slot.condemn(Reason.HUNG_UP)
    pool = ref.home()
    if pool is not None:
        keeper.current().tell(partial(pool._hung_up, ref))


_watchers: dict[str, watch.Watch] = {}


def _watcher() -> watch.Watch:
    """The process's watcher; it sees to forks by itself."""
    known = _watchers.get("epoll")
    # setdefault is atomic: of two threads that get here together, both use one. The other one has
    # not been used, and has cost nothing.
    return known or _watchers.setdefault("epoll", watch.Watch(_told_of_end))
