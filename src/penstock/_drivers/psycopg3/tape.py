"""What libpq says while it connects: its trace of one attempt.

It must not know: how to connect, what is made of what was said. A tape belongs to one attempt. No lock.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

from psycopg import pq

from penstock._drivers import libpq_codes
from penstock._drivers.libpq_trace import Heard, sqlstate_in, sqlstate_told

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

#: libpq from here on traces what the server says during a login.
_TRACES_LOGINS: Final = 18_00_00


class Tape:
    """What one attempt to connect tells, at each of its steps.

    libpq keeps no SQLSTATE of a failed attempt, and the text is in the server's language. Its trace shows
    the fields of the error message, from version 18 on also those of an error during the login; older ones
    write the code as their text (`libpq_codes.py`), which nobody sees: this attempt only diagnoses. The
    trace goes to a memory file, never to one on disk: it may hold what was sent. psycopg never closes the C
    stream it makes for the trace: about 5 kB stay allocated per diagnosis, so diagnose once per outage,
    not once per attempt.
    """

    def __init__(self) -> None:
        self.heard = Heard()
        self._tells_codes = False
        self._let_in = False
        self._fd = -1

    def start(self, handle: PGconn) -> None:
        """Record what this handle hears from now on, where that is possible."""
        # Documented, but not in the Protocol that psycopg types its handles by.
        address: int | None = getattr(handle, "pgconn_ptr", None)
        self._tells_codes = libpq_codes.tell_codes(_libpq(), address)
        if not hasattr(os, "memfd_create"):  # not Linux; psycopg traces there only
            return
        self._tells_codes = self._tells_codes or pq.version() >= _TRACES_LOGINS
        self._fd = os.memfd_create("penstock-diagnosis")
        handle.trace(self._fd)
        handle.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)

    def look(self, handle: PGconn) -> None:
        """Called after each step: AuthenticationOk is in no trace."""
        self._let_in = self._let_in or handle.status == pq.ConnStatus.AUTH_OK

    def stop(self, handle: PGconn) -> None:
        """Look at what was heard and forget it. The handle must not be freed before."""
        traced = self._traced(handle)
        told = sqlstate_told(handle.get_error_message())
        self.heard = Heard(
            sqlstate=told or sqlstate_in(traced),
            tells_codes=self._tells_codes,
            # What a server reports of itself comes after AuthenticationOk, and may come with it.
            let_in=self._let_in or handle.parameter_status(b"server_version") is not None,
            asked_for_password=bool(handle.needs_password or handle.used_password),
            has_none=bool(handle.needs_password),
        )

    def _traced(self, handle: PGconn) -> bytes:
        if self._fd < 0:
            return b""
        handle.untrace()  # flushes
        try:
            return os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        finally:
            os.close(self._fd)


def _libpq() -> Any:
    """The libpq that psycopg has loaded, for what it does not pass on; None where it cannot be had."""
    # psycopg 3.2 and 3.3: the library that its Python implementation loads, or the extension's own file.
    name, attribute = "psycopg.pq._pq_ctypes", "libname"
    if pq.__impl__ != "python":
        name, attribute = pq.PGconn.__module__, "__file__"
    path = getattr(sys.modules.get(name), attribute, None)
    return None if path is None else libpq_codes.library(path)
