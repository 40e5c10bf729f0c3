"""What libpq's trace of one attempt to connect says: the server's code, which libpq does not keep.

One job: find the SQLSTATE in a trace, and say which codes go away by waiting. It must not know: handles,
connections, which library holds them.
"""

from __future__ import annotations

import re
from typing import Final

# Classes of SQLSTATE at start-up that do not go away by waiting: 28 authentication, 3D no such
# database, 42 (42501: the role may not connect; 42704: unknown setting), 22 (a setting's value is
# refused), 0A (feature not supported). Others heal: 53300 too many clients, 57P03 starting up, 08.
_LASTING: Final = ("28", "3D", "42", "22", "0A")

# The server sends severity (S, translated, and V) before the code (C), and the text after it,
# so that text cannot pass for a code. Tab-separated: direction, length, message, fields.
_ERROR: Final = re.compile(
    rb'^B\t\d+\tErrorResponse\t(?: [SV] "[^"\n]*")* C "([0-9A-Z]{5})"', re.MULTILINE
)

#: Set on the error of a failed connect, where it is known: whether the attempt got through the handshake of TLS.
SPOKE_TLS: Final = "_penstock_spoke_tls"

#: Likewise: whether the server asked for a password.
ASKED: Final = "_penstock_asked_for_password"


def heals(sqlstate: str) -> bool:
    """Whether a failure with this code may go away by waiting."""
    return not sqlstate.startswith(_LASTING)


def sqlstate_in(heard: bytes) -> str | None:
    """The code of the error that ended the attempt, if the trace has one."""
    # With sslmode=prefer libpq can start twice, and the second time counts.
    error = _ERROR.search(heard, max(0, heard.rfind(b"\tStartupMessage\t")))
    return error[1].decode() if error else None


def asked_for_password(error: BaseException) -> bool:
    """Whether the server is known to have asked for a password before `error` was raised."""
    return bool(getattr(error, ASKED, False))


def spoke_tls(error: BaseException) -> bool | None:
    """Whether the attempt that raised `error` got through the handshake of TLS; None: not known."""
    found: bool | None = getattr(error, SPOKE_TLS, None)
    return found
