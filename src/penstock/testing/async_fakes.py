"""The driver that does as it is told, for asyncio: over the same `FakeServer` as `FakeDriver`.

One job: links whose waiting is an ``await``, for an `AsyncConnectionPool` in a test::

    server = FakeServer()
    pool = AsyncConnectionPool(driver=AsyncFakeDriver(server))

It must not know: pools, slots, leases. Every round trip suspends its task at least once, as a real
one does, and may be cancelled there: the statement was sent, so its reply is pending, and the link
says ACTIVE until `tidy` has read it. A `DoubleUse` is raised when a link is lent twice, or used by
two tasks at once.

A link belongs to one loop; the server may be changed from any thread, and wakes those who wait for
it by ``call_soon_threadsafe``. The one lock is the server's.
"""

# ruff: noqa: D102  the methods of a link are explained in the protocol

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.drivers import (
    Activity,
    Diagnosis,
    Recipe,
    Reply,
)
from penstock.testing.fakes import (
    _TOO_LATE,
    DoubleUse,
    FakeCursor,
    FakeDriver,
    FakeEnd,
    FakeError,
    FakeInterfaceError,
    FakeOperationalError,
    FakeServer,
    Mode,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence


class AsyncFakeCursor:
    """What a statement gave."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._cursor = FakeCursor(rows)
        self.rowcount = self._cursor.rowcount
        self.description = self._cursor.description
        self.statusmessage = self._cursor.statusmessage

    async def fetchone(self) -> Any:
        """The next row, or None."""
        return self._cursor.fetchone()

    async def fetchall(self) -> list[Any]:
        """All rows that are left."""
        return self._cursor.fetchall()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for row in self._cursor:
            yield row


class AsyncFakeConnection:
    """What a borrower holds; as psycopg's, it begins a transaction with the first statement."""

    def __init__(self, link: AsyncFakeLink, *, autocommit: bool) -> None:
        self.autocommit = autocommit
        self._link = link

    @property
    def closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._link.ended

    async def set_autocommit(self, value: bool) -> None:
        """Change it for what comes next."""
        self.autocommit = value

    async def execute(self, query: str, params: Any = None) -> AsyncFakeCursor:
        """Run a statement; what it gives is in `FakeServer.answers`."""
        del params
        return AsyncFakeCursor(await self._link._ask(query, begins=not self.autocommit))  # noqa: SLF001

    async def commit(self) -> None:
        """End the transaction."""
        await self._link._end_transaction("COMMIT")  # noqa: SLF001

    async def rollback(self) -> None:
        """End the transaction."""
        await self._link._end_transaction("ROLLBACK")  # noqa: SLF001

    async def close(self) -> None:
        """End the session."""
        await self._link.close()


class AsyncFakeLink(FakeEnd):
    """A link for asyncio; see `penstock.drivers.AsyncLink` for the methods."""

    conn: AsyncFakeConnection

    def __init__(self, server: FakeServer, recipe: Recipe, *, tells: bool) -> None:
        super().__init__(server, recipe)
        self.conn = AsyncFakeConnection(self, autocommit=recipe.autocommit)
        self._loop = asyncio.get_running_loop()
        self._tells = tells
        self._tell: Callable[[], object] | None = None
        self._in_use_by: str | None = None
        # A statement that was sent and whose reply was not read, and what the session does then.
        self._pending: tuple[str, Activity | None] | None = None

    def activity(self) -> Activity:
        if self._pending is not None and not self.ended:
            return Activity.ACTIVE
        return super().activity()

    async def prepare(self) -> None:
        self._autocommit = self.conn.autocommit

    async def apply_settings(self, settings: Mapping[str, Any]) -> None:
        await self._ask(f"set {', '.join(settings)}", begins=True)

    async def begin(self) -> None:
        self.conn.autocommit = False

    async def execute(self, query: Any, params: Any = None) -> Reply:
        del params
        rows = await self._ask(query, begins=False)
        return Reply(rows=rows, rowcount=len(rows), description=[("column",)], statusmessage=None)

    async def commit(self) -> None:
        if not self.said_goodbye:
            await self._end_transaction("COMMIT")

    async def tidy(self, seconds: float | None) -> bool:
        self.conn.autocommit = self._autocommit
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        if self._pending is not None and not await self._read_what_is_pending(seconds):
            return False
        if self._activity is Activity.IDLE:
            return not self.ended
        left = None if deadline is None else max(0.0, deadline - loop.time())
        return await self._rounds_trip("ROLLBACK", left)

    async def ping(self, seconds: float | None) -> bool:
        self._server.pings += 1
        return await self._rounds_trip("", seconds)

    async def finish_reset(self, seconds: float | None) -> bool:
        return await self._rounds_trip("RESET", seconds)

    def on_end(self, tell: Callable[[], object]) -> bool:
        if self._tells:
            self._tell = tell
        return self._tells

    async def close(self) -> None:
        self._goodbye()

    async def _connect(self, seconds: float | None) -> None:
        server = self._server
        with server._changed:  # noqa: SLF001  the other end of one wire
            server.connects += 1
        while await _until(server, server._settled, seconds):  # noqa: SLF001
            with server._changed:  # noqa: SLF001
                if server._settled():  # noqa: SLF001  else another one took the admission
                    self.number = server._welcome(self)  # noqa: SLF001
                    return
        raise FakeOperationalError(_TOO_LATE)

    async def _ask(self, query: str, *, begins: bool) -> Sequence[Any]:
        self._refuse_if_closed()
        await self._go(query, None, Activity.IN_TRANSACTION if begins else None)
        return self._answered(query)

    async def _end_transaction(self, how: str) -> None:
        if self.activity() is not Activity.IDLE:
            await self._go(how, None, Activity.IDLE)

    async def _rounds_trip(self, statement: str, seconds: float | None) -> bool:
        try:
            await self._go(statement, seconds, Activity.IDLE)
        except FakeError:
            return False
        return True

    async def _go(self, statement: str, seconds: float | None, then: Activity | None) -> None:
        self._refuse_two_at_once()
        if self._pending is not None:
            raise FakeInterfaceError("the reply to a statement was not read")
        self._pending = statement, then
        bound = self._limit.seconds if seconds is None and self._limit is not None else seconds
        if not await self._read_what_is_pending(bound):
            raise self._no_answer(bound is not seconds)

    async def _read_what_is_pending(self, seconds: float | None) -> bool:
        self._refuse_two_at_once()
        self._in_use_by = self._caller()
        try:
            there = await _until(self._server, self._has_answer, seconds)
        finally:
            self._in_use_by = None
        if not there or self.ended or self._pending is None:
            return False
        (statement, then), self._pending = self._pending, None
        if statement:
            self._server.statements.append((self.number, statement))
        self._activity = then or self._activity
        return True

    def _refuse_two_at_once(self) -> None:
        if self._in_use_by is not None:
            raise DoubleUse(f"session {self.number} is used by {self._in_use_by} as well")

    def _has_answer(self) -> bool:
        return self.ended or self._server.mode is not Mode.HANGING

    def _server_hangs_up(self) -> None:
        super()._server_hangs_up()
        if self._tell is not None:
            _call_on(self._loop, self._tell)

    def _caller(self) -> str:
        task = asyncio.current_task() if asyncio._get_running_loop() else None  # noqa: SLF001
        return super()._caller() if task is None else task.get_name()


class AsyncFakeDriver:
    """A driver for asyncio over a `FakeServer`; see `penstock.drivers.AsyncDriver`.

    Args:
        server: what it connects to.
        tells: whether it tells of a session's end by itself, as asyncpg does; else the pool has to
            watch the descriptor, as with psycopg.
    """

    name = "fake"
    renews = renews_in_place = True
    limits_statements = True
    operational_error: type[Exception] = FakeOperationalError
    interface_error: type[Exception] = FakeInterfaceError

    def __init__(self, server: FakeServer, *, tells: bool = False) -> None:
        self.server = server
        self.tells = tells
        self._alike = FakeDriver(server)

    async def open(self, recipe: Recipe, seconds: float | None) -> AsyncFakeLink:
        """Connect, if the server's mode allows it."""
        link = AsyncFakeLink(self.server, recipe, tells=self.tells)
        try:
            await link._connect(seconds)  # noqa: SLF001
        except BaseException:
            link._close_sockets()  # noqa: SLF001
            raise
        return link

    async def diagnose(
        self, error: BaseException, recipe: Recipe, seconds: float | None
    ) -> Diagnosis:
        """Tell the server's code; only a wrong password does not heal."""
        return self._alike.diagnose(error, recipe, seconds)

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether this error casts doubt on the other sessions."""
        return self._alike.ends_session(error, read_write=read_write)


async def _until(server: FakeServer, condition: Callable[[], bool], seconds: float | None) -> bool:
    """Wait, for so long at most, until the server has changed so that this is true."""
    await asyncio.sleep(0)  # a reply is never there at once
    if server.clock is not None and not condition():
        assert seconds is not None, "this would wait for ever"
        server.clock.advance(seconds)
        return condition()
    loop = asyncio.get_running_loop()
    deadline = None if seconds is None else loop.time() + seconds
    while not condition():
        if deadline is not None and loop.time() >= deadline:
            return False
        await _until_changed(server, condition, deadline)
    return True


async def _until_changed(
    server: FakeServer, condition: Callable[[], bool], deadline: float | None
) -> None:
    loop = asyncio.get_running_loop()
    changed: asyncio.Future[None] = loop.create_future()
    told = partial(_resolve, changed)
    tell = partial(_call_on, loop, told)
    timer = None if deadline is None else loop.call_at(deadline, told)
    with server._changed:  # noqa: SLF001
        server._onlookers.add(tell)  # noqa: SLF001
    try:
        if not condition():  # looked at after being seen: no change goes unnoticed
            await changed
    finally:
        with server._changed:  # noqa: SLF001
            server._onlookers.discard(tell)  # noqa: SLF001
        if timer is not None:
            timer.cancel()


def _call_on(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(call)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
