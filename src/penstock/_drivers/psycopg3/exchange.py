"""Bounded exchanges with a libpq handle: every wait ends at an exact deadline.

psycopg's own calls cannot be bounded from outside: `commit()`, `rollback()` and `execute()` wait
as long as the server likes, and a frozen server whose kernel still acknowledges keeps them for
ever. This loop over libpq's non-blocking calls costs no more than psycopg's and gives up in time.

It must not know: psycopg's connections, cursors and transactions; recipes; links.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg.pq import ExecStatus

from penstock._process.sockets import READ, WRITE, wait

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg.pq.abc import PGconn, PGresult

_DONE = frozenset((ExecStatus.EMPTY_QUERY, ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK))

# libpq repeats these for ever until somebody copies: reading on would never end.
COPYING = frozenset((ExecStatus.COPY_IN, ExecStatus.COPY_OUT, ExecStatus.COPY_BOTH))


def send(handle: PGconn, query: bytes) -> None:
    """Send a simple-protocol message, as far as it goes without waiting.

    Raises:
        psycopg.OperationalError: the connection is broken or busy.
    """
    handle.send_query(query)
    handle.flush()


def answers(handle: PGconn, fd: int, deadline: float) -> list[PGresult] | None:
    """Read every result of what was sent.

    Returns:
        The results, errors of the server among them; None if they were not complete in time.

    Raises:
        psycopg.OperationalError: the connection broke.
    """
    if not _flushed(handle, fd, deadline):
        return None
    results: list[PGresult] = []
    while _arrived(handle, fd, deadline):
        result = handle.get_result()
        if result is None:
            return results
        if result.status in COPYING:
            return None
        results.append(result)
    return None


def ask(handle: PGconn, fd: int, query: bytes, deadline: float) -> list[PGresult] | None:
    """Send a simple-protocol message and read every result: one round trip.

    Returns and raises what `send` and `answers` do.
    """
    send(handle, query)
    return answers(handle, fd, deadline)


def all_done(results: Sequence[PGresult] | None) -> bool:
    """Whether there was an answer and nothing in it is an error."""
    return bool(results) and all(result.status in _DONE for result in results or ())


def _flushed(handle: PGconn, fd: int, deadline: float) -> bool:
    # A server that is itself blocked on writing reads nothing: so read while writing.
    while handle.flush():
        seen = wait(fd, READ | WRITE, deadline)
        if not seen:
            return False
        if seen & READ:
            handle.consume_input()
    return True


def _arrived(handle: PGconn, fd: int, deadline: float) -> bool:
    while handle.is_busy():
        if not wait(fd, READ, deadline):
            return False
        handle.consume_input()
    return True
