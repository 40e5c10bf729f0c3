"""Connecting through asyncpg, told by libpq's words, with an exact deadline.

What asyncpg does not do by itself: read conninfo strings, keep a look-up of a name out of the loop's
default executor (`asyncio.run` would wait for it), connect to the address that was found but check
the certificate of the name, keepalive. Names are looked up here, and asyncpg gets addresses; so
its requests to cancel go to the same server, too.

It must not know: connections' settings, links, why a server refuses.
"""

from __future__ import annotations

import getpass
import inspect
import os
import random
import socket
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from penstock._drivers.adopting import ConnectRaised, unwrapped
from penstock._drivers.asyncpg.adopt import is_librarys, own_connect
from penstock._drivers.asyncpg.passfile import password_for
from penstock._drivers.asyncpg.tls import tls_options
from penstock._drivers.blocking_calls import call_aside
from penstock._drivers.options import unknown_option
from penstock._process import inflight
from penstock._process.tracebacks import place_noted, without_frames
from penstock.config.conninfo import (
    KEYWORDS,
    Wrong,
    read,
    to_url,
)
from penstock.config.secret import Hidden, Secret, is_secret
from penstock.drivers import NotAdopted, UnfitOption

if TYPE_CHECKING:
    from penstock.drivers import Recipe

Words = dict[str, Any]

# Words of asyncpg.connect() that penstock answers itself, or has another way for.
_NOT_OPTIONS: Final = frozenset(("dsn", "loop", "connection_class", "database"))

# libpq's words that change nothing asyncpg does: it has no GSS encryption, and always UTF-8.
_WITHOUT_EFFECT: Final = {
    "client_encoding": None,  # any value
    "gssencmode": ("disable", "prefer"),
    "channel_binding": ("disable", "prefer"),
    "sslcompression": ("0",),
    "sslcertmode": ("allow",),
    "gssdelegation": ("0",),
}
# libpq's words that are done here, where the addresses are: with a service asyncpg finds them by itself.
_NOT_WITH_SERVICE: Final = frozenset(("hostaddr", "load_balance_hosts", "sslsni"))
_UNDERSTOOD: Final = frozenset(
    """
    host hostaddr port dbname user password passfile connect_timeout options application_name
    fallback_application_name keepalives keepalives_idle keepalives_interval keepalives_count
    tcp_user_timeout replication sslmode sslnegotiation sslcert sslkey sslpassword sslrootcert sslcrl
    sslsni ssl_min_protocol_version ssl_max_protocol_version krbsrvname gsslib service servicefile
    target_session_attrs load_balance_hosts
    """.split()  # noqa: SIM905  thirty quotes would hide the names
)
# libpq 34.15: what is not said is looked for here.
_ENVIRONMENT: Final = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "user": "PGUSER",
    "dbname": "PGDATABASE",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "options": "PGOPTIONS",
    "application_name": "PGAPPNAME",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "sslsni": "PGSSLSNI",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
}
# What asyncpg raises by itself; all else is a mistake in a program, whose place is worth knowing.
_OF_ASYNCPG: Final = (asyncpg.PostgresError, asyncpg.InterfaceError)
# Where servers put their sockets: what asyncpg tries, and libpq on Debian and elsewhere.
_SOCKET_FOLDERS: Final = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # noqa: S108


def words_of(recipe: Recipe) -> tuple[Words, Hidden[Words]]:
    """What was said in libpq's words, the environment's included, and in asyncpg's own.

    asyncpg's own reach it as they are, since its encoder takes no subclass of str: so they are hidden.

    Raises:
        asyncpg.ClientConfigurationError: the string does not parse, or there is no such option. The
            text names no piece of the string.
    """
    found = read(Secret(recipe.conninfo))
    if isinstance(found, Wrong):
        raise asyncpg.ClientConfigurationError(
            f"the connection string does not parse: {found.what}", hint=found.hint
        )
    words, options = found, Hidden[Words]({})
    known, others = _parameters()
    for name in recipe.kwargs:
        key = "dbname" if name == "database" else name
        if key in KEYWORDS and not callable(recipe.kwargs[name]):
            words[key] = _as_libpq(recipe.kwargs[name], key)
        elif name not in _NOT_OPTIONS and (others or name in known):
            options.value[name] = recipe.kwargs[name]
        else:
            raise asyncpg.ClientConfigurationError(f"no connection option: {name}")
    words = {key: each for key, each in words.items() if each is not None}
    for key, variable in _ENVIRONMENT.items():
        if os.environ.get(variable):
            value = os.environ[variable]
            words.setdefault(key, Secret(value) if is_secret(key) else value)
    _refuse_what_asyncpg_cannot(words)
    return words, options


def _as_libpq(value: Any, key: str) -> Any:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):  # asyncpg's way to say several hosts
        return ",".join(map(str, value))
    return Secret(value) if is_secret(key) else str(value)


def _refuse_what_asyncpg_cannot(words: Words) -> None:
    for key in words:
        if not _can(key, words[key]):
            raise asyncpg.ClientConfigurationError(f"asyncpg cannot do what {key}= asks for")


def _can(key: str, value: Any) -> bool:
    """Whether asyncpg does what a word of libpq's asks for; never silently: half of these are about whom to trust."""
    allowed = _WITHOUT_EFFECT.get(key, ())
    return key in _UNDERSTOOD or allowed is None or value in allowed


def _parameters() -> tuple[set[str], bool]:
    """What `asyncpg.connect` is called with by name, and whether it takes others, too: a tracer's passes them on."""
    found = inspect.signature(asyncpg.connect).parameters
    others = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found.values())
    return set(found), others


def unfit_option(recipe: Recipe) -> UnfitOption | None:
    """The first option of a recipe that asyncpg does not have, or cannot do, or that is the pool's."""
    parameters, others = _parameters()
    library = f"asyncpg {asyncpg.__version__}"
    found = read(Secret(recipe.conninfo))
    said = Hidden[dict[str, Any]]({**({} if isinstance(found, Wrong) else found), **recipe.kwargs})
    for name in said.value:
        key = "dbname" if name == "database" else name
        if key in KEYWORDS:
            if said.value[name] is None or callable(said.value[name]):
                continue
            if not _can(key, _as_libpq(said.value[name], key)):
                hint = "leave it out, or use psycopg"
                return UnfitOption(name, f"asks for what {library} cannot do", hint)
            if key in _NOT_WITH_SERVICE and "service" in said.value:
                hint = "leave one of the two out"
                return UnfitOption(name, f"asks for what {library} cannot do with service=", hint)
            if key in {"service", "servicefile"} and not (others or key in parameters):
                return UnfitOption(name, f"is unknown to {library}", "asyncpg 0.31 or newer has it")
        elif name == "loop":
            hint = "leave it out: a pool belongs to the loop that it is first used on"
            return UnfitOption(name, "is the pool's own", hint)
        elif name in _NOT_OPTIONS or not (others or name in parameters):
            return unknown_option(name, library, {*parameters, *_UNDERSTOOD} - _NOT_OPTIONS)
    return None


# --- which addresses, in which order


async def attempts_of(words: Words, deadline: float) -> tuple[list[Words], list[Exception]]:
    """One set of words per address to try, and the errors of names without one."""
    attempts: list[Words] = []
    failures: list[Exception] = []
    for host, hostaddr, port in _hosts(words):
        each = {**words, "host": host, "port": port}
        if hostaddr or host[:1] in {"/", "@"}:
            attempts.append({**each, "address": hostaddr or host})
            continue
        try:
            addresses = await addresses_of(host, port, deadline)
        except (OSError, ValueError) as error:
            failures.append(without_frames(error))
        else:
            attempts += [{**each, "address": address} for address in addresses]
    if words.get("load_balance_hosts") == "random":
        random.shuffle(attempts)
    if words.get("target_session_attrs") == "prefer-standby":
        attempts = [
            {**each, "target_session_attrs": wanted}
            for wanted in ("standby", "any")
            for each in attempts
        ]
    return attempts, failures


def _hosts(words: Words) -> list[tuple[str, str, str]]:
    """Triples of host, address (or "") and port."""
    hosts = words.get("host", "").split(",")
    addresses = words.get("hostaddr", "").split(",")
    if hosts == [""] and addresses == [""]:
        hosts = [*filter(os.path.isdir, _SOCKET_FOLDERS), "localhost"]
    count = max(len(hosts), len(addresses))
    ports = words.get("port", "").split(",")
    found = []
    for texts in (hosts, addresses, ports):
        if len(texts) not in {1, count} or (len(texts) < count and texts is not ports and texts[0]):
            raise asyncpg.ClientConfigurationError("host=, hostaddr= and port= differ in length")
        found.append(texts * count if len(texts) == 1 else texts)
    default = "localhost" if addresses == [""] else ""
    return [
        (host or address or default, address, port or "5432")
        for host, address, port in zip(*found, strict=True)
    ]


async def addresses_of(host: str, port: str, deadline: float) -> list[str]:
    """The addresses of a name, in the resolver's order.

    Raises:
        socket.gaierror: it has none.
        asyncpg.ClientConfigurationError: it cannot be a name, or the port is none.
        TimeoutError: not in time.
    """
    if not port.isdigit():
        raise asyncpg.ClientConfigurationError("port= must be a number")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return [host]
    try:
        found = await call_aside(
            (host, port),
            lambda: socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM),
            deadline,
        )
    except socket.gaierror as error:
        text = f"could not resolve the host name {shown_host(host)}: {error.strerror}"
        raise socket.gaierror(error.errno, text) from None
    except UnicodeError:  # a label above 63 bytes
        text = f"could not resolve the host name {shown_host(host)}: it cannot be one"
        raise socket.gaierror(socket.EAI_NONAME, text) from None
    except TimeoutError:
        raise TimeoutError(f"the host name {shown_host(host)} was not looked up in time") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def shown_host(host: str) -> str:
    """A host as it may be shown: a wrong conninfo can have settings or a password in its place."""
    if "@" in host:
        return "(not shown: it has an @; write %40 for one in a password)"
    if "=" in host or ";" in host:
        return "(not shown: it has a = or ;, and blanks are what stands between settings)"
    return repr(host)


# --- one address after the other


async def connect(recipe: Recipe, cls: type[Any], deadline: float) -> Any:
    """A connection of class `cls`.

    The addresses are tried one after the other; each gets an equal share of the time that is left
    (one that swallows packets must not use up the others' time), and at most `connect_timeout`.

    Raises:
        Exception: asyncpg's errors and OSError of the last address tried; what the others said is in
            its notes.
    """
    words, options = words_of(recipe)
    if words.get("service"):
        return await _connect_by_service(words, options, recipe, cls, deadline)
    attempts, failures = await attempts_of(words, deadline)
    for index, attempt in enumerate(attempts):
        until = _share_of(words, options, deadline, len(attempts) - index)
        try:
            return await _connected(attempt, options, recipe, cls, until)
        except Exception as error:
            if not _goes_on(error):
                raise
            failures.append(without_frames(error))
        if monotonic() >= deadline:
            break
    try:
        raise _merged(failures)
    finally:
        failures.clear()  # the error holds this frame, and this frame held it


def _share_of(words: Words, options: Hidden[Words], deadline: float, attempts_left: int) -> float:
    now = monotonic()
    share = inf if deadline == inf else now + max(0.0, deadline - now) / attempts_left
    text = str(words.get("connect_timeout", "")).strip()
    # libpq: 0, negative or not a number is "no limit".
    limits = [float(text)] if text.strip("0").isdigit() else []
    if options.value.get("timeout") is not None:
        limits.append(float(options.value["timeout"]))
    return min([share, *(now + limit for limit in limits)])


def _goes_on(error: Exception) -> bool:
    """Whether the next address may do better; as in libpq 34.1.1.3, a refused login may not."""
    return isinstance(
        error,
        (
            OSError,
            asyncpg.CannotConnectNowError,
            asyncpg.PostgresConnectionError,
            asyncpg.TargetServerAttributeNotMatched,
        ),
    )


def _merged(failures: list[Exception]) -> Exception:
    if not failures:
        return OSError("there is no address to connect to")
    last = failures.pop()
    for each in dict.fromkeys(f"{type(each).__name__}: {each}" for each in failures):
        last.add_note(f"before that: {each}")
    return last


async def _connected(
    attempt: Words, options: Hidden[Words], recipe: Recipe, cls: type[Any], until: float
) -> Any:
    is_local = attempt["address"][0] in "/@"
    left = None if until == inf else max(0.001, until - monotonic())
    given = Hidden(
        {key: each for key, each in options.value.items() if key not in {"ssl", "direct_tls"}}
        | _account(attempt, options)
        | ({} if is_local else tls_options(attempt, options))
        | {"timeout": left, "connection_class": cls}
        | _server_settings(attempt, options, recipe)
        | {"host": attempt["address"], "port": int(attempt["port"])}
    )
    where = attempt["host"] if is_local else f"{attempt['address']}:{attempt['port']}"
    with inflight.searching([attempt["port"]]):
        conn = await _connected_by(given, where)
        _note_socket(conn)
        return conn


def _note_socket(conn: Any) -> None:
    with suppress(NotAdopted):  # no connection at all
        transport = unwrapped(conn, asyncpg.Connection)._transport
        if not transport.is_closing():
            inflight.note(transport.get_extra_info("socket").fileno())


async def _connected_by(given: Hidden[Words], where: str) -> Any:
    """As `asyncpg.connect`, but its frames, which hold the password, are in no traceback."""
    failure: BaseException
    own = own_connect()
    try:
        return await (asyncpg.connect if own is None else own.call)(**given.value)
    except BaseException as error:  # noqa: BLE001  raised below
        failure = error
    if isinstance(failure, TimeoutError) and not str(failure):
        raise TimeoutError(f"no connection to {where} in time")
    if isinstance(failure, asyncpg.ConnectionDoesNotExistError):
        _refuse_subclasses_of_str(given)
    if own is not None and not is_librarys(failure):
        try:
            raise ConnectRaised(own.name) from without_frames(failure)
        finally:
            del failure  # it holds this frame, and this frame held it
    if isinstance(failure, Exception) and not isinstance(failure, (OSError, *_OF_ASYNCPG)):
        place_noted(failure)
    try:
        raise without_frames(failure)
    finally:
        del failure  # it holds this frame, and this frame held it


def _refuse_subclasses_of_str(given: Hidden[Words]) -> None:
    """Raise the TypeError that asyncpg 0.30 to 0.32 loses: its first message is encoded in a callback."""
    for key, value in given.value["server_settings"].items():
        kind = next((type(each).__name__ for each in (key, value) if type(each) is not str), None)
        if kind is not None:
            raise TypeError(
                f"server_settings: asyncpg cannot send {key!s}, of type {kind}: it takes str itself only"
            )


def _account(words: Words, options: Hidden[Words]) -> Words:
    """User, database, password, and the words that asyncpg has under libpq's name."""
    user = words.get("user") or getpass.getuser()
    database = words.get("dbname") or user
    password = _hidden_password(options.value.get("password", words.get("password")))
    if password is None:
        password = _hidden_password(password_for(words, user, database))
    kept = ("krbsrvname", "gsslib", "target_session_attrs")
    same = {key: words[key] for key in kept if key in words}
    return {"user": user, "database": database, "password": password, **same}


def _hidden_password(password: Any) -> Any:
    """A password as asyncpg calls it when it is sent: so it is not in the connection's parameters."""
    if not isinstance(password, str):
        return password
    return partial(str, Secret(password))  # asyncpg takes no subclass of str


def _server_settings(words: Words, options: Hidden[Words], recipe: Recipe) -> Words:
    settings = {key: words[key] for key in ("options", "replication") if words.get(key)}
    name = words.get("application_name") or words.get("fallback_application_name")
    settings["application_name"] = name or recipe.application_name
    return {"server_settings": {**settings, **(options.value.get("server_settings") or {})}}


async def _connect_by_service(
    words: Words, options: Hidden[Words], recipe: Recipe, cls: type[Any], deadline: float
) -> Any:
    """With a service, asyncpg reads its file and looks names up itself, in the default executor."""
    parameters, others = _parameters()
    if not others and "service" not in parameters:
        raise asyncpg.ClientConfigurationError("service= needs asyncpg 0.31 or newer")
    # Not in the URL: what asyncpg does not know there it would send as settings.
    own = {"application_name", "fallback_application_name", "options", "replication", "servicefile"}
    own |= _WITHOUT_EFFECT.keys() | _NOT_WITH_SERVICE
    kept = Hidden(
        {
            key: each
            for key, each in words.items()
            if key not in own and not key.startswith(("keepalive", "tcp_", "connect_"))
        }
    )
    file = {"servicefile": words["servicefile"]} if words.get("servicefile") else {}
    until = _share_of(words, options, deadline, 1)
    left = None if until == inf else max(0.001, until - monotonic())
    given = Hidden(
        {"dsn": str(to_url(kept.value)), "connection_class": cls, **file, **options.value}
        | _server_settings(words, options, recipe)
        | {"timeout": left}
    )
    return await _connected_by(given, "the service's server")


# --- after connecting


def keep_alive(fd: int, recipe: Recipe) -> None:
    """Have the kernel find a peer that is gone, by libpq's words (34.1.2); those of the user win."""
    words, _ = words_of(recipe)
    if not words.get("service"):
        words = {**recipe.keepalive, **words}
    raw = socket.socket(fileno=os.dup(fd))
    try:
        if raw.family not in {socket.AF_INET, socket.AF_INET6}:
            return
        if str(words.get("keepalives", 1)) != "0":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            _set(raw, "TCP_KEEPIDLE", words.get("keepalives_idle"))
            _set(raw, "TCP_KEEPINTVL", words.get("keepalives_interval"))
            _set(raw, "TCP_KEEPCNT", words.get("keepalives_count"))
        _set(raw, "TCP_USER_TIMEOUT", words.get("tcp_user_timeout"))
    finally:
        raw.close()


def _set(raw: socket.socket, option: str, value: Any) -> None:
    number = getattr(socket, option, None)  # each system has its own choice of these
    if number is not None and str(value or 0).isdigit() and int(value or 0):
        raw.setsockopt(socket.IPPROTO_TCP, number, int(value))
