"""Why a server could not be connected to, told by codes and never by text.

It must not know: connections, links, settings of sessions. It makes attempts of its own through
`psycopg3_connect` and closes what they open.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Final

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

from penstock._drivers import tls_probe
from penstock._drivers.libpq_trace import heals, spoke_tls
from penstock._drivers.psycopg3.adopt import params_of
from penstock._drivers.psycopg3.connect import (
    Params,
    attempts_of,
    connected,
    effective_params,
    share_of,
)
from penstock._drivers.psycopg3.tape import Tape
from penstock._process.sockets import deadline_in
from penstock.drivers import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penstock.drivers import Recipe

# A name that does not exist. Linux tells "no such name" from "no address of this name".
_NO_SUCH_NAME: Final = tuple(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)

_STEP_OPTIONS: Final = "look at conninfo= and kwargs=: libpq refuses an option or its value"
_STEP_NAME: Final = "look at host=: no address has this name"

_LAST_PORT: Final = 65535


def diagnose(error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
    """Tell why an attempt to connect raised `error`; takes one more attempt where that can help."""
    return diagnosis_at_hand(error) or diagnosis_by_trying(error, recipe, deadline_in(seconds))


def diagnosis_at_hand(error: BaseException) -> Diagnosis | None:
    """What the error itself tells; None where another attempt could tell more."""
    text = one_line(error)
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return Diagnosis(sqlstate=sqlstate, heals=heals(sqlstate), text=text)
    if isinstance(error, psycopg.ProgrammingError):
        return Diagnosis(sqlstate=None, heals=False, text=text, next_step=_STEP_OPTIONS)
    if _cause_errno(error) == getattr(socket, "EAI_SERVICE", None):  # port=abc
        return Diagnosis(sqlstate=None, heals=False, text=text, next_step=_STEP_OPTIONS)
    if _names_nothing(error):
        return Diagnosis(sqlstate=None, heals=False, text=text, next_step=_STEP_NAME)
    if not isinstance(error, psycopg.OperationalError) or isinstance(
        error, psycopg.errors.ConnectionTimeout
    ):  # another attempt would only be late again
        return Diagnosis(sqlstate=None, heals=True, text=text)
    return None


def one_line(error: BaseException) -> str:
    """The error's text for a diagnosis."""
    return " ".join(str(error).split()) or type(error).__name__


def _names_nothing(error: BaseException) -> bool:
    return isinstance(error.__cause__, UnicodeError) or _cause_errno(error) in _NO_SUCH_NAME


def _cause_errno(error: BaseException) -> int:
    cause = error.__cause__
    return (cause.errno or 0) if isinstance(cause, socket.gaierror) else 0


def diagnosis_by_trying(error: BaseException, recipe: Recipe, deadline: float) -> Diagnosis:
    """What one more attempt tells, at every address; blocks until the deadline at most."""
    text = one_line(error)
    params = params_of(error, recipe)
    if not (_are_ports(effective_params(params)) and _are_valid_options(params)):
        return Diagnosis(sqlstate=None, heals=False, text=text, next_step=_STEP_OPTIONS)
    findings = list(_findings(params, deadline, spoke_tls(error)))
    # Of several servers, one that takes us in, or may later, is enough for hope; those that cannot be
    # reached are not counted (localhost is often two addresses, of which one listens).
    for finding in findings:
        if finding.heals:
            return replace(finding, text=text)
    if findings:
        return replace(findings[-1], text=text)
    return Diagnosis(sqlstate=None, heals=True, text=text)


def _findings(params: Params, deadline: float, spoke: bool | None) -> Iterator[Diagnosis]:
    """What each address answers; nothing where nobody answers."""
    attempts, _ = attempts_of(params)
    for index, attempt in enumerate(attempts):
        finding = _finding(attempt, share_of(params, deadline, len(attempts) - index), spoke)
        if finding is not None:
            yield finding
        if monotonic() >= deadline:
            return


def _finding(attempt: Params, until: float, spoke: bool | None) -> Diagnosis | None:
    """What one address answers; one connect where it is known how far the attempt before came."""
    effective = effective_params(attempt)
    if spoke is False and tls_probe.is_wanted(effective):
        tls = tls_probe.look(effective, until)
        if not tls.passed:
            return _refused_by(tls)
        spoke = True
    tape = Tape()
    try:
        connected(attempt, until, tape).finish()
    except psycopg.Error as error:
        found = tape.heard.diagnosis("", effective)
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return found if found is not None and found.heals else None
        if found is not None:
            return found
        if not spoke and tls_probe.is_wanted(effective):
            return _refused_by(tls_probe.look(effective, until))
        return None
    return Diagnosis(sqlstate=None, heals=True, text="")  # now it works


def _refused_by(tls: tls_probe.Tls) -> Diagnosis | None:
    if tls.next_step is None:
        return None
    return Diagnosis(sqlstate=None, heals=False, text="", next_step=tls.next_step)


def _are_ports(effective: dict[str, str]) -> bool:
    """Whether each port is one; libpq finds that out from address to address, as if a connect had failed."""
    ports = effective.get("port", "").split(",")
    return all(not port.strip() or _is_port(port) for port in ports)


def _is_port(text: str) -> bool:
    try:
        return 1 <= int(text) <= _LAST_PORT
    except ValueError:
        return False


def _are_valid_options(params: Params) -> bool:
    """Whether libpq takes these options, found without reading its text.

    It checks them before it opens a socket. So it is pointed at a listening socket of our own: an
    attempt that is over at once was never begun. Nothing is sent.
    """
    try:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    except OSError:  # no loopback here: then it cannot be told
        return True
    with listener:
        port = listener.getsockname()[1]
        probe = {**params, "host": "127.0.0.1", "hostaddr": "127.0.0.1", "port": port}
        handle = pq.PGconn.connect_start(make_conninfo("", **probe).encode())
        try:
            return handle.status != pq.ConnStatus.BAD
        finally:
            handle.finish()
