"""Connecting through libpq with an exact deadline.

psycopg's `connect()` rounds its timeout up to whole seconds, and the whole gevent hub stands still
while libpq resolves a name. So: names are resolved here by Python, which gevent makes
cooperative, then libpq connects to addresses without blocking (docs: libpq 32.1, PQconnectStart).

It must not know: connections (it makes libpq handles), links, settings of sessions, why a server
refuses.
"""

from __future__ import annotations

import os
import random
import socket
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from penstock._drivers.libpq_trace import SPOKE_TLS, spoke_tls
from penstock._drivers.options import names_in, unknown_option
from penstock._process import inflight
from penstock._process.sockets import READ, WRITE, wait
from penstock._process.tracebacks import without_frames
from penstock.config.secret import Secret, is_secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.pq.abc import PGconn

    from penstock._drivers.psycopg3.tape import Tape
    from penstock.drivers import Recipe, UnfitOption

    Resolve = Callable[[str, str], list[str]]

Params = dict[str, Any]

# What psycopg's connect() takes besides libpq's connection parameters.
_DRIVER_OPTIONS: Final = frozenset(
    ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")
)


def driver_options(recipe: Recipe) -> Params:
    """The part of the recipe's keyword arguments that psycopg's connect() takes for itself."""
    return {key: value for key, value in recipe.kwargs.items() if key in _DRIVER_OPTIONS}


def connection_params(recipe: Recipe) -> Params:
    """What libpq is to be told, as the user said it, completed by the recipe's defaults.

    Raises:
        psycopg.ProgrammingError: the connection string or an option is wrong. The text names no
            piece of the string: where parsing stops, libpq quotes what may be the password.
    """
    known = _known_words() | _DRIVER_OPTIONS if recipe.kwargs else ()
    if unknown := sorted(recipe.kwargs.keys() - known):
        raise psycopg.ProgrammingError(f"no connection options: {', '.join(unknown)}")
    return completed(said_params(recipe), recipe)


def said_params(recipe: Recipe) -> Params:
    """What the user said to libpq; keyword arguments that are not libpq's are left out.

    Raises:
        psycopg.ProgrammingError: the connection string is wrong, as in `connection_params`.
    """
    known = _known_words() if recipe.kwargs else ()
    # All of them hidden: a password may sit under a misspelt name.
    given = {
        key: None if value is None else Secret(value)  # as psycopg: str(value)
        for key, value in recipe.kwargs.items()
        if key in known
    }
    params = _parsed(Secret(recipe.conninfo), given)
    if params is None:  # raised here, not in an `except`: libpq's text must not be its context
        raise psycopg.ProgrammingError(
            "the connection string cannot be parsed (not shown: it may hold a password)"
        )
    return {key: Secret(each) if is_secret(key) else each for key, each in params.items()}


def completed(params: Params, recipe: Recipe) -> Params:
    """The same with the recipe's defaults."""
    params = dict(params)
    if "application_name" not in params:
        # libpq's own rule for "unless the user names one": also by PGAPPNAME or a service file.
        params.setdefault("fallback_application_name", recipe.application_name)
    if not _uses_service(params):  # there the user may have set what cannot be seen from here
        params = {**recipe.keepalive, **params}
    return params


def unfit_option(recipe: Recipe) -> UnfitOption | None:
    """The first option of a recipe that psycopg, or the libpq that is installed, does not have."""
    known = _known_words()
    for key in names_in(recipe):
        if key not in known and not (key in recipe.kwargs and key in _DRIVER_OPTIONS):
            library = f"psycopg {psycopg.__version__} with libpq {pq.version_pretty(pq.version())}"
            return unknown_option(key, library, known | _DRIVER_OPTIONS)
    return None


def _parsed(conninfo: str, given: Params) -> Params | None:
    try:
        return dict(conninfo_to_dict(conninfo, **given))
    except psycopg.ProgrammingError:
        return None


def _known_words() -> set[str]:
    return {option.keyword.decode() for option in pq.Conninfo.get_defaults()}


def is_for_libpq_to_resolve(params: Params) -> bool:
    """Whether a host name could be where only libpq looks, which then waits for the resolver."""
    return bool(params.get("service"))


def _uses_service(params: Params) -> bool:
    return bool(params.get("service") or os.environ.get("PGSERVICE"))


def effective_params(params: Params) -> dict[str, str]:
    """All parameters as libpq sees them: built in, by the environment, or said by the user."""
    found = {each.keyword.decode(): (each.val or b"").decode() for each in _defaults()}
    said = {key: str(value) for key, value in params.items() if not is_secret(key)}
    return {**found, **said}


def _defaults() -> list[pq.ConninfoOption]:
    # Not the environment's secrets: they would be in a local variable of every traceback.
    return [each for each in pq.Conninfo.get_defaults() if not is_secret(each.keyword.decode())]


# --- which addresses, in which order


def attempts_of(
    params: Params, resolve: Resolve | None = None
) -> tuple[list[Params], list[psycopg.OperationalError]]:
    """One set of parameters per address to try, and the errors of names without one.

    `resolve` gives the addresses of a host name and port; by default it asks and waits.
    """
    effective = effective_params(params)
    hosts = _hosts(params, effective)
    if hosts is None:
        return [params], []
    attempts: list[Params] = []
    failures: list[psycopg.OperationalError] = []
    for host, port in hosts:
        if not is_host_name(host):
            attempts.append({**params, "host": host, "port": port})
            continue
        try:
            addresses = (resolve or look_up)(host, port)
        except psycopg.OperationalError as failure:
            failures.append(without_frames(failure))
            continue
        # `host` stays: certificates and .pgpass go by the name.
        attempts += [
            {**params, "host": host, "hostaddr": address, "port": port} for address in addresses
        ]
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


def names_of(params: Params) -> list[tuple[str, str]]:
    """The host names, each with its port, that `attempts_of` will have resolved."""
    hosts = _hosts(params, effective_params(params)) or []
    return [pair for pair in dict.fromkeys(hosts) if is_host_name(pair[0])]


def is_host_name(host: str) -> bool:
    """Whether it is a name or an address, and not a Unix socket."""
    return bool(host) and host[0] not in "/@"


def look_up(host: str, port: str) -> list[str]:
    """The addresses of a host name; asks the resolver and waits for it.

    Raises:
        psycopg.OperationalError: there is none, or no answer; the resolver's error is its cause.
    """
    try:
        found = socket.getaddrinfo(host, port or None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label above 63 bytes
        raise psycopg.OperationalError(
            f"could not resolve the host name {_shown_host(host)}: {error}"
        ) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _shown_host(host: str) -> str:
    if "@" in host:  # it is the end of a password that was not escaped
        return "(not shown: it has an @; write %40 for one in a password)"
    if "=" in host or ";" in host:  # settings with semicolons between them, as other databases' are
        return "(not shown: it has a = or ;, and blanks are what stands between settings)"
    return repr(host)


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
    attempts, failures = attempts_of(params)
    for index, attempt in enumerate(attempts):
        until = share_of(params, deadline, len(attempts) - index)
        handle = _try(attempt, until, failures)
        if handle is not None:
            return handle
        if monotonic() >= deadline:
            break
    try:
        raise merged(failures)
    finally:
        failures.clear()  # the error holds this frame, and this frame held it


def share_of(params: Params, deadline: float, attempts_left: int) -> float:
    """The instant until which the first of `attempts_left` attempts may go on."""
    now = monotonic()
    share = inf if deadline == inf else now + max(0.0, deadline - now) / attempts_left
    timeout = str(params.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT", ""))
    # libpq: 0, negative or not a number is "no limit".
    return min(share, now + float(timeout)) if timeout.strip("0").isdigit() else share


def _try(attempt: Params, until: float, failures: list[psycopg.OperationalError]) -> PGconn | None:
    try:
        return connected(attempt, until, None)
    except psycopg.OperationalError as error:
        failures.append(without_frames(error))
        return None


def merged(failures: list[psycopg.OperationalError]) -> psycopg.OperationalError:
    """One error that says what became of every address."""
    if len(failures) == 1:
        return failures[0]
    if not failures:
        return psycopg.OperationalError("there is no address to connect to")
    texts = dict.fromkeys(str(failure) for failure in failures)
    error = type(failures[-1])("\n".join(texts))
    if all(spoke_tls(failure) is False for failure in failures):
        setattr(error, SPOKE_TLS, False)
    return error


def connected(attempt: Params, until: float, tape: Tape | None) -> PGconn:
    """A connected handle by one attempt, which `tape` records.

    Raises:
        psycopg.OperationalError: refused, or unreachable.
        psycopg.errors.ConnectionTimeout: not in time.
    """
    handle = start(attempt)
    # Should an interrupt strike before the `try`, the handle has no owner: psycopg's PGconn closes
    # its socket when it is freed.
    try:
        if tape is None:
            _step_until_connected(handle, attempt, until, None)
        else:
            _step_recorded(handle, attempt, until, tape)
    except BaseException:
        handle.finish()
        raise
    return handle


def _step_recorded(handle: PGconn, attempt: Params, until: float, tape: Tape) -> None:
    try:
        tape.start(handle)
        _step_until_connected(handle, attempt, until, tape)
    finally:
        tape.stop(handle)


def start(attempt: Params) -> PGconn:
    """A handle that has begun to connect, or has failed already."""
    return pq.PGconn.connect_start(make_conninfo("", **attempt).encode())


def _step_until_connected(handle: PGconn, attempt: Params, until: float, tape: Tape | None) -> None:
    wanted = first_step(handle)
    while wanted:
        # The descriptor can change between steps (TLS refused, next address): ask each time.
        fd = handle.socket
        inflight.note(fd)
        if not wait(fd, wanted, until):
            raise too_late(attempt)
        wanted = next_step(handle.connect_poll())
        if tape is not None:
            tape.look(handle)
    check_connected(handle)


def first_step(handle: PGconn) -> int:
    """What a handle that was just started waits for; 0 if it has failed."""
    # "behave as if the last poll said: waiting to write" (libpq docs)
    return WRITE if handle.status != pq.ConnStatus.BAD else 0


def next_step(status: int) -> int:
    """What a poll's answer says to wait for; 0 at the end: the status tells which."""
    if status == pq.PollingStatus.READING:
        return READ
    if status == pq.PollingStatus.WRITING:
        return WRITE
    return 0


def too_late(attempt: Params) -> psycopg.OperationalError:
    """The error for an address that did not answer in time."""
    where = attempt.get("hostaddr") or attempt.get("host") or "the server"
    return psycopg.errors.ConnectionTimeout(f"no connection to {where} in time")


def check_connected(handle: PGconn) -> None:
    """Make the handle ready for use, after the last step.

    Raises:
        psycopg.OperationalError: it is not connected.
    """
    if handle.status != pq.ConnStatus.OK:
        raise _not_connected(handle)  # with no name here: its traceback has this frame
    handle.nonblocking = 1


def _not_connected(handle: PGconn) -> psycopg.OperationalError:
    error = psycopg.OperationalError(handle.get_error_message())
    setattr(error, SPOKE_TLS, bool(handle.ssl_in_use))
    return error
