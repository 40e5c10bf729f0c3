"""Bounded exchanges with a libpq handle on an event loop: what `psycopg3_wire` does for threads.

What was read is kept by whoever calls, so that an exchange that was cancelled can be gone on with.

It must not know: psycopg's connections, cursors and transactions; recipes; links.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.pq import PollingStatus

from penstock._drivers import side_threads
from penstock._drivers.awaiting import wait
from penstock._drivers.psycopg3_connect import next_step
from penstock._drivers.psycopg3_wire import COPYING
from penstock._drivers.sockets import READ, WRITE

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGcancelConn, PGconn, PGresult

RV = TypeVar("RV")


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


async def driven(generator: PQGen[RV], fd: int) -> RV:
    """Run one of psycopg's generators to its end, however long that takes.

    psycopg's own `wait` does the same, but cancels the statement on the server when it is cancelled, and
    waits up to 10 s for that; here a cancellation is heard at once, and the session left as it is.
    """
    try:
        wanted: Any = next(generator)
        while True:
            wanted = generator.send(await wait(fd, wanted, inf))
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]


async def cancel_on_server(handle: PGconn, deadline: float) -> bool:
    """Ask the server to cancel what the session is doing; wait until it has taken that up.

    Then the request can hit no later statement: the server closes the request's own connection
    after it has told the session's process. Where this ends early that is not so.

    Returns:
        Whether the request was delivered in time.
    """
    if not psycopg.capabilities.has_cancel_safe():  # libpq before 17
        request = handle.get_cancel()
        try:
            await side_threads.call_aside(None, request.cancel, deadline)
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
    wanted = WRITE  # as with a connect: "behave as if the last poll said: waiting to write"
    while wanted:
        if not await wait(asking.socket, wanted, deadline):
            return False
        status = asking.poll()
        wanted = next_step(status)
    return status == PollingStatus.OK
