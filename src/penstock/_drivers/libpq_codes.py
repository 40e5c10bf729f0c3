"""Have libpq tell the server's code when it fails to connect.

libpq keeps no SQLSTATE of a failed attempt, its text is in the server's language, and before version 18 its trace
leaves out what the server says during the login. But libpq can write its errors as codes alone
(PQsetErrorVerbosity, libpq 32.11), which no driver passes on. So it is called by ctypes, on a handle that diagnoses
and whose text nobody sees.

It must not know: connections, links, what a code means, which driver has the handle. No lock.
"""

from __future__ import annotations

from typing import Any, Final

#: PQERRORS_SQLSTATE; libpq 12 and newer, and older ones leave the text as it is.
_CODES_ONLY: Final = 3


def library(path: str | None) -> Any:
    """The libpq that the extension module at this path has loaded; None where it cannot be had."""
    try:
        import ctypes  # noqa: PLC0415  some builds of Python have none

        # Names are looked for in what the extension is linked with, too.
        found: Any = ctypes.CDLL(path)
        found.PQsetErrorVerbosity.argtypes = (ctypes.c_void_p, ctypes.c_int)
        found.PQsetErrorVerbosity.restype = ctypes.c_int
    except (ImportError, OSError, AttributeError):
        return None
    return found


def tell_codes(libpq: Any, handle: int | None) -> bool:
    """Have the handle at this address write errors of the server as codes; whether that can be had."""
    if libpq is None or not handle:
        return False
    libpq.PQsetErrorVerbosity(handle, _CODES_ONLY)
    return True
