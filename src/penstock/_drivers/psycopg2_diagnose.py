"""Why a server could not be connected to, as far as psycopg2 lets it be known.

libpq keeps no SQLSTATE of a failed connect, its text is in the server's language, and psycopg2 has no way
to listen in. Wrong options and names are told without it. For the rest psycopg 3 is asked, if it is
installed as well: it shares libpq, and can hear the code. Where it is not, a failure counts as one
that heals, with the server's words attached.

It must not know: connections, links, settings of sessions.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import psycopg2

from penstock._drivers.protocol import Diagnosis
from penstock._drivers.psycopg2_connect import connection_params
from penstock.conninfo import to_conninfo
from penstock.secret import Secret

if TYPE_CHECKING:
    from penstock._drivers.protocol import Recipe
    from penstock._drivers.psycopg2_connect import Params

# A name that does not exist. Linux tells "no such name" from "no address of this name".
_NO_SUCH_NAME: Final = tuple(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)

_STEP_OPTIONS: Final = "look at conninfo= and kwargs=: libpq refuses an option or its value"
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
    params = connection_params(recipe)
    if not _are_valid_options(params):
        return _final(text, _STEP_OPTIONS)
    return _by_psycopg3(text, recipe, params, seconds) or unknown


def _final(text: str, next_step: str) -> Diagnosis:
    return Diagnosis(sqlstate=None, heals=False, text=text, next_step=next_step)


def _by_psycopg3(
    text: str, recipe: Recipe, params: Params, seconds: float | None
) -> Diagnosis | None:
    try:
        import psycopg  # noqa: PLC0415  it need not be there

        from penstock._drivers import psycopg3_diagnose  # noqa: PLC0415
    except ImportError:
        return None
    same = replace(recipe, conninfo=Secret(to_conninfo(params)), kwargs={}, connection_class=None)
    found = psycopg3_diagnose.diagnose(psycopg.OperationalError(text), same, seconds)
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
