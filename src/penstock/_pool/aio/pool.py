"""AsyncConnectionPool: the pool for asyncio (uvloop, AnyIO on asyncio), as its users see it.

The same machine as `ConnectionPool`'s decides, and a pool carries out. Its hot path is in
`_pool/aio/lease.py`, its slow half in `_pool/aio/borrowing.py`, what it does in the background in
`_pool/aio/executor.py`. Here are the public methods, and what happens at a fork.

It must not know: when to grow, whom to serve, how long to back off. An `if` about such things belongs
in `_machine`.

No lock. A pool belongs to the event loop of its first use, state moves are plain calls on that
loop's thread, and a cancellation can only arrive between them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, cast, overload

from penstock import _drivers
from penstock._machine.machine import LOOK_AGAIN, Machine, Phase
from penstock._machine.slot import SlotState
from penstock._machine.stats import Stats, snapshot
from penstock._pool.aio import loop
from penstock._pool.aio.borrowing import AsyncBorrowing
from penstock._pool.aio.dedicated import AsyncDedicated
from penstock._pool.aio.executor import let_go_of_all, orphaned
from penstock._pool.aio.lease import AsyncCarefulLease, AsyncLease
from penstock._pool.aio.opener import AsyncOpener
from penstock._pool.aio.reporter import TaskReporter
from penstock._pool.procedures import (
    FOREVER,
    abandon,
    new,
    next_name,
    refuse_guard_without_renewal,
    wants_nothing_special,
)
from penstock._pool.result import Result
from penstock._pool.statement_limit import limit_of
from penstock._pool.two_ends import Entering
from penstock._process import fork
from penstock._process.clock import clock
from penstock._process.fork import notice_fork
from penstock.config.pool_config import PoolConfig
from penstock.config.secret import Hidden

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType
    from typing import Literal, Unpack

    import asyncpg
    import psycopg
    from psycopg.rows import TupleRow

    from penstock._machine.slot import Slot
    from penstock._pool.reporter import Health
    from penstock.config.pool_config import AsyncOptions
    from penstock.drivers import AsyncDriver

    Conninfo = str | Callable[[], str | Awaitable[str]]

ConnT = TypeVar("ConnT")

#: In a forked child: the parent's tasks and timers. Freed, they would speak to the parent's loop.
_GRAVEYARD: Final[list[object]] = []

_log = logging.getLogger("penstock")


class AsyncConnectionPool(AsyncBorrowing, Generic[ConnT]):
    """A pool of connections for the tasks of one event loop, and for forked children's own loops.

    Making one opens nothing, awaits nothing and needs no running loop: the first borrow in each
    process does, or `open()`. The pool belongs to the loop of that first use until it is closed.
    The options are `ConnectionPool`'s (docs/options.md); `configure`, `check`, `reset`, `on_borrow`,
    `reconnect_failed` and callables for `conninfo` and `kwargs` may be coroutine functions.

    Args:
        conninfo: a libpq connection string or URL, or a callable that returns one, called per
            connect (for tokens that expire).
        connection_class: the driver's connection class (``psycopg.AsyncConnection`` by default).
        driver: "psycopg" (the default), "asyncpg", or a driver object.
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
        self: AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]],
        conninfo: Conninfo = "",
        *,
        connection_class: None = None,
        driver: Literal["psycopg"] = "psycopg",
        **options: Unpack[AsyncOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: AsyncConnectionPool[asyncpg.Connection],
        conninfo: Conninfo = "",
        *,
        connection_class: None = None,
        driver: Literal["asyncpg"],
        **options: Unpack[AsyncOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        connection_class: None = None,
        driver: AsyncDriver[ConnT],
        **options: Unpack[AsyncOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        connection_class: type[ConnT],
        driver: str | AsyncDriver[Any] = "psycopg",
        **options: Unpack[AsyncOptions],
    ) -> None: ...

    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        connection_class: type[ConnT] | None = None,
        **options: Any,
    ) -> None:
        given = Hidden({"conninfo": conninfo, **options})
        del conninfo, options  # no secret in a local variable of a frame that may raise
        self._set_up(PoolConfig(connection_class=connection_class, **given.value))

    @classmethod
    def from_config(cls, config: PoolConfig) -> AsyncConnectionPool[Any]:
        """Make a pool of options that were read, or checked, before.

        Args:
            config: for example ``PoolConfig.from_file("db.ini")``.

        Raises:
            DriverNotFoundError: the driver's library is not installed.
        """
        pool = cls.__new__(cls)
        pool._set_up(config)
        return pool

    def _set_up(self, config: PoolConfig) -> None:
        self._config = config
        self.name: str = config.name or next_name()
        self._driver = _drivers.chosen(config.driver, asynchronous=True)
        refuse_guard_without_renewal(config, self._driver)
        self._timeout = FOREVER if config.timeout is None else config.timeout
        self._home = weakref.ref(self)
        self._entering = Entering()
        self._left_behind: list[Any] = []
        self._plain = wants_nothing_special(config)
        limit = limit_of(config, self._driver, self.name, weakref.WeakMethod(self._doubt))
        self._opener = AsyncOpener(config, self._driver, self.name, limit)
        self._machine = self._new_machine(config)
        self._begin_upkeep()
        self._reporter = TaskReporter(
            self.name, self._machine, self._driver, partial(_loop_of, self._home)
        )
        self._getconns: dict[int, Slot] = {}
        self._dedicated: dict[int, Any] = {}
        fork.register(self)
        # A pool that is dropped without being closed ends its sessions.
        weakref.finalize(self, let_go_of_all, self._machine).atexit = False

    def _new_machine(self, config: PoolConfig) -> Machine:
        return Machine(
            config.limits(),
            orphans=partial(orphaned, self._home),
            random=random.random,
            home=self._home,
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
        transaction: bool = False,
    ) -> AsyncLease[ConnT]:
        """Borrow a connection for an ``async with`` block.

        It begins nothing by itself. At the end of the block what was begun is committed, or rolled
        back if an exception leaves the block, and the connection goes back to the pool. asyncpg
        commits each statement by itself; with `transaction` the block is one transaction.

        Args:
            timeout: seconds to wait at most, for everything; None: the pool's; 0: only what is free.
            autocommit: for this borrow only; None: the pool's. Without a meaning for asyncpg.
            settings: run-time parameters for this borrow's transaction, set in it by
                ``set_config(name, value, true)``: they cannot outlive it.
            transaction: begin a transaction now, for drivers that begin none by themselves.

        Raises:
            PoolTimeout: all connections were in use for the whole time.
            ServerUnavailable: no connection could be opened; the driver's error is the cause.
            TooManyRequests: `max_waiting` borrowers wait already.
            PoolClosed: the pool is closed.
            MisuseError: every connection is held by borrowers who wait for one, this one included;
                or the pool belongs to another event loop, or to one that has ended.
        """
        if (
            timeout is None
            and autocommit is None
            and settings is None
            and not transaction
            and self._plain
        ):
            lease = new(AsyncLease)
            lease._pool = self
            lease._slot = None
            return lease  # type: ignore[no-any-return]  # object.__new__ does not say what it makes
        careful = new(AsyncCarefulLease)
        careful._pool = self
        careful._slot = None
        careful._timeout = timeout
        careful._autocommit = autocommit
        careful._settings = settings
        careful._transaction = transaction
        return cast("AsyncCarefulLease[ConnT]", careful)

    async def getconn(self, timeout: float | None = None) -> ConnT:
        """Borrow a connection without an ``async with`` block; give it back with `putconn`.

        Args:
            timeout: as in `connection`.

        Raises:
            PenstockError: as in `connection`.
        """
        slot = None
        try:
            slot = await self._borrow_carefully(timeout, None, None, transaction=False)
            slot.loose = True  # any task may give it back, so its wait proves no deadlock
            conn = slot.link.conn
            self._getconns[id(conn)] = slot
            return conn  # type: ignore[no-any-return]  # a slot's link is opaque to the machine
        except BaseException:
            self._cut_short()
            raise
        finally:
            slot = None  # what ran below may have kept this frame

    async def putconn(self, conn: ConnT) -> None:
        """Give back what `getconn` lent. A transaction left open is rolled back, with a warning.

        Raises:
            MisuseError: this connection is not lent by this pool (given back twice, or another's), or
                the pool is another event loop's.
        """
        if get_ident() != self._thread:
            self._refuse_other_loops()
        slot = self._getconns.pop(id(conn), None)
        if slot is None or slot.link.conn is not conn:
            raise self._reporter.not_lent()
        slot.loose = False
        if self._plain and slot.link.park():
            answer = self._machine.put(slot)
            if not answer:  # DONE
                return
            if answer == LOOK_AGAIN:  # the slot is not ours any more
                self._look_again()
                return
        place = [slot]
        del slot
        await self._give_back_unfinished(place)

    async def execute(
        self,
        query: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
    ) -> Result:
        """Run one statement in autocommit: one round trip. The rows are here when it returns.

        For several statements, a transaction or large results use `connection`.

        Args:
            query: the statement, as the driver takes it.
            params: its parameters, as the driver takes them; for asyncpg a sequence of them.
            timeout: seconds to wait for a connection, as in `connection`.

        Raises:
            PenstockError: as in `connection`.
            Exception: the driver's errors.
        """
        lease = self.connection(timeout)
        async with lease:
            reply = await cast("Slot", lease._slot).link.execute(query, params)
        return Result(
            reply.rows,
            rowcount=reply.rowcount,
            description=reply.description,
            statusmessage=reply.statusmessage,
        )

    def dedicated(
        self, timeout: float | None = None, *, autocommit: bool | None = None
    ) -> AsyncDedicated[ConnT]:
        """Open a connection of its own, outside the pool's size, for LISTEN and long work.

        For an ``async with`` block. It has the pool's settings and `configure`. At the end it is
        committed, or rolled back on an exception, and closed.

        Args:
            timeout: seconds to connect, as in `connection`.
            autocommit: None: the pool's.

        Raises:
            ServerUnavailable: it could not be opened in time; the driver's error is the cause.
            PoolClosed: the pool is closed.
        """
        return AsyncDedicated(self, self._seconds(timeout), autocommit)

    # -- the pool's life --------------------------------------------------------------------------

    async def open(
        self,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Open the pool, now instead of at the first borrow; a closed pool is opened again.

        It belongs to the running loop from now on.

        Args:
            wait: return only when `min_size` connections (at least one) are open, and fail early:
                at once if that cannot heal (wrong password, no such database), else when the
                timeout has passed.
            timeout: seconds to wait at most; None: the pool's.

        Raises:
            ServerUnavailable: with `wait`, no connection could be opened. The pool stays open.
            PoolTimeout: with `wait`, not all of them could be opened in time.
            MisuseError: it belongs to another event loop, or to one that has ended.
        """
        notice_fork()
        seconds = self._seconds(timeout)
        self._join_loop()
        self._open()
        if wait:
            await self._wait_until_open(seconds)

    async def close(self, timeout: float | None = 5.0) -> None:
        """Close the pool: idle connections now, lent ones when they are given back.

        Whoever waits for a connection gets `PoolClosed`. Does nothing on a closed pool. Afterwards
        the pool belongs to no loop, and may be opened on another. Where its loop has ended without
        closing it, what that loop left is dropped.

        Args:
            timeout: seconds to wait for lent connections to come back; None: as long as it takes.
                After that the pool is closed all the same, with a warning, and they are closed
                when they come back.

        Raises:
            MisuseError: it belongs to another event loop, which is still there.
        """
        notice_fork()  # else it would end the parent's sessions
        self._refuse_other_loops()
        was_open = self._machine.phase is Phase.OPEN
        self._reporter.closed_at = clock()
        self._move(self._machine.close)
        try:
            if self._is_forsaken():
                self._getconns.clear()  # nobody can give them back any more
                self._bring_orphans_home()
            elif was_open:
                await self._end_connects()
                await self._wait_until_empty(FOREVER if timeout is None else timeout)
        finally:
            if self._machine.phase is Phase.CLOSED:  # nobody has opened it again meanwhile
                await self._leave_loop()

    @property
    def closed(self) -> bool:
        """Whether the pool is closed. One that was not opened yet is not."""
        return self._machine.phase is Phase.CLOSED

    @property
    def opened(self) -> bool:
        """Whether the pool is open: `open` or a borrow has opened it, and nobody closed it since."""
        return self._machine.phase is Phase.OPEN

    async def drain(self) -> None:
        """Replace every connection: idle ones now, lent ones when they come back.

        For new credentials, a new address, a changed search_path of the role.

        Raises:
            MisuseError: the pool belongs to another event loop.
        """
        notice_fork()
        self._refuse_other_loops()
        self._move(self._machine.drain)

    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the pool's limits; what is too much is closed when it is idle.

        Args:
            min_size: connections kept open.
            max_size: connections open at most; None: as `min_size`.

        Raises:
            ConfigError: not ``0 <= min_size <= max_size``, or max_size below 1.
            MisuseError: the pool belongs to another event loop.
        """
        notice_fork()
        self._refuse_other_loops()
        max_size = min_size if max_size is None else max_size
        self._config = self._config.replace(min_size=min_size, max_size=max_size)
        self._move(partial(self._machine.resize, min_size, max_size))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

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

    # -- waiting for the pool as a whole ----------------------------------------------------------

    async def _wait_until_open(self, seconds: float) -> None:
        deadline = clock() + seconds
        async with self.connection(seconds):  # says early, and why, that it cannot be done
            pass
        enough = self._machine.limits.min_size

        def complete() -> bool:
            self._ask()  # nobody waits in the queue for these
            return self._alive() >= enough

        if not await self._wait_until(complete, deadline):
            raise self._reporter.error(None, seconds, seconds)

    def _alive(self) -> int:
        counts = self._reporter.counts()
        return counts.idle + counts.in_use + counts.pinging

    async def _wait_until_empty(self, seconds: float) -> None:
        task = id(asyncio.current_task())

        def empty() -> bool:
            return all(
                slot.state is SlotState.OPENING
                or (slot.state is SlotState.IN_USE and slot.holder == task and not slot.loose)
                for slot in self._machine.slots()
            )

        done = await self._wait_until(empty, clock() + seconds)
        if not done and self._reporter.counts().in_use:  # else the last are just being closed
            _log.warning(
                "pool %r: closed with %d connections still lent; each is closed when it is given "
                "back: %s",
                self.name,
                self._reporter.counts().in_use,
                "; ".join(map(str, self._reporter.holders())),
            )

    # -- forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Nothing to do: every prefix of a move is a state that a child can start from."""

    def after_fork_in_parent(self) -> None:
        """Nothing to do."""

    def after_fork_in_child(self) -> None:
        """Let go of everything inherited: no session is shared, the parent's live on.

        Nor is the loop: the child may have its own, and the pool belongs to that then.
        """
        _GRAVEYARD.append((self._loop, self._tasks, self._timer, self._end))
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own name
        loop.forget_watches()
        self._entering = Entering()
        # First let go, then forget: what an interrupt cuts off here is done again from the start.
        dedicated = [(link, True) for link in self._dedicated.values()]
        failures = [
            failure
            for link, busy in self._machine.inherited() + dedicated
            if (failure := abandon(link, busy=busy)) is not None
        ]
        self._machine.forked()
        self._begin_upkeep()
        self._getconns = {}
        self._dedicated = {}
        if failures:
            raise failures[0]


def _loop_of(home: weakref.ref[AsyncConnectionPool[Any]]) -> asyncio.AbstractEventLoop | None:
    pool = home()
    return None if pool is None else pool._loop


def _from_config(
    cls: type[AsyncConnectionPool[Any]], config: PoolConfig
) -> AsyncConnectionPool[Any]:
    return cls.from_config(config)
