"""Why a server could not be connected to, as far as psycopg2 lets it be known.

libpq keeps no SQLSTATE of a failed connect, its text is in the server's language, and psycopg2 has no way
to listen in. Wrong options and names are told without it. For the rest psycopg 3 is asked, if it is
installed as well: it can hear the code. Where it is not, psycopg2's own libpq is (`psycopg2_tape.py`). What is
told by neither counts as one that heals, with the server's words attached.

It must not know: connections, links, settings of sessions.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import psycopg2

from penstock._drivers import tls_probe
from penstock._drivers.libpq_trace import SPOKE_TLS, heard_by, spoke_tls
from penstock._drivers.psycopg2.adopt import params_used
from penstock._drivers.psycopg2.connect import connection_params
from penstock._drivers.psycopg2.tape import heard_in_attempt
from penstock._process.sockets import deadline_in
from penstock.config.conninfo import to_conninfo
from penstock.config.secret import Secret, is_secret
from penstock.drivers import Diagnosis

if TYPE_CHECKING:
    from penstock._drivers.psycopg2.connect import Params
    from penstock.drivers import Recipe

# A name that does not exist. Linux tells "no such name" from "no address of this name".
_NO_SUCH_NAME: Final = tuple(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)

_STEP_OPTIONS: Final = "look at conninfo= and kwargs=: libpq refuses an option or its value"
_INT: Final = 2**31 - 1
#: Settings that libpq reads as numbers once it connects.
_NUMBERS: Final = (
    *("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval"),
    *("keepalives_count", "tcp_user_timeout"),
)
#: Settings that the look at TLS wants to know, and their variables.
_TLS: Final = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslnegotiation": "PGSSLNEGOTIATION",
}
_STEP_NAME: Final = "look at host=: no address has this name"


def diagnose(error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
    """Tell why an attempt to connect raised `error`; takes one more attempt where that can help."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, psycopg2.ProgrammingError):
        return _final(text, _STEP_OPTIONS)
    cause = error.__cause__
    errno = cause.errno if isinstance(cause, socket.gaierror) else None
    if errno == getattr(socket, "EAI_SERVICE", -1):  # port=abc
        return _final(text, _STEP_OPTIONS)
    if isinstance(cause, UnicodeError) or errno in _NO_SUCH_NAME:
        return _final(text, _STEP_NAME)
    unknown = Diagnosis(sqlstate=None, heals=True, text=text)
    if not isinstance(error, psycopg2.OperationalError) or errno is not None:
        return unknown
    used = params_used(error)
    # All of it but the addresses that were found for names: others may be there by now.
    params = connection_params(recipe) | {
        key: Secret(each) if is_secret(key) else each
        for key, each in ({} if used is None else used.value).items()
        if key not in {"host", "hostaddr", "port", "connect_timeout"}
    }
    if not (_are_sound(params) and _are_valid_options(params)):
        return _final(text, _STEP_OPTIONS)
    found = _by_psycopg3(error, text, recipe, params, seconds)
    return found or _by_tape(error, text, params, deadline_in(seconds)) or unknown


def _final(text: str, next_step: str) -> Diagnosis:
    return Diagnosis(sqlstate=None, heals=False, text=text, next_step=next_step)


def _are_sound(params: Params) -> bool:
    """Whether numbers are numbers, and lists fit each other.

    libpq finds these out when it goes from address to address, and then they look like a failed connect.
    """
    ports = params.get("port", "").split(",")
    hosts = (params.get("hostaddr") or params.get("host") or "").split(",")
    return (
        len(ports) in {1, len(hosts)}
        and all(not port.strip() or _is_in(port, 1, 65535) for port in ports)
        and all(_is_in(params.get(name) or "0", -_INT, _INT) for name in _NUMBERS)
    )


def _is_in(text: str, least: int, most: int) -> bool:
    try:
        return least <= int(text) <= most
    except ValueError:
        return False


def _by_tape(error: BaseException, text: str, params: Params, deadline: float) -> Diagnosis | None:
    """What one more attempt tells, without psycopg 3; or what the first one told."""
    wants_tls = tls_probe.is_wanted(_effective(params))
    if wants_tls and spoke_tls(error) is False:
        tls = tls_probe.look(_effective(params), deadline)
        if tls.next_step is not None:
            return _final(text, tls.next_step)
        if not tls.passed:
            return None
    heard = heard_in_attempt(Secret(to_conninfo(params)), deadline)
    if not heard.tells_codes and not heard.let_in:
        heard = heard_by(error)
    picks = params.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS", "")
    return heard.diagnosis(text, {"target_session_attrs": picks})


def _effective(params: Params) -> dict[str, str]:
    """What libpq makes of the parameters that TLS is about; one address only."""
    said = {name: params.get(name) or os.environ.get(at, "") for name, at in _TLS.items()}
    return {name: value for name, value in said.items() if value and "," not in value}


def _by_psycopg3(
    error: BaseException, text: str, recipe: Recipe, params: Params, seconds: float | None
) -> Diagnosis | None:
    try:
        import psycopg  # noqa: PLC0415  it need not be there

        from penstock._drivers.psycopg3 import diagnose as psycopg3_diagnose  # noqa: PLC0415
    except ImportError:
        return None
    same = replace(recipe, conninfo=Secret(to_conninfo(params)), kwargs={}, connection_class=None)
    asked = psycopg.OperationalError(text)
    setattr(asked, SPOKE_TLS, spoke_tls(error))
    found = psycopg3_diagnose.diagnose(asked, same, seconds)
    return replace(found, text=text)


def _are_valid_options(params: Params) -> bool:
    """Whether libpq takes these options, found without reading its text.

    It checks them before it opens a socket. So it is pointed at a listening socket of our own, by a
    connection that is only begun. Nothing is sent.
    """
    try:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    except OSError:  # no loopback here: then it cannot be told
        return True
    with listener:
        port = str(listener.getsockname()[1])
        probe = {**params, "host": "127.0.0.1", "hostaddr": "127.0.0.1", "port": port}
        dsn = Secret(to_conninfo(probe))
        try:
            psycopg2.connect(dsn, async_=1).close()
        except psycopg2.OperationalError:
            return False
        return True
