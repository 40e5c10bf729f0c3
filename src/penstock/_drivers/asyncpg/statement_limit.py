"""`statement_timeout_client` on asyncpg: a protocol that gives a statement up by itself.

All of asyncpg's ways to the wire go through `conn._protocol`. A connection whose pool has a limit is lent
with this one in its place: it hands everything on, and bounds the calls that wait for the server. One of
them is a statement's preparation, its execution with all rows, all of an `executemany`, a fetch from a
cursor. A COPY's clock stands still while it runs the program's own code, its source or its sink.

asyncpg's own `command_timeout` is another thing: it keeps the connection, and asks the server to cancel,
which a frozen one does not hear.

It must not know: links, pools. No lock: everything happens on the connection's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator

    from penstock.drivers import StatementLimit


class LimitedProtocol:
    """Stands where asyncpg's protocol was, as long as the connection is lent."""

    __slots__ = ("_limit", "_protocol")

    def __init__(self, protocol: Any, limit: StatementLimit) -> None:
        self._protocol = protocol
        self._limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)

    async def copy_out(self, copy_stmt: Any, sink: Any, timeout: Any) -> Any:
        """COPY from the server; each block's time is its own."""
        clock = _Clock(self._limit.seconds)
        call = self._protocol.copy_out(copy_stmt, clock.taking(sink), timeout)
        return await self._bounded(call, clock)

    async def copy_in(self, copy_stmt: Any, reader: Any, data: Any, *rest: Any) -> Any:
        """COPY to the server; each block's time is its own, and that of the answer."""
        clock = _Clock(self._limit.seconds)
        records, record_stmt, timeout = rest
        sources = (clock.reading(reader), data, clock.reading(records))
        call = self._protocol.copy_in(copy_stmt, *sources, record_stmt, timeout)
        return await self._bounded(call, clock)

    async def _bounded(self, call: Coroutine[Any, Any, Any], clock: _Clock) -> Any:
        end = clock.end
        clock.look()
        try:
            async with end:
                return await call
        except TimeoutError:
            if not end.expired():  # by a timeout= of the borrower's
                raise
        finally:
            clock.timer.cancel()
        # Nobody knows what its session does: end it without a word.
        self._protocol.abort()
        raise self._limit.given_up()


def _bound(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(own: LimitedProtocol, *arguments: Any, **named: Any) -> Any:
        made = getattr(own._protocol, name)(*arguments, **named)
        return await own._bounded(made, _Clock(own._limit.seconds))

    return call


for _name in (
    *("prepare", "bind_execute", "bind_execute_many", "bind", "execute", "query"),
    *("close_portal", "close_statement", "close"),
):
    setattr(LimitedProtocol, _name, _bound(_name))


class _Clock:
    """How long the server has been waited for; it begins anew after each piece of the program's code.

    Attributes:
        end: cuts the call off.
        timer: calls `look` when the time is up; so a step of a COPY costs next to nothing.
    """

    __slots__ = ("_began", "_loop", "_seconds", "end", "timer")

    timer: asyncio.TimerHandle

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()  # infinite while it stands still
        self.end = asyncio.timeout(None)

    def look(self) -> None:
        """Is the time up?"""
        now = self._loop.time()
        due = (now if self._began == inf else self._began) + self._seconds
        if due > now:
            self.timer = self._loop.call_at(due, self.look)
        elif not self.end.expired():
            # A turn of the loop later: an answer that came while the loop was busy is taken.
            self.end.reschedule(now)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        self._began = inf
        try:
            yield
        finally:
            self._began = self._loop.time()

    def taking(self, sink: Any) -> Callable[[Any], Awaitable[None]]:
        """The program's sink of blocks."""

        async def take(block: Any) -> None:
            with self._standing_still():
                await sink(block)

        return take

    def reading(self, source: Any) -> Any:
        """The program's source of blocks or rows."""
        if source is None:
            return None
        if isinstance(source, AsyncIterable):
            return self._blocks(source)
        return self._rows(source)

    async def _blocks(self, source: AsyncIterable[Any]) -> AsyncIterator[Any]:
        self._began = inf
        try:
            async for each in source:
                self._began = self._loop.time()
                yield each
                self._began = inf
        finally:
            self._began = self._loop.time()

    def _rows(self, source: Iterable[Any]) -> Iterator[Any]:
        self._began = inf
        try:
            for each in source:
                self._began = self._loop.time()
                yield each
                self._began = inf
        finally:
            self._began = self._loop.time()
