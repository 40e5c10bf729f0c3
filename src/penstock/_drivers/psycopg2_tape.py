"""What the server said during one attempt to connect, heard with psycopg2's own libpq.

psycopg2 has no way to listen in, but it says where its libpq handle is, and the library is loaded already: so
libpq's trace is switched on by ctypes, for one attempt that diagnoses. Where that cannot be done (another
libpq, linked statically; no memory file) nothing is heard, and nothing else happens.

It must not know: links, settings of sessions, what a code means. Nothing of it runs unless a connect has
failed and psycopg 3, which does the same with an interface of its own, is not installed.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

import psycopg2
from psycopg2 import _psycopg
from psycopg2.extensions import POLL_OK, POLL_READ

from penstock._drivers.sockets import READ, WRITE, wait
from penstock._drivers.trace import sqlstate_in

#: PQTRACE_SUPPRESS_TIMESTAMPS (libpq 32.16, PQsetTraceFlags); libpq 14 and newer.
_NO_TIMES: Final = 1


def sqlstate_of_attempt(dsn: str, until: float) -> str | None:
    """Try once more, and tell the code that the server gives; None: none was heard.

    Blocks until the deadline at most. A connection that comes about is closed.
    """
    try:
        conn = psycopg2.connect(dsn, async_=1)
    except psycopg2.Error:
        return None
    try:
        return _heard(conn, until)
    finally:
        conn.close()


def _heard(conn: Any, until: float) -> str | None:
    pq, c = _libraries()
    if pq is None or not hasattr(os, "memfd_create"):
        return None
    # In memory, never on disk: it may hold what was sent.
    fd = os.memfd_create("penstock-diagnosis")
    try:
        _run_traced(conn, until, pq, c, fd)
        return sqlstate_in(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)


def _run_traced(conn: Any, until: float, pq: Any, c: Any, fd: int) -> None:
    handle = conn.pgconn_ptr
    file = c.fdopen(os.dup(fd), b"w")
    try:
        pq.PQtrace(handle, file)
        pq.PQsetTraceFlags(handle, _NO_TIMES)
        _run(conn, until)
    finally:
        pq.PQuntrace(handle)  # before the file is closed, and before the handle is freed
        c.fclose(file)


def _libraries() -> tuple[Any, Any]:
    """psycopg2's libpq and the C library; None where they cannot be had."""
    try:
        # Names are looked for in what the extension is linked with, too.
        pq: Any = ctypes.CDLL(_psycopg.__file__)
        c: Any = ctypes.CDLL(None)
        c.fdopen.restype = ctypes.c_void_p
        c.fdopen.argtypes = (ctypes.c_int, ctypes.c_char_p)
        c.fclose.argtypes = (ctypes.c_void_p,)
        pq.PQtrace.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        pq.PQuntrace.argtypes = (ctypes.c_void_p,)
        pq.PQsetTraceFlags.argtypes = (ctypes.c_void_p, ctypes.c_int)
    except (OSError, AttributeError):
        return None, None
    return pq, c


def _run(conn: Any, until: float) -> None:
    try:
        while (state := conn.poll()) != POLL_OK:
            if not wait(conn.fileno(), READ if state == POLL_READ else WRITE, until):
                return
    except psycopg2.Error:
        return
