"""What the driver for psycopg2 takes for granted of it: its version, and names that its documentation has.

psycopg2 is written in C and shows no private names; these are public, and younger than psycopg2 itself.
It must not know: what the driver does with them. No lock: it changes nothing.
"""

from __future__ import annotations

from typing import Final

import psycopg2
from psycopg2 import extensions

from penstock._drivers.private import Library

LIBRARY: Final = Library(
    name="psycopg2",
    least="2.9.5",
    why="the first for CPython 3.11",
    newest="2.9.13",
    version=lambda: str(vars(psycopg2)["__version__"]),  # typeshed does not know it
    owners=lambda: {
        "connection": extensions.connection,
        "ConnectionInfo": extensions.ConnectionInfo,
        "extensions": extensions,
    },
    names={
        "connection": {
            "info": "how far a failed connect came",
            "pgconn_ptr": "libpq's handle",
            "isolation_level": "a setting that a return sets back",
        },
        "ConnectionInfo": dict.fromkeys(
            ("needs_password", "used_password", "ssl_in_use"), "how far a failed connect came"
        ),
        "extensions": {
            "set_wait_callback": "waits that a deadline ends, and gevent's",
            "get_wait_callback": "waits that a deadline ends, and gevent's",
        },
    },
)
