"""Bounded exchanges with a libpq handle on an event loop: what `psycopg3_wire` does for threads.

What was read is kept by whoever calls, so that an exchange that was cancelled can be gone on with.

It must not know: psycopg's connections, cursors and transactions; recipes; links.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

import psycopg
from psycopg.pq import ExecStatus, PollingStatus

from penstock._drivers import blocking_calls
from penstock._drivers.loop_wait import wait
from penstock._drivers.psycopg3.connect import next_step
from penstock._drivers.psycopg3.exchange import COPYING
from penstock._process.sockets import READ, WRITE

if TYPE_CHECKING:
    from psycopg.pq.abc import PGcancelConn, PGconn, PGresult

#: Noted of a connection: its last statement was cut off, and is still under way.
CUT_OFF: Final = "cut off"

#: Noted of a connection: a request to cancel may still be on its way.
ASKED_TO_CANCEL: Final = "asked to cancel"

#: Seconds after which a request to cancel is made again, doubled each time. A server needs about a
#: millisecond to take a statement up and to end it.
_FIRST_PAUSE: Final = 0.1


async def read_answers(handle: PGconn, fd: int, heard: list[PGresult], deadline: float) -> bool:
    """Read every result of what was sent into `heard`.

    Returns:
        Whether they were complete in time. Where not, the session is active still, and a second call
        with the same list goes on.

    Raises:
        psycopg.OperationalError: the connection broke.
        psycopg.NotSupportedError: a COPY is under way.
    """
    # A server that is itself blocked on writing reads nothing: so read while writing.
    while handle.flush():
        seen = await wait(fd, READ | WRITE, deadline)
        if not seen:
            return False
        if seen & READ:
            handle.consume_input()
    while True:
        while handle.is_busy():
            if not await wait(fd, READ, deadline):
                return False
            handle.consume_input()
        result = handle.get_result()
        if result is None:
            return True
        if result.status in COPYING:
            raise psycopg.NotSupportedError("a COPY is under way")
        heard.append(result)


async def stop_statement(handle: PGconn, fd: int, noted: set[str], deadline: float) -> bool:
    """Have the server cancel the statement that is under way, and read what it answers.

    While a request to cancel has not been heard to its end, `noted` says so: it could hit a later
    statement. A COPY is left if nobody can be in the middle of it: if it was cut off.

    Returns:
        Whether the session is free again, in time.

    Raises:
        psycopg.OperationalError: the connection broke.
        psycopg.NotSupportedError: it is a COPY that somebody may be in the middle of.
    """
    pause = _FIRST_PAUSE
    while await ask_to_cancel(handle, noted, deadline):
        # A server that had not yet begun with the statement has ignored the request.
        if await _read_on(handle, fd, noted, min(deadline, monotonic() + pause)):
            return True
        if monotonic() >= deadline:
            return False
        pause *= 2
    return False


async def _read_on(handle: PGconn, fd: int, noted: set[str], until: float) -> bool:
    while True:
        try:
            return await read_answers(handle, fd, [], until)
        except psycopg.NotSupportedError:
            if CUT_OFF not in noted:
                raise
        if not await _left_copy(handle, fd, until):
            return False


async def _left_copy(handle: PGconn, fd: int, until: float) -> bool:
    """Whether there is nothing more to copy, in time; how the statement ended is still to be read."""
    result = handle.get_result()
    if result is not None and result.status == ExecStatus.COPY_IN:
        handle.put_copy_end(b"cut off")
        return True
    while True:
        size, _ = handle.get_copy_data(1)
        if size < 0:
            return True
        if not size:
            if not await wait(fd, READ, until):
                return False
            handle.consume_input()


async def ask_to_cancel(handle: PGconn, noted: set[str], deadline: float) -> bool:
    """Make one request to cancel; whether it was heard to its end in time."""
    noted.add(ASKED_TO_CANCEL)
    heard = await _request_cancel(handle, deadline)
    if heard:
        noted.discard(ASKED_TO_CANCEL)
    return heard


async def _request_cancel(handle: PGconn, deadline: float) -> bool:
    # Heard to its end it can hit no later statement: the server closes the request's own connection
    # after it has told the session's process.
    if not psycopg.capabilities.has_cancel_safe():  # libpq before 17
        request = handle.get_cancel()
        try:
            await blocking_calls.call_aside(None, request.cancel, deadline)
        except (psycopg.Error, TimeoutError):
            return False
        return True
    asking = handle.cancel_conn()
    try:
        asking.start()
        return await _delivered(asking, deadline)
    except psycopg.Error:
        return False
    finally:
        asking.finish()


async def _delivered(asking: PGcancelConn, deadline: float) -> bool:
    status: int = PollingStatus.WRITING
    wanted = WRITE  # as with a connect: "behave as if the last poll said: waiting to write"
    while wanted:
        if not await wait(asking.socket, wanted, deadline):
            return False
        status = asking.poll()
        wanted = next_step(status)
    return status == PollingStatus.OK
