"""ConnectionPool: the pool for threads. It carries out the machine's orders; it decides nothing.

Read `_machine/slot.py` and `_machine/machine.py` first. A borrow finds an idle slot without a lock
(`lease.py`). Everything else happens here: waiting, pinging, giving back what is not clean, opening
and closing through the keeper, forks.

It must not know: when to grow, whom to serve, how long to back off. An `if` about such things belongs
in `_machine`.

Locks: `_lock` protects the machine's slow moves. It is held for one move at a time, never while
anything blocks, and never around a loop (a loop is a function of its own: see machine.py,
"Interrupts"). It is an RLock because a signal handler may use the pool while the thread that it
interrupted is in a move. A forked child makes a new one.

Interrupts: whoever holds a slot in a local variable drops it when an exception passes; the slot then
comes home by itself (`slot.py`).
"""

from __future__ import annotations

import logging
import queue
import random
import sys
import threading
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, cast, overload

from penstock import _drivers, fork, keeper, watch
from penstock._drivers.protocol import Activity
from penstock._machine.machine import LOOK_AGAIN, Machine, Phase, Verdict, Waiter
from penstock._machine.orders import Close, Open, Order, Overdue, ReportOutage, TickAt
from penstock._machine.policy import Limits
from penstock._machine.slot import Reason, Slot, SlotRef, SlotState
from penstock.clock import clock
from penstock.config import PoolConfig
from penstock.errors import ConfigError, PenstockError
from penstock.lease import CarefulLease, Lease, PgconnLease
from penstock.opening import CONNECT_SECONDS, Failure, Opener
from penstock.reports import Health, Reporter
from penstock.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Unpack

    import psycopg
    from psycopg.rows import TupleRow

    from penstock._machine.tally import Stats
    from penstock.config import Options

ConnT = TypeVar("ConnT")

#: How long bringing a connection back to a clean state may take at the return, in seconds: a
#: rollback is one round trip, and a server that does not answer it in this time is not there.
TIDY_SECONDS: Final = 5.0

#: A ping may use this share of what the borrower has left, so that there is time for another
#: connection if it is not answered; at most PING_SECONDS.
PING_SHARE: Final = 0.5
PING_SECONDS: Final = 5.0

FOREVER: Final = float("inf")

_log = logging.getLogger("penstock")
new: Callable[[Any], Any] = object.__new__  # makes a lease, 40 ns sooner than calling its class
_names = iter(range(1, sys.maxsize))


class ConnectionPool(Generic[ConnT]):
    """A pool of connections for the threads of a process, and of its forked children.

    Making one opens nothing and never blocks: the first borrow in each process does, or `open()`.
    All options are described in docs/options.md; here are those that most people set.

    Args:
        conninfo: a libpq connection string or URL, or a callable that returns one, called per
            connect (for tokens that expire).
        connection_class: the driver's connection class (``psycopg.Connection`` by default).
        min_size: connections kept open (1).
        max_size: connections open at most (10).
        timeout: seconds a borrower waits for a connection, everything included (5.0).
        name: what the pool is called in errors, logs and pg_stat_activity.
        **options: the other options.

    Raises:
        ConfigError: an option is wrong; nothing was opened.
        DriverNotFoundError: the driver's library is not installed.
    """

    @overload
    def __init__(
        self: ConnectionPool[psycopg.Connection[TupleRow]],
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: None = None,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: type[ConnT],
        **options: Unpack[Options],
    ) -> None: ...

    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: type[ConnT] | None = None,
        **options: Any,
    ) -> None:
        self._set_up(PoolConfig(conninfo=conninfo, connection_class=connection_class, **options))

    def _set_up(self, config: PoolConfig) -> None:
        self._config = config
        self.name: str = config.name or f"pool-{next(_names)}"
        self._driver = (
            _drivers.load(config.driver) if isinstance(config.driver, str) else config.driver
        )
        self._timeout = FOREVER if config.timeout is None else config.timeout
        self._lease = _lease_class(self._driver)
        self._plain = _wants_nothing_special(config)
        self._lock = threading.RLock()
        self._opener = Opener(config, self._driver, self.name)
        self._machine = self._new_machine(config)
        self._reporter = Reporter(self.name, self._machine, self._driver)
        self._getconns: dict[int, Slot] = {}
        self._dedicated: dict[int, Any] = {}
        self._watchers: list[Callable[[], object]] = []
        fork.register(self)

    def _new_machine(self, config: PoolConfig) -> Machine:
        kind = Machine if _has_global_lock() else partial(LockedMachine, self._lock)
        return kind(
            _limits(config),
            orphans=keeper.current().inbox.put,
            random=random.random,
            home=weakref.ref(self),
            reconnect_timeout=_or_forever(config.reconnect_timeout),
        )

    # -- borrowing --------------------------------------------------------------------------------

    def connection(
        self,
        timeout: float | None = None,
        *,
        autocommit: bool | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Lease[ConnT]:
        """Borrow a connection for a ``with`` block.

        It begins nothing. At the end of the block what was begun is committed, or rolled back if an
        exception leaves the block, and the connection goes back to the pool.

        Args:
            timeout: seconds to wait at most, for everything; None: the pool's; 0: only what is free.
            autocommit: for this borrow only; None: the pool's.
            settings: run-time parameters for this borrow's transaction, set in it by
                ``set_config(name, value, true)``: they cannot outlive it.

        Raises:
            PoolTimeout: all connections were in use for the whole time.
            ServerUnavailable: no connection could be opened; the driver's error is the cause.
            TooManyRequests: `max_waiting` borrowers wait already.
            PoolClosed: the pool is closed.
            MisuseError: every connection is held by borrowers who wait for one, this one included.
        """
        if timeout is None and autocommit is None and settings is None and self._plain:
            lease = new(self._lease)
            lease._pool = self
            return lease  # type: ignore[no-any-return]  # object.__new__ does not say what it makes
        careful = new(CarefulLease)
        careful._pool = self
        careful._slot = None
        careful._timeout = timeout
        careful._autocommit = autocommit
        careful._settings = settings
        return cast("CarefulLease[ConnT]", careful)

    def getconn(self, timeout: float | None = None) -> ConnT:
        """Borrow a connection without a ``with`` block; give it back with `putconn`.

        Args:
            timeout: as in `connection`.

        Raises:
            PenstockError: as in `connection`.
        """
        slot = None
        try:
            if timeout is None and self._plain and fork.page[0]:
                slot = self._machine.take(clock(), get_ident())
            if slot is None:
                slot = self._borrow_carefully(timeout, None, None)
            else:
                slot.link.lend()
            slot.loose = True  # any thread may give it back, so its wait proves no deadlock
            conn = slot.link.conn
            self._getconns[id(conn)] = slot
            return conn  # type: ignore[no-any-return]  # a slot's link is opaque to the machine
        except BaseException:
            if slot is not None:
                self._getconns.pop(id(slot.link.conn), None)
            slot = None
            self._cut_short()
            raise

    def putconn(self, conn: ConnT) -> None:
        """Give back what `getconn` lent. A transaction left open is rolled back, with a warning.

        Raises:
            MisuseError: this connection is not lent by this pool (given back twice, or another's).
        """
        slot = None
        try:
            slot = self._lent(self._getconns.pop(id(conn), None), conn)
            slot.loose = False
            if self._plain and slot.link.park():
                answer = self._machine.put(slot)
                if not answer:  # DONE
                    return
                if answer == LOOK_AGAIN:  # the slot is not ours any more
                    self._look_again()
                    return
            self._give_back_unfinished(slot)
        except BaseException:
            slot = None
            self._cut_short()
            raise

    def execute(self, query: Any, params: Any = None, *, timeout: float | None = None) -> Result:
        """Run one statement in autocommit: one round trip. The rows are here when it returns.

        For several statements, a transaction or large results use `connection`.

        Args:
            query: the statement, as the driver takes it.
            params: its parameters, as the driver takes them.
            timeout: seconds to wait for a connection, as in `connection`.

        Raises:
            PenstockError: as in `connection`.
            Exception: the driver's errors.
        """
        lease = self.connection(timeout)
        with lease:
            reply = cast("Slot", lease._slot).link.execute(query, params)
        return Result(
            reply.rows,
            rowcount=reply.rowcount,
            description=reply.description,
            statusmessage=reply.statusmessage,
        )

    @contextmanager
    def dedicated(
        self, timeout: float | None = None, *, autocommit: bool | None = None
    ) -> Iterator[ConnT]:
        """Open a connection of its own, outside the pool's size, for LISTEN and long work.

        It has the pool's settings and `configure`. At the end it is committed, or rolled back on an
        exception, and closed.

        Args:
            timeout: seconds to connect, as in `connection`.
            autocommit: None: the pool's.

        Raises:
            ServerUnavailable: it could not be opened in time; the driver's error is the cause.
            PoolClosed: the pool is closed.
        """
        link = self._open_dedicated(self._seconds(timeout))
        self._dedicated[id(link)] = link
        try:
            link.lend()
            if autocommit is not None:
                link.set_autocommit(autocommit)
            yield link.conn
            _notice_fork()  # a commit here would be on the parent's session
            link.commit()
        finally:
            _notice_fork()
            if self._dedicated.pop(id(link), None) is not None:  # else it is the parent's
                link.close()

    # -- the pool's life --------------------------------------------------------------------------

    def open(self, *, wait: bool = False, timeout: float | None = None) -> None:
        """Open the pool, now instead of at the first borrow; a closed pool is opened again.

        Args:
            wait: return only when `min_size` connections (at least one) are open, and fail early:
                at once if that cannot heal (wrong password, no such database), else when the
                timeout has passed.
            timeout: seconds to wait at most; None: the pool's.

        Raises:
            ServerUnavailable: with `wait`, no connection could be opened. The pool stays open.
            PoolTimeout: with `wait`, not all of them could be opened in time.
        """
        _notice_fork()
        self._open()
        if wait:
            self._wait_until_open(self._seconds(timeout))

    def close(self, timeout: float = 5.0) -> None:
        """Close the pool: idle connections now, lent ones when they are given back.

        Whoever waits for a connection gets `PoolClosed`. Does nothing on a closed pool.

        Args:
            timeout: seconds to wait for lent connections to come back. After that the pool is
                closed all the same, with a warning, and they are closed when they come back.
        """
        _notice_fork()  # else it would end the parent's sessions
        was_open = self._machine.phase is Phase.OPEN
        self._reporter.closed_at = clock()
        self._move(self._machine.close, self._carry_out_here)
        if was_open:
            self._wait_until_empty(timeout)

    @property
    def closed(self) -> bool:
        """Whether the pool is closed. One that was not opened yet is not."""
        return self._machine.phase is Phase.CLOSED

    def drain(self) -> None:
        """Replace every connection: idle ones now, lent ones when they come back.

        For new credentials, a new address, a changed search_path of the role.
        """
        _notice_fork()
        self._move(self._machine.drain)

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the pool's limits; what is too much is closed when it is idle.

        Args:
            min_size: connections kept open.
            max_size: connections open at most; None: as `min_size`.

        Raises:
            ConfigError: not ``0 <= min_size <= max_size``, or max_size below 1.
        """
        _notice_fork()
        max_size = min_size if max_size is None else max_size
        self._config = self._config.replace(min_size=min_size, max_size=max_size)
        self._move(partial(self._machine.resize, min_size, max_size))

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Connections cannot travel to another process; a pool with the same options can.
        return _from_config, (type(self), self._config)

    # -- what can be read -------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of the pool's figures."""
        _notice_fork()
        return self._machine.stats(self.name, clock())

    def health(self) -> Health:
        """Whether the pool can serve, why not, and since when: from its state, in microseconds."""
        _notice_fork()
        return self._reporter.health()

    def __repr__(self) -> str:
        _notice_fork()
        return self._reporter.line(type(self).__name__)

    # -- a borrow that finds nothing idle ---------------------------------------------------------

    def _borrow_slowly(self, timeout: float | None = None) -> Slot:
        """A slot that may be used as it is, in use by the calling thread; or an error."""
        _notice_fork()
        if self._machine.phase is Phase.NEW and self._config.open:
            self._open()
        seconds = self._seconds(timeout)
        keeper.current().ensure_running()  # what an interrupt left behind is its to bring home
        gate: queue.SimpleQueue[None] = queue.SimpleQueue()
        waiter = Waiter(get_ident(), partial(gate.put, None))
        try:
            with self._lock:
                orders = self._machine.queue_up(waiter, clock())
            self._carry_out(orders)
            return self._wait(waiter, gate, seconds)
        except BaseException:
            self._leave_queue(waiter)
            raise

    def _wait(self, waiter: Waiter, gate: queue.SimpleQueue[None], seconds: float) -> Slot:
        began = clock()
        while True:
            slot = self._receive(waiter, gate, seconds, began)
            if slot.state is SlotState.IN_USE:
                return slot
            if self._make_sure(slot, waiter, began + seconds - clock()):
                return slot
            del slot  # it goes back to be closed; do not keep it alive while waiting again

    def _receive(
        self, waiter: Waiter, gate: queue.SimpleQueue[None], seconds: float, began: float
    ) -> Slot:
        """What was given to the waiter, as soon as something is; raises when nothing is."""
        while waiter.slot is None and waiter.refusal is None:
            left = began + seconds - clock()
            if left <= 0:
                break
            _sleep_at(gate, left)
        slot = waiter.slot
        waiter.slot = None
        if slot is not None:
            return slot
        if waiter.refusal is None:
            slot = self._time_out(waiter)
            if slot is not None:
                return slot
        raise self._reporter.error(waiter.refusal, seconds, clock() - began)

    def _time_out(self, waiter: Waiter) -> Slot | None:
        """The time is up: leave the queue, unless something came at the last moment."""
        with self._lock:
            slot = waiter.slot
            waiter.slot = None
            orders = self._machine.give_up(waiter, clock(), timed_out=slot is None)
        self._carry_out(orders)
        return slot

    def _leave_queue(self, waiter: Waiter) -> None:
        """An exception passes: leave the queue. What was given and not touched goes to the next."""
        if waiter.ticket == 0:
            return
        with self._lock:
            orders = self._machine.give_up(waiter, clock(), timed_out=False)
        self._carry_out(orders)

    def _make_sure(self, slot: Slot, waiter: Waiter, left: float) -> bool:
        """Ping a slot that is in doubt, or read the answer to its reset; the borrower's own time."""
        seconds = max(0.0, min(PING_SECONDS, left * PING_SHARE))
        if slot.reset_pending:
            slot.reset_pending = False
            alive = slot.link.finish_reset(seconds)
        else:
            alive = slot.link.ping(seconds)
        with self._lock:
            if alive:
                orders = self._machine.pinged(slot, clock())
            else:
                orders = self._machine.ping_failed(slot, waiter, clock())
        self._carry_out(orders)
        return bool(alive)

    # -- a borrow with options --------------------------------------------------------------------

    def _borrow_carefully(
        self,
        timeout: float | None,
        autocommit: bool | None,
        settings: Mapping[str, Any] | None,
    ) -> Slot:
        if settings and (self._config.autocommit if autocommit is None else autocommit):
            raise self._reporter.misuse(
                "settings= was asked for with autocommit: they would end with their own statement",
                "leave autocommit off for this borrow: settings last for its transaction",
            )
        left = self._seconds(timeout)
        deadline = clock() + left
        while True:
            slot = self._take_or_wait(left)
            if self._check(slot):
                break
            del slot
            left = max(0.0, deadline - clock())
        try:
            self._equip(slot, autocommit, settings)
        except Exception as error:
            self._give_back(slot, error)
            raise
        return slot

    def _take_or_wait(self, seconds: float) -> Slot:
        slot = self._machine.take(clock(), get_ident()) if fork.page[0] else None
        if slot is None:
            slot = self._borrow_slowly(seconds)
        slot.link.lend()
        return slot

    def _check(self, slot: Slot) -> bool:
        """Whether to lend it: not hung up, and the user's `check` does not raise; else it is closed."""
        check = self._config.check
        if not watch.available() and slot.link.hung_up():
            slot.link.park()
            self._return(slot, Verdict.BROKEN)
            return False
        if check is None:
            return True
        try:
            check(slot.link.conn)
        except Exception:  # noqa: BLE001  raising is how a check says no
            slot.link.park()
            self._return(slot, Verdict.UNCLEAN)
            return False
        return True

    def _equip(
        self, slot: Slot, autocommit: bool | None, settings: Mapping[str, Any] | None
    ) -> None:
        link = slot.link
        if autocommit is not None:
            link.set_autocommit(autocommit)
        if self._config.on_borrow is not None:
            self._config.on_borrow(link.conn)
        if settings:
            link.apply_settings(settings)

    # -- giving back what is not simply clean -----------------------------------------------------

    def _give_back(self, slot: Slot, error: BaseException | None) -> None:
        """End the transaction and bring the slot back to the machine, whatever state it is in.

        `error` is what leaves the block; None commits. Raises what the commit raises, after the
        slot has gone back.
        """
        _notice_fork()  # a commit here would be on the parent's session
        failure: Exception | None = None
        try:
            if error is None:
                failure = self._commit(slot)
            verdict = self._verdict(slot, clean_up=True)
            self._return(slot, verdict, suspect=self._is_suspect(error or failure))
        except BaseException:
            slot = None  # type: ignore[assignment]  # drop it: it comes home by itself
            raise
        if failure is not None:
            raise failure

    def _lent(self, slot: Slot | None, conn: ConnT) -> Slot:
        if slot is not None and slot.link.conn is conn:
            return slot
        raise self._reporter.misuse(
            "putconn() got a connection that is not lent by getconn() of this pool",
            "give each connection back once, to the pool that it came from",
        )

    def _give_back_unfinished(self, slot: Slot) -> None:
        """putconn() of a connection that is not simply clean: roll back, and say so."""
        activity = slot.link.activity()
        if activity not in {Activity.IDLE, Activity.BROKEN}:
            _log.warning(
                "pool %r: a connection was given back %s: rolled back. Commit, or use "
                "`with pool.connection()`.",
                self.name,
                activity.value,
            )
        self._give_back(slot, GivenBack())

    def _commit(self, slot: Slot) -> Exception | None:
        link = slot.link
        if link.activity() in {Activity.IDLE, Activity.ACTIVE}:
            return None
        link.park()  # a plain lease has parked it already, a careful one has not
        link.lend()
        try:
            link.commit()
        except Exception as error:  # noqa: BLE001  raised by the caller once the slot is back
            return error
        return None

    def _verdict(self, slot: Slot, *, clean_up: bool) -> Verdict:
        link = slot.link
        clean = link.park()
        if link.activity() is Activity.BROKEN:
            return Verdict.BROKEN
        reset = self._config.reset
        if not clean:
            clean = clean_up and reset is not None and link.tidy(TIDY_SECONDS)
        if clean and reset == "session":
            clean = slot.reset_pending = link.start_reset()
        elif clean and callable(reset):
            clean = self._call_reset(reset, link)
        if not clean and link.activity() is Activity.ACTIVE:
            _log.warning(
                "pool %r: a connection was given back while a statement was under way: closed",
                self.name,
            )
        return Verdict.CLEAN if clean else Verdict.UNCLEAN

    def _call_reset(self, reset: Callable[[Any], object], link: Any) -> bool:
        link.lend()
        try:
            reset(link.conn)
        except Exception:  # noqa: BLE001  raising is how a reset says that it could not
            _log.exception("pool %r: reset= raised; the connection is closed", self.name)
            link.park()
            return False
        return bool(link.park())

    def _is_suspect(self, error: BaseException | None) -> bool:
        """Whether `error` says that other sessions are not to be trusted either."""
        return error is not None and bool(
            self._driver.ends_session(error, read_write=self._config.read_write)
        )

    def _return(self, slot: Slot, verdict: Verdict, *, suspect: bool = False) -> None:
        if suspect and verdict is Verdict.CLEAN:
            verdict = Verdict.BROKEN  # a session that is read-only after a failover still answers
        with self._lock:
            orders = self._machine.returned(slot, clock(), verdict, suspect=suspect)
        self._carry_out(orders)

    def _move(
        self,
        decide: Callable[[float], list[Order]],
        carry_out: Callable[[list[Order]], None] | None = None,
    ) -> None:
        """A move of the pool as a whole; what an interrupt cuts off, the keeper does."""
        try:
            with self._lock:
                orders = decide(clock())
            (carry_out or self._carry_out)(orders)
        except BaseException:
            self._cut_short()
            raise

    def _look_again(self) -> None:
        with self._lock:
            orders = self._machine.look_again(clock())
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
            case Open(slot):
                keeper.current().submit(partial(self._open_slot, [slot]))
            case Close():
                close(partial(self._close_slot, order))
            case TickAt(when):
                keeper.current().call_at(self._machine.home, when)  # type: ignore[arg-type]
            case Overdue(slot, seconds):
                self._warn_overdue(slot, seconds)
            case ReportOutage(seconds):
                self._report_outage(seconds)

    def _open_slot(self, place: list[Slot]) -> None:
        """In a worker: open a connection for the slot in this place.

        Neither the job nor this frame holds the slot once the machine has it: else one that was lent
        and dropped would not come home, and would look as if its borrower had it still.
        """
        slot = place.pop()
        try:
            link = self._opener.open(CONNECT_SECONDS)
        except BaseException as error:  # noqa: BLE001  also a SystemExit of a user's callable
            self._open_failed(slot, error)
            return
        ref = slot.ref
        if ref is not None and link.fd >= 0:
            # Before it can be lent, so that no end goes unnoticed.
            ref.watched = _watcher().add(link.fd, ref)
        with self._lock:
            outage = self._machine.outage
            orders = self._machine.opened(slot, link, clock())
            del slot
        self._carry_out(orders)
        self._tell_watchers()
        if outage is not None:
            _log.warning("pool %r: connections can be opened again", self.name)

    def _open_failed(self, slot: Slot, error: BaseException) -> None:
        failure = self._opener.explain(error)
        del error
        with self._lock:
            before = self._machine.outage
            orders = self._machine.open_failed(
                slot, failure, clock(), heals=failure.heals, sqlstate=failure.sqlstate
            )
        self._carry_out(orders)
        self._tell_watchers()
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
        self._tell_watchers()

    def _warn_overdue(self, slot: Slot, seconds: float) -> None:
        holder = self._reporter.holder_of(slot)
        _log.warning(
            "pool %r: a connection has been lent for %.0f s (overdue_after=%s): %s",
            self.name,
            seconds,
            self._config.overdue_after,
            holder or "its holder is not known",
        )

    def _report_outage(self, seconds: float) -> None:
        _log.error("pool %r: no connection could be opened for %.0f s", self.name, seconds)
        failed = self._config.reconnect_failed
        if failed is not None:
            keeper.current().submit(partial(failed, self))

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

    # -- waiting for the pool as a whole ----------------------------------------------------------

    def _open(self) -> None:
        if self._machine.phase is Phase.OPEN:
            return
        self._reporter.opened_at = clock()
        self._reporter.closed_at = None
        self._move(self._machine.open)

    def _wait_until_open(self, seconds: float) -> None:
        deadline = clock() + seconds
        with self.connection(seconds):  # says early, and with the cause, that it cannot be done
            pass
        enough = self._machine.limits.min_size
        if not self._wait_until(lambda: self._alive() >= enough, deadline):
            raise self._reporter.error(None, seconds, seconds)

    def _wait_until_empty(self, seconds: float) -> None:
        mine = get_ident()

        def empty() -> bool:
            return all(
                slot.state is SlotState.OPENING
                or (slot.state is SlotState.IN_USE and slot.holder == mine and not slot.loose)
                for slot in self._machine.slots()
            )

        if not self._wait_until(empty, clock() + seconds):
            lent = self._reporter.counts().in_use
            _log.warning(
                "pool %r: closed with %d connections still lent; each is closed when it is given "
                "back: %s",
                self.name,
                lent,
                "; ".join(map(str, self._reporter.holders())),
            )

    def _wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Look at `condition` after each connection that was opened, closed or given up."""
        gate: queue.SimpleQueue[None] = queue.SimpleQueue()
        tell = partial(gate.put, None)
        self._watchers.append(tell)
        try:
            return _wait_for(condition, gate, deadline)
        finally:
            self._watchers.remove(tell)

    def _tell_watchers(self) -> None:
        for tell in list(self._watchers):
            tell()

    def _alive(self) -> int:
        counts = self._reporter.counts()
        return counts.idle + counts.in_use + counts.pinging

    # -- forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Nothing to do: every prefix of a move is a state that a child can start from."""

    def after_fork_in_parent(self) -> None:
        """Nothing to do."""

    def after_fork_in_child(self) -> None:
        """Let go of everything inherited: no session is shared, the parent's live on."""
        self._lock = threading.RLock()
        self._machine.orphans = keeper.current().inbox.put
        if isinstance(self._machine, LockedMachine):
            self._machine.lock = self._lock
        inherited = self._machine.forked()
        self._getconns = {}
        self._watchers = []
        dedicated, self._dedicated = self._dedicated, {}
        _abandon_all(inherited + [(link, True) for link in dedicated.values()])

    # -- small things -----------------------------------------------------------------------------

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self._timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise ConfigError(
                "timeout", repr(timeout), "a number of seconds or None", pool=self.name
            )
        return max(0.0, timeout)

    def _open_dedicated(self, seconds: float) -> Any:
        _notice_fork()
        if self._machine.phase is Phase.CLOSED:
            raise self._reporter.closed()
        opening = _Opening(self._opener, seconds)
        keeper.current().submit(opening.run)
        return opening.wait(self._reporter)


class GivenBack(Exception):  # noqa: N818  never raised: it stands for "roll back" in putconn()
    """What putconn() tells a lease instead of an exception, to have it rolled back."""


class LockedMachine(Machine):
    """The machine where the interpreter has no global lock: the hot moves take the pool's.

    Publish-then-look needs an order that two deque calls do not promise there.
    """

    __slots__ = ("lock",)

    def __init__(self, lock: threading.RLock, *args: Any, **kwargs: Any) -> None:
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


class _Opening:
    """A connection outside the pool being opened in a worker; whoever wanted it may be gone."""

    def __init__(self, opener: Opener, seconds: float) -> None:
        self._opener = opener
        self._seconds = min(seconds, 1e9)
        self._answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._given_up = False

    def run(self) -> None:
        """In a worker."""
        try:
            answer = self._opener.open(min(self._seconds, CONNECT_SECONDS))
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            answer = self._opener.explain(error)
        with self._lock:
            late = self._given_up
            self._answer.put(answer)
        if late and not isinstance(answer, Failure):
            answer.close()

    def wait(self, reporter: Reporter) -> Any:
        """Give the link, or raise ServerUnavailable within the time."""
        try:
            answer = self._answer.get(timeout=self._seconds)
        except queue.Empty:
            answer = None
        except BaseException:
            self._give_up()
            raise
        if answer is None:
            answer = self._give_up()
        if answer is None or not hasattr(answer, "lend"):
            raise reporter.not_opened(answer, self._seconds)
        return answer

    def _give_up(self) -> Any:
        with self._lock:
            self._given_up = True
            return None if self._answer.empty() else self._answer.get_nowait()


def _notice_fork() -> None:
    """In a child that ran no at-fork hook: let go of what was inherited, before touching it."""
    if not fork.page[0]:
        fork.noticed()


def _has_global_lock() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _wants_nothing_special(config: PoolConfig) -> bool:
    """Whether plain leases will do."""
    special = (config.on_borrow, config.check)
    # Where nobody watches (no epoll), each borrow looks at the socket, and leases are careful.
    return (
        watch.available()
        and config.reset == "rollback"
        and all(option is None for option in special)
    )


def _lease_class(driver: Any) -> type[Lease[Any]]:
    """The fastest plain lease that is right for this driver and this interpreter."""
    written_out = getattr(driver, "pgconn_shaped", False) and _has_global_lock()
    return PgconnLease if written_out else Lease


def _or_forever(seconds: float | None) -> float:
    return FOREVER if seconds is None else seconds


def _limits(config: PoolConfig) -> Limits:
    return Limits(
        min_size=config.min_size,
        max_size=config.max_size,
        max_waiting=config.max_waiting,
        max_lifetime=_or_forever(config.max_lifetime),
        max_idle=_or_forever(config.max_idle),
        ping_after=_or_forever(config.ping_after),
        overdue_after=_or_forever(config.overdue_after),
        fifo=config.order == "fifo",
    )


def _from_config(cls: type[ConnectionPool[Any]], config: PoolConfig) -> ConnectionPool[Any]:
    pool = cls.__new__(cls)
    pool._set_up(config)
    return pool


def _call(job: Callable[[], object]) -> None:
    job()


def _sleep_at(gate: queue.SimpleQueue[None], seconds: float) -> None:
    with suppress(queue.Empty):
        gate.get(timeout=None if seconds == FOREVER else seconds)


def _wait_for(
    condition: Callable[[], bool], gate: queue.SimpleQueue[None], deadline: float
) -> bool:
    while not condition():
        left = deadline - clock()
        if left <= 0:
            return False
        _sleep_at(gate, left)
    return True


def _warn_unreachable(name: str, failure: Failure) -> None:
    code = f" (SQLSTATE {failure.sqlstate})" if failure.sqlstate else ""
    _log.warning("pool %r: cannot open a connection: %s%s", name, failure.text, code)


def _end_link(link: Any, order: Close) -> None:
    ref = order.slot.ref
    if ref is not None and ref.watched:
        # Before the close, since numbers are reused; and by the serial, since libpq closes a broken
        # connection's socket by itself: the number may be another connection's already.
        _watcher().remove(link.fd, ref.watched)
    if order.reason is Reason.ORPHANED:
        link.park()  # somebody may still hold the connection: its next use raises
    if order.discard:
        link.discard()
    else:
        link.close()


def _abandon_all(inherited: list[tuple[Any, bool]]) -> None:
    for link, busy in inherited:
        link.abandon(busy=busy)


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
