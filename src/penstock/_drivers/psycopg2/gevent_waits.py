"""psycopg2 on gevent: a wait callback of our own, so that no psycogreen is needed.

Without a callback psycopg2 waits inside libpq, and one statement stops all greenlets. With one libpq
connects without its connect_timeout, so that is kept here. A callback that somebody else has set is
left alone.

An exception in the callback (a `gevent.Timeout` while the statement runs) makes psycopg2 close the
connection: what is lent next is another one.

It must not know: links, pools, whether the process runs on gevent. It takes no lock.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

import psycopg2
from psycopg2 import extensions

from penstock._process.sockets import (
    READ,
    WRITE,
    deadline_in,
    wait,
)

if TYPE_CHECKING:
    from psycopg2.extensions import connection

_WANTED: Final = {extensions.POLL_READ: READ, extensions.POLL_WRITE: WRITE}


def put_right() -> None:
    """Set the callback unless there is one."""
    if extensions.get_wait_callback() is None:
        extensions.set_wait_callback(wait_for)


def wait_for(conn: connection) -> None:
    """Wait until libpq is done with what it does for this connection.

    Raises:
        psycopg2.OperationalError: connecting took longer than connect_timeout, or libpq failed.
    """
    deadline = _deadline(conn)
    while (state := conn.poll()) != extensions.POLL_OK:
        wanted = _WANTED.get(state)
        if wanted is None:
            raise psycopg2.OperationalError(f"libpq failed (poll() gave {state})")
        if not wait(conn.fileno(), wanted, deadline):
            raise psycopg2.OperationalError("no connection in time: connect_timeout has passed")


def _deadline(conn: connection) -> float:
    """Until when this may take: only connecting has a limit."""
    if conn.status != extensions.STATUS_SETUP:
        return inf
    params = extensions.parse_dsn(conn.dsn)
    seconds = str(params.get("connect_timeout", ""))
    if not seconds.strip("0").isdigit():  # libpq: 0, negative or not a number is "no limit"
        return inf
    # libpq's limit is for each address.
    addresses = str(params.get("hostaddr") or params.get("host") or "").count(",") + 1
    return deadline_in(float(seconds) * addresses)
