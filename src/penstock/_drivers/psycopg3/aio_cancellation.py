"""How a lent connection waits: psycopg's own way, but that a cancellation is heard at once.

psycopg's `wait`, when it is cancelled, asks the server to cancel the statement and waits for that: up to 10 s
where the server does not answer, and if it is cancelled once more meanwhile (AnyIO does so at every
turn of the loop), the connection is closed. Here the cancellation goes on at once and the session
stays busy. Most often the connection is given back then, and the pool stops the statement in the
background. Whoever goes on using the connection has it stopped first.

It must not know: links, pools. It costs a statement nothing: psycopg's method is replaced, not wrapped.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import waiting
from psycopg.pq import TransactionStatus

from penstock._drivers.loop_wait import stop_awaiting
from penstock._drivers.psycopg3.aio_exchange import CUT_OFF, stop_statement
from penstock._drivers.psycopg3.guard import noted_of
from penstock._drivers.psycopg3.outdated import AsyncNotesOutdated, note
from penstock._drivers.psycopg3.statement_limit import LIMIT
from penstock._process.sockets import deadline_in

if TYPE_CHECKING:
    from psycopg.abc import PQGen

RV = TypeVar("RV")

#: Seconds for stopping a statement that was cut off before the next one; as psycopg allows.
_STOP_SECONDS: Final = 5.0

_INTERRUPTED: Final = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


class HearsCancellation(psycopg.AsyncConnection[Any]):
    """What is put in front of a connection class that waits as psycopg does."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Run one of psycopg's generators; cut off, leave the session as it is."""
        try:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                if CUT_OFF not in noted_of(self):  # in the middle of a COPY or a stream
                    return await super().wait(gen, interval)
                await self._stop()
            elif self._pipeline is not None:  # its queues must fit to what was read
                return await super().wait(gen, interval)
            # psycopg 3.2 knows no `timeout` here.
            limits = {} if timeout is None else {"timeout": timeout}
            try:
                return await waiting.wait_async(gen, self.pgconn.socket, interval, **limits)
            except _INTERRUPTED:
                if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    noted_of(self).add(CUT_OFF)
                raise
        except psycopg.Error as error:
            note(self, error)
            raise

    async def _stop(self) -> None:
        """Stop what was cut off.

        Raises:
            psycopg.OperationalError: it did not end; the connection is closed.
        """
        handle, noted = self.pgconn, noted_of(self)
        fd = handle.socket
        limit = vars(self).get(LIMIT)
        seconds = _STOP_SECONDS if limit is None else min(_STOP_SECONDS, limit.seconds)
        try:
            stopped = await stop_statement(handle, fd, noted, deadline_in(seconds))
        except psycopg.Error:
            stopped = False
        if not stopped:
            stop_awaiting(fd)
            handle.finish()
            raise psycopg.OperationalError(
                "the statement that was cut off before this one did not end; connection closed"
            )
        noted.discard(CUT_OFF)


def in_front_of(base: type[Any]) -> tuple[type[Any], ...]:
    """What goes in front of this connection class, which may have a way of its own to wait."""
    waits_as_psycopg = getattr(base, "wait", None) is psycopg.AsyncConnection.wait
    return (HearsCancellation,) if waits_as_psycopg else (AsyncNotesOutdated,)
