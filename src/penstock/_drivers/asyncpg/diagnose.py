"""Why a server could not be connected to: asyncpg tells by classes, so nothing is tried again.

It must not know: connections, links.
"""

from __future__ import annotations

import socket
import ssl
from typing import Final

import asyncpg

from penstock._drivers.libpq_trace import STEP_ATTRS
from penstock._drivers.tls_probe import NO_TLS, NOT_VERIFIED
from penstock.drivers import Diagnosis

# Classes of SQLSTATE at start-up that do not go away by waiting; see psycopg3_diagnose.
_LASTING: Final = ("28", "3D", "42", "22", "0A")
_NO_SUCH_NAME: Final = tuple(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)
_STEP_OPTIONS: Final = "look at conninfo= and kwargs=: asyncpg refuses an option or its value"
_STEP_NAME: Final = "look at host=: no address has this name"


def diagnose(error: BaseException) -> Diagnosis:
    """Tell why an attempt to connect raised `error`."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "; ".join((text, *getattr(error, "__notes__", ())))  # of the other hosts
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):
        # asyncpg's own word for a session that ended; the server may have said why.
        sqlstate = getattr(error.__cause__, "sqlstate", None)
    if sqlstate is not None:
        heals = not sqlstate.startswith(_LASTING)
        return Diagnosis(sqlstate=sqlstate, heals=heals, text=text)
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):  # after a login that succeeded
        return Diagnosis(sqlstate=None, heals=True, text=text, next_step=STEP_ATTRS)
    next_step = _next_step(error)
    return Diagnosis(sqlstate=None, heals=next_step is None, text=text, next_step=next_step)


def _next_step(error: BaseException) -> str | None:
    """What to do about a failure that does not heal."""
    if isinstance(error, socket.gaierror):
        return _STEP_NAME if error.errno in _NO_SUCH_NAME else None
    if isinstance(error, ssl.SSLCertVerificationError):
        return NOT_VERIFIED
    # Exactly this class is what asyncpg raises about TLS, and nothing else does.
    if type(error) is ConnectionError and "rejected SSL" in str(error):
        return NO_TLS
    if isinstance(error, asyncpg.InterfaceError):
        return _STEP_OPTIONS
    return None
