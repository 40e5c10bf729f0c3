"""What one attempt to connect told: the server's code, which libpq does not keep, and what follows from it.

One job: find the SQLSTATE in a trace or in the text of a handle that tells codes (`libpq_codes.py`), and say
which failures go away by waiting. It must not know: handles, connections, which library holds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from penstock.drivers import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Mapping

# Classes of SQLSTATE at start-up that do not go away by waiting: 28 authentication, 3D no such
# database, 42 (42501: the role may not connect; 42704: unknown setting), 22 (a setting's value is
# refused), 0A (feature not supported). Others heal: 53300 too many clients, 57P03 starting up, 08.
_LASTING: Final = ("28", "3D", "42", "22", "0A")

# The server sends severity (S, translated, and V) before the code (C), and the text after it,
# so that text cannot pass for a code. Tab-separated: direction, length, message, fields.
_ERROR: Final = re.compile(
    rb'^B\t\d+\tErrorResponse\t(?: [SV] "[^"\n]*")* C "([0-9A-Z]{5})"', re.MULTILINE
)

# libpq before 18 has no name for the message that starts an attempt.
_START: Final = re.compile(rb"^F\t\d+\t(?:StartupMessage|Unknown message: length is)", re.MULTILINE)

# A handle that tells codes writes nothing of the server's text, so that text cannot pass for a code.
_TOLD: Final = re.compile(r":  ([0-9A-Z]{5})$", re.MULTILINE)

STEP_LOGIN: Final = (
    "check user and password: conninfo, PGPASSWORD, ~/.pgpass; a token may have expired"
)
STEP_ATTRS: Final = (
    "a server let this user in, but it is not what target_session_attrs= asks for: see whether a standby "
    "is about to be promoted; the pool goes on trying"
)

#: Set on the error of a failed connect, where it is known: whether the attempt got through the handshake of TLS.
SPOKE_TLS: Final = "_penstock_spoke_tls"

#: Likewise: whether the server asked for a password.
ASKED: Final = "_penstock_asked_for_password"


#: Likewise: whether the server let the client in.
LET_IN: Final = "_penstock_let_in"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What one attempt to connect told.

    Attributes:
        sqlstate: the code of the error that ended it, if the server gave one.
        tells_codes: whether a code would be known if there was one.
        let_in: whether the server let the client in: password and user were right.
        asked_for_password: whether the server wanted one.
        has_none: whether it wanted one, and there was none to send.
    """

    sqlstate: str | None = None
    tells_codes: bool = False
    let_in: bool = False
    asked_for_password: bool = False
    has_none: bool = False

    def diagnosis(self, text: str, wanted: Mapping[str, str]) -> Diagnosis | None:
        """What follows for the pool; None: nothing does. `wanted`: the attempt's parameters.

        libpq also ends an attempt without a code after a login that succeeded: the server is not what
        `target_session_attrs` asks for, or somebody cut the connection. So a password was refused only
        if the server says so by a code, or, where codes cannot be heard, if it let nobody in.
        """
        if self.sqlstate is not None:
            return Diagnosis(sqlstate=self.sqlstate, heals=heals(self.sqlstate), text=text)
        if self.let_in:
            picks = wanted.get("target_session_attrs") or "any"
            step = None if picks == "any" else STEP_ATTRS
            return Diagnosis(sqlstate=None, heals=True, text=text, next_step=step)
        if self.has_none or (self.asked_for_password and not self.tells_codes):
            return Diagnosis(sqlstate=None, heals=False, text=text, next_step=STEP_LOGIN)
        return None


def heals(sqlstate: str) -> bool:
    """Whether a failure with this code may go away by waiting."""
    return not sqlstate.startswith(_LASTING)


def sqlstate_in(heard: bytes) -> str | None:
    """The code of the error that ended the attempt, if the trace has one."""
    # With sslmode=prefer, or several hosts, libpq can start more than once, and the last time counts.
    begun = max((start.start() for start in _START.finditer(heard)), default=0)
    error = _ERROR.search(heard, begun)
    return error[1].decode() if error else None


def sqlstate_told(text: str) -> str | None:
    """The last code in the text of a handle that tells codes."""
    found = _TOLD.findall(text)
    return str(found[-1]) if found else None


def spoke_tls(error: BaseException) -> bool | None:
    """Whether the attempt that raised `error` got through the handshake of TLS; None: not known."""
    found: bool | None = getattr(error, SPOKE_TLS, None)
    return found


def heard_by(error: BaseException) -> Heard:
    """What is known of the attempt that raised `error`, where no code could be heard."""
    return Heard(
        let_in=bool(getattr(error, LET_IN, False)),
        asked_for_password=bool(getattr(error, ASKED, False)),
    )
