"""`statement_timeout_client` on psycopg 3: a connection that gives a statement up by itself.

psycopg waits in one place, `conn.wait(generator)`, and sends its generators "nothing yet" several times
a second. So a generator of ours between the two looks at the clock; no thread, no timer, the same for
threads, gevent and asyncio, and for a connection class with a `wait` of its own.

What is bounded is one such wait: one statement with its whole answer, all of an `executemany`, one step of
a COPY, a stream or a server-side cursor, COMMIT. A wait in which nothing was asked of the server
(`notifies()`) is not: libpq's transaction status tells them apart. An answer that is there when the time is up
is taken, however late this process looked.

Only connections whose recipe has a limit are of these classes. It must not know: links, pools.
"""

from __future__ import annotations

import os
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from penstock._drivers.loop_wait import stop_awaiting
from penstock._process.sockets import shut_down

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn

    from penstock.drivers import StatementLimit

RV = TypeVar("RV")

#: Where a connection's limit is kept, in its attributes.
LIMIT: Final = "_penstock_limit"

#: psycopg's own: seconds after which its wait looks up, for interrupts.
_INTERVAL: Final = 0.1

#: The clock is looked at this often within the limit, so that it is exceeded by a quarter at most.
_LOOKS: Final = 4

#: The shortest sleep in seconds: poll() counts milliseconds.
_SHORTEST: Final = 0.001


class _TimeUp(Exception):  # noqa: N818  never seen outside of this file
    """The statement had no complete answer in time."""


def _limited(gen: PQGen[RV], handle: PGconn, deadline: float) -> PQGen[RV]:
    """The same generator, but that it ends at the deadline if a statement is under way."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            wanted = gen.send(ready)
            # After the look at what has come, and not before.
            if monotonic() >= deadline and handle.transaction_status == TransactionStatus.ACTIVE:
                raise _TimeUp
    except StopIteration as ended:
        value: RV = ended.value
        return value


class LimitsStatements(psycopg.Connection[Any]):
    """What is put in front of a connection class whose statements are bounded."""

    def wait(
        self, gen: PQGen[RV], interval: float | None = _INTERVAL, timeout: float | None = None
    ) -> RV:
        """Run one of psycopg's generators, as psycopg does; end the connection if it takes too long.

        Raises:
            StatementTimeout: no complete answer in time; the connection is closed.
        """
        limit: StatementLimit | None = vars(self).get(LIMIT)
        if limit is None:  # a class of the user's asks something while it is being made
            return super().wait(gen, interval or _INTERVAL, **_more(timeout))
        handle = self.pgconn
        limited = _limited(gen, handle, monotonic() + limit.seconds)
        try:
            return super().wait(limited, _looks(interval, limit), **_more(timeout))
        except _TimeUp as struck:
            error = _reason(struck, limit)
        _end(handle)
        try:
            raise error from None
        finally:
            del error  # it holds this frame, and this frame held it


class AsyncLimitsStatements(psycopg.AsyncConnection[Any]):
    """The same for asyncio."""

    async def wait(
        self, gen: PQGen[RV], interval: float | None = _INTERVAL, timeout: float | None = None
    ) -> RV:
        """Run one of psycopg's generators, as psycopg does; end the connection if it takes too long.

        Raises:
            StatementTimeout: no complete answer in time; the connection is closed.
        """
        limit: StatementLimit | None = vars(self).get(LIMIT)
        if limit is None:
            return await super().wait(gen, interval or _INTERVAL, **_more(timeout))
        handle = self.pgconn
        limited = _limited(gen, handle, monotonic() + limit.seconds)
        try:
            return await super().wait(limited, _looks(interval, limit), **_more(timeout))
        except _TimeUp as struck:
            error = _reason(struck, limit)
        end_awaited(handle)
        try:
            raise error from None
        finally:
            del error  # it holds this frame, and this frame held it


def _looks(interval: float | None, limit: StatementLimit) -> float:
    """How long psycopg may sleep at a time."""
    own = max(_SHORTEST, limit.seconds / _LOOKS)
    return own if interval is None else min(interval, own)


def _more(timeout: float | None) -> dict[str, Any]:
    return {} if timeout is None else {"timeout": timeout}  # psycopg 3.2 knows none


def _reason(struck: _TimeUp, limit: StatementLimit) -> BaseException:
    """What to raise: an interrupt on whose account psycopg was stopping the statement goes on."""
    interrupt = struck.__context__
    error = limit.given_up()
    if interrupt is not None and not isinstance(interrupt, Exception):
        return interrupt
    return error


def end_awaited(handle: PGconn) -> None:
    """End the session of a connection for asyncio."""
    stop_awaiting(handle.socket)
    _end(handle)


def _end(handle: PGconn) -> None:
    """Nobody knows what its session does: end it without a word, so that nothing can block."""
    with suppress(OSError, psycopg.Error):  # closed already, or no descriptor left for it
        shut_down(os.dup(handle.socket))
    handle.finish()
