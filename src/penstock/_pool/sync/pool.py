"""ConnectionPool: the pool for threads, as its users see it.

Read `_machine/slot.py` and `_machine/machine.py` first: they decide. A pool carries out. Its hot path
is in `_pool/sync/lease.py`: an idle slot is found, and given back, without a lock. Its slow half is in
`_pool/sync/borrowing.py` (waiting, pinging, giving back what is not clean), what it does in the background in
`_pool/sync/executor.py` (opening, closing, ticks). Here are the public methods, and what happens at a fork.

It must not know: when to grow, whom to serve, how long to back off. An `if` about such things belongs
in `_machine`.

Locks: `_lock` protects the machine's slow moves. It is held for one move at a time, never while
anything blocks, and never around a loop (a loop is a function of its own: see machine.py,
"Interrupts"). It is an RLock because a signal handler may use the pool while the thread that it
interrupted is in a move. A forked child makes a new one.
"""

from __future__ import annotations

import random
import sys
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, cast, overload

from penstock import _drivers
from penstock._machine.locked import LockedMachine
from penstock._machine.machine import LOOK_AGAIN, Machine, Phase
from penstock._machine.stats import Stats, snapshot
from penstock._pool.opener import Opener
from penstock._pool.procedures import (
    FOREVER,
    abandon,
    new,
    next_name,
    refuse_guard_without_renewal,
    wants_nothing_special,
)
from penstock._pool.reporter import Health, Reporter
from penstock._pool.result import Result
from penstock._pool.statement_limit import limit_of
from penstock._pool.sync.borrowing import Borrowing
from penstock._pool.sync.dedicated import Dedicated, DedicatedInTurns
from penstock._pool.sync.lease import (
    CarefulLease,
    CarefulLeaseInTurns,
    ClassLease,
    Lease,
    LeaseInTurns,
    PgconnLease,
)
from penstock._pool.two_ends import Entering
from penstock._process import (
    fork,
    keeper,
    runtime,
)
from penstock._process.clock import clock
from penstock._process.fork import notice_fork
from penstock.config.pool_config import PoolConfig
from penstock.config.secret import Hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Unpack

    import psycopg
    import psycopg2.extensions
    from psycopg.rows import TupleRow

    from penstock._machine.slot import Slot
    from penstock.config.pool_config import Options
    from penstock.drivers import Driver

ConnT = TypeVar("ConnT")


class ConnectionPool(Borrowing, Generic[ConnT]):
    """A pool of connections for the threads of a process, and of its forked children.

    Making one opens nothing and never blocks: the first borrow in each process does, or `open()`.
    All options are described in docs/options.md; here are those that most people set.

    Args:
        conninfo: a libpq connection string or URL, or a callable that returns one, called per
            connect (for tokens that expire).
        connection_class: the driver's connection class (``psycopg.Connection`` by default).
        driver: "psycopg" (the default), "psycopg2", or a driver object.
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
        driver: Literal["psycopg"] = "psycopg",
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self: ConnectionPool[psycopg2.extensions.connection],
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: None = None,
        driver: Literal["psycopg2"],
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: None = None,
        driver: Driver[ConnT],
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: type[ConnT],
        driver: str | Driver[Any] = "psycopg",
        **options: Unpack[Options],
    ) -> None: ...

    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: type[ConnT] | None = None,
        **options: Any,
    ) -> None:
        given = Hidden({"conninfo": conninfo, **options})
        del conninfo, options  # no secret in a local variable of a frame that may raise
        self._set_up(PoolConfig(connection_class=connection_class, **given.value))

    @classmethod
    def from_config(cls, config: PoolConfig) -> ConnectionPool[Any]:
        """Make a pool of options that were read, or checked, before.

        Type checkers do not know its connections, since a file may name their class: annotate the
        variable with ``ConnectionPool[psycopg.Connection]``, say.

        Args:
            config: for example ``PoolConfig.from_file("db.ini")``.

        Raises:
            DriverNotFoundError: the driver's library is not installed.
        """
        pool = cls.__new__(cls)
        pool._set_up(config)
        return pool

    def _set_up(self, config: PoolConfig) -> None:
        self._config = config.without_coroutines()
        self.name: str = config.name or next_name()
        self._driver = _drivers.chosen(config.driver, asynchronous=False)
        self._timeout = FOREVER if config.timeout is None else config.timeout
        refuse_guard_without_renewal(config, self._driver)
        self._has_global_lock = _has_global_lock()
        self._lease = _lease_class(self._driver)
        self._entering = Entering()
        self._left_behind: list[Any] = []
        self._plain = wants_nothing_special(config)
        self._fast = self._plain and self._has_global_lock
        self._lock = runtime.Lock()
        limit = limit_of(config, self._driver, self.name, weakref.WeakMethod(self._doubt))
        self._opener = Opener(config, self._driver, self.name, limit)
        self._machine = self._new_machine(config)
        self._reporter = Reporter(self.name, self._machine, self._driver)
        self._getconns: dict[int, Slot] = {}
        self._dedicated: dict[int, Any] = {}
        self._onlookers: list[Callable[[], object]] = []
        fork.register(self)

    def _new_machine(self, config: PoolConfig) -> Machine:
        kind = Machine if self._has_global_lock else partial(LockedMachine, self._lock)
        return kind(
            config.limits(),
            orphans=keeper.current().inbox.put,
            random=random.random,
            home=weakref.ref(self),
            reconnect_timeout=FOREVER
            if config.reconnect_timeout is None
            else config.reconnect_timeout,
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
        if timeout is None and autocommit is None and settings is None and self._fast:
            lease = new(self._lease)
            lease._pool = self
            lease._slot = None
            return lease  # type: ignore[no-any-return]  # object.__new__ does not say what it makes
        if timeout is None and autocommit is None and settings is None and self._plain:
            in_turns = new(LeaseInTurns)
            in_turns._pool = self
            in_turns._slot = None
            in_turns._round = {}
            return cast("Lease[ConnT]", in_turns)
        careful = new(CarefulLease if self._has_global_lock else CarefulLeaseInTurns)
        careful._pool = self
        careful._slot = None
        careful._timeout = timeout
        careful._autocommit = autocommit
        careful._settings = settings
        if not self._has_global_lock:
            careful._round = {}
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
                slot = self._machine.take(clock(), threading.get_ident())
            if slot is None:
                slot = self._borrow_carefully(timeout, None, None)
            else:
                slot.link.lend()
            slot.loose = True  # any thread may give it back, so its wait proves no deadlock
            conn = slot.link.conn
            self._getconns[id(conn)] = slot
            slot = None  # what ran below may have kept this frame
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
            slot = self._getconns.pop(id(conn), None)
            if slot is None or slot.link.conn is not conn:
                raise self._reporter.not_lent()  # noqa: TRY301  a call less where it is lent
            slot.loose = False
            if self._plain and not getattr(slot.link, "held", False) and slot.link.park():
                answer = self._machine.put(slot)
                if not answer:  # DONE
                    return
                if answer == LOOK_AGAIN:  # the slot is not ours any more
                    self._look_again()
                    return
            self._give_back_unfinished(slot)
            slot = None  # as above
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

    def dedicated(
        self, timeout: float | None = None, *, autocommit: bool | None = None
    ) -> Dedicated[ConnT]:
        """Open a connection of its own, outside the pool's size, for LISTEN and long work.

        For a ``with`` block. It has the pool's settings and `configure`. At the end it is committed,
        or rolled back on an exception, and closed.

        Args:
            timeout: seconds to connect, as in `connection`.
            autocommit: None: the pool's.

        Raises:
            ServerUnavailable: it could not be opened in time; the driver's error is the cause.
            PoolClosed: the pool is closed.
        """
        kind = Dedicated if self._has_global_lock else DedicatedInTurns
        return kind(self, self._seconds(timeout), autocommit)

    # -- the pool's life --------------------------------------------------------------------------

    def open(self, wait: bool = False, timeout: float | None = None) -> None:
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
        notice_fork()
        seconds = self._seconds(timeout)
        self._open(seconds)
        if wait:
            self._wait_until_open(seconds)

    def close(self, timeout: float | None = 5.0) -> None:
        """Close the pool: idle connections now, lent ones when they are given back.

        Whoever waits for a connection gets `PoolClosed`. Does nothing on a closed pool.

        Args:
            timeout: seconds to wait for lent connections to come back; None: as long as it takes.
                After that the pool is closed all the same, with a warning, and they are closed
                when they come back.
        """
        if sys.is_finalizing():
            return  # the threads are gone, and may have held our lock; the system closes the rest
        notice_fork()  # else it would end the parent's sessions
        was_open = self._machine.phase is Phase.OPEN
        self._reporter.closed_at = clock()
        seconds = FOREVER if timeout is None else timeout
        self._move(self._machine.close, self._carry_out_here, seconds=seconds)
        if was_open:
            self._wait_until_empty(seconds)

    @property
    def closed(self) -> bool:
        """Whether the pool is closed. One that was not opened yet is not."""
        return self._machine.phase is Phase.CLOSED

    @property
    def opened(self) -> bool:
        """Whether the pool is open: `open` or a borrow has opened it, and nobody closed it since."""
        return self._machine.phase is Phase.OPEN

    def drain(self) -> None:
        """Replace every connection: idle ones now, lent ones when they come back.

        For new credentials, a new address, a changed search_path of the role.
        """
        notice_fork()
        self._move(self._machine.drain)

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the pool's limits; what is too much is closed when it is idle.

        Args:
            min_size: connections kept open.
            max_size: connections open at most; None: as `min_size`.

        Raises:
            ConfigError: not ``0 <= min_size <= max_size``, or max_size below 1.
        """
        notice_fork()
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
        notice_fork()
        return snapshot(self._machine, self.name, clock())

    def health(self) -> Health:
        """Whether the pool can serve, why not, and since when: from its state, in microseconds.

        It opens nothing. In an outage it makes the background try about once a second, as long as
        somebody asks at least every 30 s.
        """
        notice_fork()
        self._ask()
        return self._reporter.health()

    def __repr__(self) -> str:
        if "_reporter" not in vars(self):  # a traceback with locals: it was not made after all
            return f"<{type(self).__name__}, not made>"
        notice_fork()
        return self._reporter.line(type(self).__name__)

    def _wait_until_open(self, seconds: float) -> None:
        deadline = clock() + seconds
        with self.connection(seconds):  # says early, and with the cause, that it cannot be done
            pass
        enough = self._machine.limits.min_size

        def complete() -> bool:
            self._ask()  # nobody waits in the queue for these
            return self._alive() >= enough

        if not self._wait_until(complete, deadline):
            raise self._reporter.error(None, seconds, seconds)

    # -- forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Nothing to do: every prefix of a move is a state that a child can start from."""

    def after_fork_in_parent(self) -> None:
        """Nothing to do."""

    def after_fork_in_child(self) -> None:
        """Let go of everything inherited: no session is shared, the parent's live on."""
        self._lock = runtime.Lock()
        self._machine.orphans = keeper.current().inbox.put
        if isinstance(self._machine, LockedMachine):
            self._machine.lock = self._lock
        self._entering = Entering()
        # First let go, then forget: what an interrupt cuts off here is done again from the start.
        dedicated = [(link, True) for link in self._dedicated.values()]
        failures = [
            failure
            for link, busy in self._machine.inherited() + dedicated
            if (failure := abandon(link, busy=busy)) is not None
        ]
        self._machine.forked()
        self._getconns = {}
        self._onlookers = []
        self._dedicated = {}
        if failures:
            raise failures[0]

    # -- small things -----------------------------------------------------------------------------

    def _set_guard(self, *, on: bool) -> None:
        """For penstock.testing: what is lent from now on is guarded, or not any more."""
        self._config = self._config.replace(guard=on)
        self._plain = wants_nothing_special(self._config)
        self._fast = self._plain and self._has_global_lock


def _has_global_lock() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _lease_class(driver: Any) -> type[Lease[Any]]:
    """The fastest plain lease that is right for this driver, where there is a global lock."""
    if getattr(driver, "pgconn_shaped", False):
        return PgconnLease
    return ClassLease if getattr(driver, "class_shaped", False) else Lease


def _from_config(cls: type[ConnectionPool[Any]], config: PoolConfig) -> ConnectionPool[Any]:
    return cls.from_config(config)
