"""What one attempt to connect tells, heard with psycopg2's own libpq.

psycopg2 has no way to listen in, but it says where its libpq handle is, and the library is loaded already: so
libpq's trace is switched on by ctypes, and its errors become codes, for one attempt that diagnoses. Where that
cannot be done (another libpq, linked statically; no memory file) no code is heard, and nothing else happens.

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

from penstock._drivers import libpq_codes
from penstock._drivers.libpq_trace import Heard, sqlstate_in, sqlstate_told
from penstock._process.sockets import READ, WRITE, wait

#: PQTRACE_SUPPRESS_TIMESTAMPS (libpq 32.16, PQsetTraceFlags); libpq 14 and newer.
_NO_TIMES: Final = 1
#: CONNECTION_AUTH_OK (libpq 32.1): received authentication, waiting for the server to finish.
_AUTH_OK: Final = 5


def heard_in_attempt(dsn: str, until: float) -> Heard:
    """Try once more, and tell what is heard. Blocks until the deadline at most.

    A connection that comes about is closed.
    """
    try:
        conn = psycopg2.connect(dsn, async_=1)
    except psycopg2.Error:
        return Heard()
    try:
        return _heard(conn, until)
    finally:
        conn.close()


def _heard(conn: Any, until: float) -> Heard:
    pq, c = _libraries()
    tells = libpq_codes.tell_codes(pq, getattr(conn, "pgconn_ptr", None))
    if not tells or not hasattr(os, "memfd_create"):
        text, let_in, traced = *_run(conn, until), b""
    else:
        # In memory, never on disk: it may hold what was sent.
        fd = os.memfd_create("penstock-diagnosis")
        try:
            text, let_in = _run_traced(conn, until, pq, c, fd)
            traced = os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
    told = sqlstate_told(text) if tells else None
    info = conn.info
    return Heard(
        sqlstate=told or sqlstate_in(traced),
        tells_codes=tells,
        # What a server reports of itself comes after AuthenticationOk, and may come with it.
        let_in=let_in or info.parameter_status("server_version") is not None,
        asked_for_password=bool(info.used_password or info.needs_password),
        has_none=bool(info.needs_password),
    )


def _run_traced(conn: Any, until: float, pq: Any, c: Any, fd: int) -> tuple[str, bool]:
    handle = conn.pgconn_ptr
    file = c.fdopen(os.dup(fd), b"w")
    try:
        pq.PQtrace(handle, file)
        pq.PQsetTraceFlags(handle, _NO_TIMES)
        return _run(conn, until)
    finally:
        pq.PQuntrace(handle)  # before the file is closed, and before the handle is freed
        c.fclose(file)


def _libraries() -> tuple[Any, Any]:
    """psycopg2's libpq and the C library; None where they cannot be had."""
    try:
        # Names are looked for in what the extension is linked with, too.
        pq: Any = libpq_codes.library(_psycopg.__file__)
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


def _run(conn: Any, until: float) -> tuple[str, bool]:
    """The steps of the attempt: the error's text, and whether AuthenticationOk came; it is in no trace."""
    let_in = False
    try:
        while (state := conn.poll()) != POLL_OK:
            let_in = let_in or conn.info.status == _AUTH_OK
            if not wait(conn.fileno(), READ if state == POLL_READ else WRITE, until):
                break
    except psycopg2.Error as error:
        return str(error).rstrip(), let_in
    return "", let_in
