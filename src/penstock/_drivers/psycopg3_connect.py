"""Connecting through libpq with an exact deadline, and finding out why it failed.

psycopg's `connect()` rounds its timeout up to whole seconds, and the whole gevent hub stands still
while libpq resolves a name. So: names are resolved here by Python, which gevent makes
cooperative, then libpq connects to addresses without blocking (docs: libpq 32.1, PQconnectStart).

It must not know: connections (it makes libpq handles), links, settings of sessions.
"""

from __future__ import annotations

import os
import random
import re
import socket
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from penstock._drivers.protocol import Diagnosis
from penstock._drivers.sockets import READ, WRITE, deadline_in, wait

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.pq.abc import PGconn

    from penstock._drivers.protocol import Recipe

Params = dict[str, Any]

# What psycopg's connect() takes besides libpq's connection parameters.
_DRIVER_OPTIONS: Final = frozenset(
    ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")
)

# Classes of SQLSTATE at start-up that do not go away by waiting: 28 authentication, 3D no such
# database, 42 (42501: the role may not connect; 42704: unknown setting), 22 (a setting's value is
# refused), 0A (feature not supported). Others heal: 53300 too many clients, 57P03 starting up, 08.
_LASTING: Final = ("28", "3D", "42", "22", "0A")

# A name that does not exist. Linux tells "no such name" from "no address of this name".
_NO_SUCH_NAME: Final = tuple(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)


class Secret(str):
    """A string that tracebacks with local variables do not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def driver_options(recipe: Recipe) -> Params:
    """The part of the recipe's keyword arguments that psycopg's connect() takes for itself."""
    return {key: value for key, value in recipe.kwargs.items() if key in _DRIVER_OPTIONS}


def connection_params(recipe: Recipe) -> Params:
    """What libpq is to be told, as the user said it, completed by the recipe's defaults.

    Raises:
        psycopg.ProgrammingError: the connection string or an option is wrong. The text names no
            piece of the string: where parsing stops, libpq quotes what may be the password.
    """
    # All of them hidden: a password may sit under a misspelt name.
    given = {
        key: Secret(value) if isinstance(value, str) else value
        for key, value in recipe.kwargs.items()
        if key not in _DRIVER_OPTIONS
    }
    if unknown := sorted(given.keys() - _known_words()) if given else []:
        raise psycopg.ProgrammingError(f"no connection options: {', '.join(unknown)}")
    params = _parsed(Secret(recipe.conninfo), given)
    if params is None:  # raised here, not in an `except`: libpq's text must not be its context
        raise psycopg.ProgrammingError(
            "the connection string cannot be parsed (not shown: it may hold a password)"
        )
    params = {key: Secret(each) if _is_secret(key) else each for key, each in params.items()}
    if "application_name" not in params:
        # libpq's own rule for "unless the user names one": also by PGAPPNAME or a service file.
        params.setdefault("fallback_application_name", recipe.application_name)
    if not _uses_service(params):  # there the user may have set what cannot be seen from here
        params = {**recipe.keepalive, **params}
    return params


def _is_secret(key: str) -> bool:
    return "password" in key or "secret" in key  # sslpassword, oauth_client_secret


def _parsed(conninfo: str, given: Params) -> Params | None:
    try:
        return dict(conninfo_to_dict(conninfo, **given))
    except psycopg.ProgrammingError:
        return None


def _known_words() -> set[str]:
    return {option.keyword.decode() for option in pq.Conninfo.get_defaults()}


def _uses_service(params: Params) -> bool:
    return bool(params.get("service") or os.environ.get("PGSERVICE"))


def _effective(params: Params) -> dict[str, str]:
    """All parameters as libpq sees them: built in, by the environment, or said by the user."""
    found = {each.keyword.decode(): (each.val or b"").decode() for each in _defaults()}
    said = {key: str(value) for key, value in params.items() if not _is_secret(key)}
    return {**found, **said}


def _defaults() -> list[pq.ConninfoOption]:
    # Not the environment's secrets: they would be in a local variable of every traceback.
    return [each for each in pq.Conninfo.get_defaults() if not _is_secret(each.keyword.decode())]


# --- which addresses, in which order


def _attempts(params: Params) -> tuple[list[Params], list[psycopg.OperationalError]]:
    """One set of parameters per address to try, and the errors of names without one."""
    effective = _effective(params)
    hosts = _hosts(params, effective)
    if hosts is None:
        return [params], []
    attempts: list[Params] = []
    failures: list[psycopg.OperationalError] = []
    for host, port in hosts:
        attempts += _resolved(params, host, port, failures)
    if effective.get("load_balance_hosts") == "random":
        random.shuffle(attempts)
    if effective.get("target_session_attrs") == "prefer-standby":
        attempts = _twice(attempts)
    return attempts, failures


def _hosts(params: Params, effective: dict[str, str]) -> list[tuple[str, str]] | None:
    """Pairs of host and port; None where libpq must find out by itself."""
    # A service named in the parameters is not in the defaults; it may say host and port.
    if not effective["host"] or effective["hostaddr"] or params.get("service"):
        return None
    hosts = effective["host"].split(",")
    ports = effective["port"].split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):  # wrong, and libpq says so better
        return None
    return list(zip(hosts, ports, strict=True))


def _resolved(
    params: Params, host: str, port: str, failures: list[psycopg.OperationalError]
) -> list[Params]:
    if not host or host[0] in "/@":  # a Unix socket
        return [{**params, "host": host, "port": port}]
    try:
        found = socket.getaddrinfo(host, port or None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label above 63 bytes
        failure = psycopg.OperationalError(f"could not resolve the host name {host!r}: {error}")
        failure.__cause__ = error
        failures.append(failure)
        return []
    # `host` stays: certificates and .pgpass go by the name.
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    return [{**params, "host": host, "hostaddr": each, "port": port} for each in addresses]


def _twice(attempts: list[Params]) -> list[Params]:
    # libpq goes through its list of hosts twice for prefer-standby; here each list has one entry.
    return [
        {**attempt, "target_session_attrs": wanted}
        for wanted in ("standby", "any")
        for attempt in attempts
    ]


# --- one address after the other


def connect(params: Params, deadline: float) -> PGconn:
    """A connected, non-blocking libpq handle.

    The addresses are tried one after the other; each gets an equal share of the time that is left
    (one that swallows packets must not use up the others' time), and at most `connect_timeout`.

    Raises:
        psycopg.OperationalError: no address worked; the text has the server's or libpq's words.
        psycopg.errors.ConnectionTimeout: not in time.
    """
    attempts, failures = _attempts(params)
    for index, attempt in enumerate(attempts):
        until = _share(params, deadline, len(attempts) - index)
        connected = _try(attempt, until, failures)
        if connected is not None:
            return connected
        if monotonic() >= deadline:
            break
    raise _merged(failures)


def _share(params: Params, deadline: float, attempts_left: int) -> float:
    now = monotonic()
    share = inf if deadline == inf else now + max(0.0, deadline - now) / attempts_left
    timeout = str(params.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT", ""))
    # libpq: 0, negative or not a number is "no limit".
    return min(share, now + float(timeout)) if timeout.strip("0").isdigit() else share


def _try(attempt: Params, until: float, failures: list[psycopg.OperationalError]) -> PGconn | None:
    try:
        return _connected(attempt, until, None)
    except psycopg.OperationalError as error:
        failures.append(error)
        return None


def _merged(failures: list[psycopg.OperationalError]) -> psycopg.OperationalError:
    if len(failures) == 1:
        return failures[0]
    if not failures:
        return psycopg.OperationalError("there is no address to connect to")
    texts = dict.fromkeys(str(failure) for failure in failures)
    return type(failures[-1])("\n".join(texts))


def _connected(attempt: Params, until: float, tape: Tape | None) -> PGconn:
    handle = pq.PGconn.connect_start(make_conninfo("", **attempt).encode())
    # Should an interrupt strike before the `try`, the handle has no owner: psycopg's PGconn closes
    # its socket when it is freed.
    try:
        if tape is None:
            _step_until_connected(handle, attempt, until)
        else:
            _step_recorded(handle, attempt, until, tape)
    except BaseException:
        handle.finish()
        raise
    return handle


def _step_recorded(handle: PGconn, attempt: Params, until: float, tape: Tape) -> None:
    try:
        tape.start(handle)
        _step_until_connected(handle, attempt, until)
    finally:
        tape.stop(handle)


def _step_until_connected(handle: PGconn, attempt: Params, until: float) -> None:
    # "behave as if the last poll said: waiting to write" (libpq docs)
    wanted = WRITE if handle.status != pq.ConnStatus.BAD else 0
    while wanted:
        # The descriptor can change between steps (TLS refused, next address): ask each time.
        if not wait(handle.socket, wanted, until):
            where = attempt.get("hostaddr") or attempt.get("host") or "the server"
            raise psycopg.errors.ConnectionTimeout(f"no connection to {where} in time")
        wanted = _next_step(handle.connect_poll())
    if handle.status != pq.ConnStatus.OK:
        raise psycopg.OperationalError(handle.get_error_message())
    handle.nonblocking = 1


def _next_step(status: int) -> int:
    if status == pq.PollingStatus.READING:
        return READ
    if status == pq.PollingStatus.WRITING:
        return WRITE
    return 0  # connected, or failed: the status tells


# --- why it failed


class Tape:
    """What the server said during one attempt to connect.

    libpq keeps no SQLSTATE of a failed attempt, and the text is in the server's language; its trace
    shows the fields of the error message. A memory file, never one on disk: it may hold
    what was sent. psycopg never closes the C stream it makes for the trace: about 5 kB stay
    allocated per diagnosis, so diagnose once per outage, not once per attempt.

    libpq before 18 traces errors after authentication only (3D000, 53300 of a database or role).
    And a password that is missing is found out by libpq, so nobody sends a code. So a failure
    after the server asked for a password, with no code, is taken for a wrong or missing one.

    Attributes:
        sqlstate: the code of the error that ended the attempt, if one was heard.
        asked_for_password: whether the server wanted one.
    """

    # The server sends severity (S, translated, and V) before the code (C), and the text after it,
    # so that text cannot pass for a code. Tab-separated: direction, length, message, fields.
    _ERROR = re.compile(
        rb'^B\t\d+\tErrorResponse\t(?: [SV] "[^"\n]*")* C "([0-9A-Z]{5})"', re.MULTILINE
    )

    def __init__(self) -> None:
        self.sqlstate: str | None = None
        self.asked_for_password = False
        self._fd = -1

    def start(self, handle: PGconn) -> None:
        """Record what this handle hears from now on, where that is possible."""
        if not hasattr(os, "memfd_create"):  # not Linux; psycopg traces there only
            return
        self._fd = os.memfd_create("penstock-diagnosis")
        handle.trace(self._fd)
        handle.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)

    def stop(self, handle: PGconn) -> None:
        """Look at what was heard and forget it. The handle must not be freed before."""
        self.asked_for_password = bool(handle.needs_password or handle.used_password)
        if self._fd < 0:
            return
        handle.untrace()  # flushes
        try:
            heard = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        finally:
            os.close(self._fd)
        # With sslmode=prefer libpq can start twice, and the second time counts.
        error = self._ERROR.search(heard, max(0, heard.rfind(b"\tStartupMessage\t")))
        self.sqlstate = error[1].decode() if error else None


def diagnose(error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
    """Tell why an attempt to connect raised `error`; takes one more attempt where that can help."""
    text = " ".join(str(error).split()) or type(error).__name__
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return Diagnosis(sqlstate=sqlstate, heals=_heals(sqlstate), text=text)
    if isinstance(error, psycopg.ProgrammingError) or _names_nothing(error):
        return Diagnosis(sqlstate=None, heals=False, text=text)
    if not isinstance(error, psycopg.OperationalError) or isinstance(
        error, psycopg.errors.ConnectionTimeout
    ):  # another attempt would only be late again
        return Diagnosis(sqlstate=None, heals=True, text=text)
    return _diagnosis_by_trying(text, recipe, deadline_in(seconds))


def _names_nothing(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, UnicodeError) or (
        isinstance(cause, socket.gaierror) and cause.errno in _NO_SUCH_NAME
    )


def _heals(sqlstate: str) -> bool:
    return not sqlstate.startswith(_LASTING)


def _diagnosis_by_trying(text: str, recipe: Recipe, deadline: float) -> Diagnosis:
    params = connection_params(recipe)
    if not _are_valid_options(params):
        return Diagnosis(sqlstate=None, heals=False, text=text)
    findings = list(_findings(params, deadline))
    # Of several servers, one that may take us in later is enough for hope; those that cannot be
    # reached are not counted (localhost is often two addresses, of which one listens).
    for sqlstate, heals in findings:
        if heals:
            return Diagnosis(sqlstate=sqlstate, heals=True, text=text)
    if findings:
        return Diagnosis(sqlstate=findings[-1][0], heals=False, text=text)
    return Diagnosis(sqlstate=None, heals=True, text=text)


def _findings(params: Params, deadline: float) -> Iterator[tuple[str | None, bool]]:
    """What each address answers: code, and whether it heals; nothing where nobody answers."""
    attempts, _ = _attempts(params)
    for index, attempt in enumerate(attempts):
        finding = _finding(attempt, _share(params, deadline, len(attempts) - index))
        if finding is not None:
            yield finding
        if monotonic() >= deadline:
            return


def _finding(attempt: Params, until: float) -> tuple[str | None, bool] | None:
    tape = Tape()
    try:
        _connected(attempt, until, tape).finish()
    except psycopg.Error as error:
        if tape.sqlstate is not None:
            return tape.sqlstate, _heals(tape.sqlstate)
        if tape.asked_for_password and not isinstance(error, psycopg.errors.ConnectionTimeout):
            return None, False
    return None


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
