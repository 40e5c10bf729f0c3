"""psycopg 3 on gevent, also where it was imported before gevent patched.

psycopg chooses how to wait when it is imported: in C, unless gevent has patched `select` by then. In a
worker of `gunicorn --preload -k gevent` it has not, and one statement would stop all greenlets. So
the choice is made again here; and the locks of connections are to be gevent's, or two greenlets that
share a connection would stop the hub for good.

It must not know: connections, links, whether the process runs on gevent. Private names of psycopg that
it relies on are each held by tests/drivers/test_third_party_assumptions.py.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import psycopg.connection
from psycopg import waiting

# As a module without types: these names are not for others to set.
_waiting: Any = waiting
_connection: Any = psycopg.connection


def put_right() -> None:
    """Have psycopg wait by `select.poll`, which gevent has patched; leave a user's choice alone."""
    waits_in_c = _waiting.wait is getattr(_waiting, "wait_c", None)
    if waits_in_c and "PSYCOPG_WAIT_FUNC" not in os.environ:
        _waiting.wait = _waiting.wait_poll
    if _connection.Lock is not threading.Lock:
        _connection.Lock = threading.Lock
