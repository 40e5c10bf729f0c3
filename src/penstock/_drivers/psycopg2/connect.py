"""Connecting by psycopg2 within a time, with the names looked up by Python.

psycopg2 connects in one call, which cannot be cut short: libpq's own connect_timeout bounds it, in whole
seconds and per address. Names are looked up here, since gevent makes Python's look-up cooperative
and libpq's would stop its hub; libpq then gets the addresses beside the names, and goes through them as
it does (load_balance_hosts, target_session_attrs).

It must not know: links, settings of sessions, why a server refuses.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Final

import psycopg2
from psycopg2.extensions import connection, libpq_version, make_dsn, parse_dsn

from penstock._drivers.adopting import called, unwrapped
from penstock._drivers.libpq_trace import ASKED, LET_IN, SPOKE_TLS
from penstock._drivers.options import names_in, unknown_option
from penstock._drivers.psycopg2 import adopt as adoption
from penstock._drivers.psycopg2.guard import RAW, classes_for
from penstock._drivers.psycopg2.statement_limit import limited_connection
from penstock._process import inflight
from penstock._process.sockets import seconds_to
from penstock._process.tracebacks import without_frames
from penstock.config.conninfo import KEYWORDS, to_conninfo
from penstock.config.secret import Hidden, Secret, is_secret
from penstock.drivers import NotAdopted, UnfitOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.drivers import Recipe

Params = dict[str, str]

# What psycopg2's connect() takes besides libpq's connection parameters. The last two are refused: a
# pool of asynchronous connections is not this one.
_DRIVER_OPTIONS: Final = frozenset(("connection_factory", "cursor_factory", "async", "async_"))

#: libpq before 17 takes 1 for 2.
LEAST_SECONDS: Final = 2


def connection_params(recipe: Recipe) -> Params:
    """What libpq is to be told, as the user said it, completed by the recipe's defaults.

    Raises:
        psycopg2.ProgrammingError: the connection string or an option is wrong. The text names no
            piece of the string: where parsing stops, libpq quotes what may be the password.
    """
    # All of them hidden: a password may sit under a misspelt name.
    given = {
        ("dbname" if key == "database" else key): Secret(value)
        for key, value in recipe.kwargs.items()
        if key not in _DRIVER_OPTIONS and value is not None
    }
    if unknown := sorted(key for key in given if not _is_known(key)):
        raise psycopg2.ProgrammingError(f"no connection options: {', '.join(unknown)}")
    params = _parsed(Secret(recipe.conninfo))
    if params is None:  # raised here, not in an `except`: libpq's text must not be its context
        raise psycopg2.ProgrammingError(
            "the connection string cannot be parsed (not shown: it may hold a password)"
        )
    params = {key: Secret(each) if is_secret(key) else each for key, each in params.items()}
    params |= {key: each if is_secret(key) else str(each) for key, each in given.items()}
    if "application_name" not in params:
        # libpq's own rule for "unless the user names one": also by PGAPPNAME or a service file.
        params.setdefault("fallback_application_name", recipe.application_name)
    if not _uses_service(params):  # there the user may have set what cannot be seen from here
        params = {**{key: str(each) for key, each in recipe.keepalive.items()}, **params}
    return params


def unfit_option(recipe: Recipe) -> UnfitOption | None:
    """The first option of a recipe that psycopg2, or its libpq, does not have, or that a pool cannot honour."""
    kwargs = recipe.kwargs
    for key in ("async", "async_"):
        if kwargs.get(key):
            hint = "leave it out; AsyncConnectionPool has psycopg 3 and asyncpg"
            return UnfitOption(key, "asks for asynchronous connections, and a pool's are not", hint)
    factory = kwargs.get("connection_factory")
    if factory is not None and recipe.connection_class not in {None, factory}:
        hint = "keep one of them"
        return UnfitOption("connection_factory", "contradicts the pool's connection_class=", hint)
    for key in names_in(recipe):
        given = key in kwargs and (key == "database" or key in _DRIVER_OPTIONS)
        if not given and not _is_known(key):
            number = libpq_version()
            library = f"psycopg2 with libpq {number // 10000}.{number % 10000}"
            known = (*filter(_is_known, KEYWORDS), "connection_factory", "cursor_factory")
            return unknown_option(key, library, known)
    return None


def _parsed(conninfo: str) -> Params | None:
    try:
        return dict(parse_dsn(conninfo))
    except psycopg2.ProgrammingError:
        return None


def _is_known(key: str) -> bool:
    try:
        make_dsn(**{key: "x"})
    except psycopg2.ProgrammingError:
        return False
    return True


def _uses_service(params: Params) -> bool:
    return bool(params.get("service") or os.environ.get("PGSERVICE"))


# --- addresses


def resolved(params: Params) -> Params:
    """The same with the addresses of host names beside them.

    Raises:
        psycopg2.OperationalError: no host has an address; its cause is the resolver's error.
    """
    hosts = _hosts(params)
    if hosts is None:
        return params
    found: list[tuple[str, str, str]] = []
    failures: list[psycopg2.OperationalError] = []
    for host, port in hosts:
        try:
            found += [(host, address, port) for address in _addresses(host, port)]
        except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label above 63 bytes
            failures.append(_no_address(host, without_frames(error)))
    if not found:
        try:
            raise failures[0]
        finally:
            failures.clear()  # the error holds this frame, and this frame held it
    names, addresses, ports = (",".join(column) for column in zip(*found, strict=True))
    # `host` stays: certificates and .pgpass go by the name.
    return {**params, "host": names, "hostaddr": addresses, "port": ports}


def _hosts(params: Params) -> list[tuple[str, str]] | None:
    """Pairs of host and port; None where libpq must find out by itself."""
    environ = os.environ
    host = params.get("host") or environ.get("PGHOST", "")
    hostaddr = params.get("hostaddr") or environ.get("PGHOSTADDR")
    hosts = host.split(",")
    if hostaddr or _uses_service(params) or all(map(_is_socket, hosts)):
        return None
    ports = (params.get("port") or environ.get("PGPORT", "")).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):  # wrong, and libpq says so better
        return None
    return list(zip(hosts, ports, strict=True))


def _is_socket(host: str) -> bool:
    return host[:1] in {"", "/", "@"}


def _addresses(host: str, port: str) -> list[str]:
    if _is_socket(host):
        return [""]
    found = socket.getaddrinfo(host, port or None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _no_address(host: str, error: Exception) -> psycopg2.OperationalError:
    # With an @ it is the end of a password that was not escaped; with = or ; it is settings.
    shown = "(not shown: it has @, = or ;)" if set("@=;") & set(host) else repr(host)
    failure = psycopg2.OperationalError(f"could not resolve the host name {shown}: {error}")
    failure.__cause__ = error
    return failure


# --- the attempt


def bounded(params: Params, deadline: float) -> Params:
    """The same with a connect_timeout that ends all addresses' attempts at about the deadline."""
    left = seconds_to(deadline)
    if left is None:
        return params
    addresses = (params.get("hostaddr") or params.get("host") or "").count(",") + 1
    share = max(LEAST_SECONDS, ceil(left / addresses))
    theirs = params.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT", "")
    # libpq: 0, negative or not a number is "no limit"; what is no number it refuses by itself.
    if theirs.strip("0").isdigit():
        share = min(share, int(theirs))
    elif theirs.lstrip("-+ ").strip() and not theirs.lstrip("-+ ").strip().isdigit():
        return params
    return {**params, "connect_timeout": str(share)}


def connect(recipe: Recipe, deadline: float) -> Any:
    """A connection, or what a tracer has put around one.

    Where `psycopg2.connect` is psycopg2's own, or passes the connection_factory on, it is of a watched
    class: of one that was given as a class. See `psycopg2_adopt`.

    Raises:
        psycopg2.OperationalError: no connection; the text has the server's or libpq's words.
        psycopg2.ProgrammingError: an option is wrong.
        ConnectRaised: another function is in the place of psycopg2's, and raised something else.
    """
    factory = _factory(recipe)
    params = bounded(resolved(connection_params(recipe)), deadline)
    dsn, ports = Secret(to_conninfo(params)), _ports(params)
    del params
    if isinstance(factory, type):
        limited = recipe.statement_limit is not None
        classes = classes_for(limited_connection(factory) if limited else factory)
        factory = _telling(classes.live)
    options: dict[str, Any] = {"connection_factory": factory}
    if recipe.kwargs.get("cursor_factory") is not None:
        options["cursor_factory"] = recipe.kwargs["cursor_factory"]
    own = adoption.own_connect()
    with inflight.searching(ports):
        if own is None:
            conn = psycopg2.connect(dsn, **options)
        else:
            conn = called(own, (dsn,), Hidden(options), adoption.is_librarys)
        _note_socket(conn)
    return conn


def _note_socket(conn: Any) -> None:
    with suppress(NotAdopted, psycopg2.Error):  # no connection, or a closed one
        inflight.note(RAW["fileno"](unwrapped(conn, connection)))


def _ports(params: Params) -> list[str]:
    """What the sockets of a connect lead to; a service's file may name others, which are not known."""
    return (params.get("port") or os.environ.get("PGPORT") or "5432").split(",")


def _telling(factory: type[connection]) -> Callable[..., connection]:
    """The same, but a failed attempt's error tells how far it came: the object that knows is lost otherwise."""

    def make(dsn: str, **options: Any) -> connection:
        dsn = Secret(dsn)  # a plain text again by now, and this frame is in the error's traceback
        # As a call of the class would.
        conn: connection = factory.__new__(factory, dsn, **options)  # type: ignore[call-arg]
        try:
            conn.__init__(dsn, **options)  # type: ignore[misc]
        except psycopg2.OperationalError as error:
            _note_how_far(conn, error)
            adoption.note_used(error, Hidden(dsn))
            raise
        return conn

    return make


def _note_how_far(conn: connection, error: psycopg2.OperationalError) -> None:
    try:
        info = conn.info
        setattr(error, SPOKE_TLS, bool(info.ssl_in_use))
        setattr(error, ASKED, bool(info.used_password or info.needs_password))
        # What a server reports of itself it tells to whom it has let in.
        setattr(error, LET_IN, info.parameter_status("server_version") is not None)
    except psycopg2.Error:  # it did not come as far as to a handle
        pass


def _factory(recipe: Recipe) -> Callable[..., Any]:
    kwargs = recipe.kwargs
    if kwargs.get("async") or kwargs.get("async_"):
        raise psycopg2.ProgrammingError("async_=True: a pool needs synchronous connections")
    factory: Any = recipe.connection_class or kwargs.get("connection_factory") or connection
    if isinstance(factory, type) and not issubclass(factory, connection):
        raise psycopg2.ProgrammingError(
            f"{factory.__name__} is no subclass of psycopg2.extensions.connection"
        )
    return factory  # type: ignore[no-any-return]  # psycopg2 finds out if it is not callable
