"""psycopg connections that somebody else has opened: which function to call, with what, and what comes back.

A class's own `connect`, or one that a tracer has put in the place of psycopg's, is called with what the user
has said, completed by the recipe's defaults. Its connection keeps its identity: the object changes its
class to one that watches, and its settings as they are now are those to go back to.

It must not know: links, pools. No lock: the connection is the caller's.
"""

from __future__ import annotations

from math import ceil
from os import environ
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus

from penstock._drivers.adopting import (
    OwnConnect,
    is_original,
    not_at_rest,
    taken,
    unwrapped,
)
from penstock._drivers.libpq_trace import SPOKE_TLS
from penstock._drivers.psycopg3 import connect as connecting
from penstock._drivers.psycopg3.guard import (
    DeadHandle,
    equip,
    is_noted,
    watched,
)
from penstock._drivers.psycopg3.statement_limit import LIMIT
from penstock._process import inflight
from penstock._process.sockets import seconds_to
from penstock.config.conninfo import is_url
from penstock.config.secret import Hidden, Secret, is_secret
from penstock.drivers import NotAdopted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg.pq.abc import PGconn

    from penstock.drivers import Recipe

_SET_UP_SECONDS: Final = 1.0

#: psycopg takes 1 for 2.
_LEAST_SECONDS: Final = 2

#: Where psycopg's own way to connect is defined, by the class. A subclass that resolves names by
#: itself overrides the second one (psycopg's documentation, "DNS").
_PARTS: Final[dict[type[Any], str]] = {
    psycopg.Connection: "psycopg.connection",
    psycopg.AsyncConnection: "psycopg.connection_async",
}
_BASE: Final = "psycopg._connection_base"

_TRANSACTIONS: Final = {
    TransactionStatus.ACTIVE: "in the middle of a statement",
    TransactionStatus.INTRANS: "in a transaction",
    TransactionStatus.INERROR: "in a failed transaction",
}


def own_connect(recipe: Recipe, kind: type[Any]) -> OwnConnect | None:
    """What connects in the place of psycopg's own function; None: nothing does.

    Raises:
        psycopg.ProgrammingError: the recipe's class is no subclass of `kind`.
    """
    cls = class_of(recipe, kind)
    module = _PARTS.get(kind, kind.__module__)
    parts = {"connect": module, "_get_connection_params": module, "_connect_gen": _BASE}
    for name, where in parts.items():
        found = getattr(cls, name, None)
        if found is not None and not is_original(found, where):
            return OwnConnect(cls.connect, f"{cls.__qualname__}.connect()")
    if cls is psycopg.Connection and not is_original(psycopg.connect, module):
        return OwnConnect(psycopg.connect, "psycopg.connect()")
    return None


def class_of(recipe: Recipe, kind: type[Any]) -> type[Any]:
    """The class of the recipe's connections.

    Raises:
        psycopg.ProgrammingError: it is no subclass of `kind`.
    """
    cls = recipe.connection_class or kind
    if not issubclass(cls, kind):
        raise psycopg.ProgrammingError(
            f"connection_class={cls.__qualname__} is no subclass of psycopg.{kind.__name__}"
        )
    return cls


# --- the call


def arguments(recipe: Recipe, deadline: float) -> tuple[str, Hidden[dict[str, Any]], list[str]]:
    """A conninfo string, keyword arguments, and the ports that the connect may lead to.

    The user's string and keyword arguments are passed as they are, but that the string is hidden from
    tracebacks. What the recipe adds stands in the string: a class's `connect` may add keyword
    arguments of its own, and none must be there twice.

    Raises:
        psycopg.ProgrammingError: the connection string is wrong.
    """
    options = Hidden(dict(recipe.kwargs))
    said = Hidden(connecting.said_params(recipe))
    params = Hidden(connecting.completed(said.value, recipe))
    ours = {key: each for key, each in params.value.items() if key not in said.value}
    seconds = _seconds(params, deadline)
    if seconds is not None:
        if "connect_timeout" in options.value:
            options.value["connect_timeout"] = seconds
        else:
            ours["connect_timeout"] = seconds
    effective = connecting.effective_params(params.value)
    return _with(Secret(recipe.conninfo), ours), options, effective["port"].split(",")


def _seconds(params: Hidden[dict[str, Any]], deadline: float) -> int | None:
    """The connect_timeout to pass, which psycopg keeps to for each host; None: as the user said."""
    theirs = str(params.value.get("connect_timeout") or environ.get("PGCONNECT_TIMEOUT", ""))
    left = seconds_to(deadline)
    if left is None:
        return None
    hosts = str(params.value.get("host") or "").count(",") + 1
    share = max(_LEAST_SECONDS, ceil(left / hosts))
    # libpq: 0, negative or not a number is "no limit".
    return share if not theirs.strip("0").isdigit() or int(theirs) > share else None


def _with(conninfo: str, ours: Mapping[str, Any]) -> str:
    """The user's string, in the user's notation, with settings added."""
    if not ours:
        return conninfo
    if is_url(conninfo):
        added = "&".join(f"{key}={quote(str(each), safe='')}" for key, each in ours.items())
        between = "" if conninfo[-1:] in {"?", "&"} else "&" if "?" in conninfo else "?"
        return Secret(f"{conninfo}{between}{added}")
    return Secret(make_conninfo(conninfo, **ours))


def is_librarys(error: Exception) -> bool:
    """Whether psycopg's own connect, or the server, could have raised it; OSError: a token service is down."""
    return (
        isinstance(error, (psycopg.OperationalError, psycopg.ProgrammingError, OSError))
        or getattr(error, "sqlstate", None) is not None
    )


def note_failure(error: psycopg.OperationalError) -> None:
    """Note on the error how far the attempt came, as psycopg3_connect does."""
    handle = error.pgconn
    if handle is not None:
        setattr(error, SPOKE_TLS, bool(handle.ssl_in_use))


def params_of(error: BaseException, recipe: Recipe) -> connecting.Params:
    """What the attempt was made with that raised `error`.

    A class's `connect` may have added a password, without which the attempt that diagnoses would be
    refused for another reason. psycopg's own connect leaves what it used in the error.

    Raises:
        psycopg.ProgrammingError: as `connection_params`.
    """
    used = Hidden(_used(error))
    if not used.value:
        return connecting.connection_params(recipe)
    params = Hidden(connecting.completed(connecting.said_params(recipe), recipe))
    # It is the last address that was tried, of several maybe.
    skipped = {"host", "hostaddr", "port"} if params.value.get("host") else set()
    return {
        **params.value,
        **{key: each for key, each in used.value.items() if key not in skipped},
    }


def _used(error: BaseException) -> connecting.Params:
    handle = error.pgconn if isinstance(error, psycopg.OperationalError) else None
    try:
        found = [] if handle is None else handle.info
    except psycopg.Error:  # a connection's that was closed
        return {}
    return {
        (key := each.keyword.decode()): Secret(text) if is_secret(key) else text
        for each in found
        if (text := Secret((each.val or b"").decode()))
    }


def note_socket(conn: Any) -> None:
    """Have a fork let go of the socket of a connection that was just opened."""
    handle = getattr(conn, "pgconn", None)
    if handle is not None and handle.status == ConnStatus.OK:
        inflight.note(handle.socket)


def seconds_left(deadline: float) -> float | None:
    """What is left for setting a new session up, at least a second: psycopg counts in whole ones."""
    left = seconds_to(deadline)
    return None if left is None else max(left, _SET_UP_SECONDS)


def end(conn: Any) -> None:
    """Close what was opened and cannot be used, if it is a connection at all."""
    handle = getattr(conn, "pgconn", None)
    if handle is not None:
        handle.finish()


# --- what comes back


def checked(conn: Any, kind: type[Any]) -> Any:
    """The psycopg connection that `conn` is, or is a proxy of.

    Raises:
        NotAdopted: it is none, it is closed, in the middle of something, or a pool's.
    """
    real = unwrapped(conn, kind)
    attributes = vars(real)
    handle = attributes["pgconn"]
    if isinstance(handle, DeadHandle):
        raise taken()
    if handle.status != ConnStatus.OK:
        raise NotAdopted("it is closed", "give a connection that is open")
    if is_noted(real) or attributes.get("_pool") is not None:
        raise taken()
    if (doing := _TRANSACTIONS.get(TransactionStatus(handle.transaction_status))) is not None:
        raise not_at_rest(doing)
    if handle.pipeline_status != PipelineStatus.OFF:
        raise not_at_rest("in a pipeline")
    if (
        attributes["_num_transactions"]
        or attributes.get("_notifies_backlog", ()) is None
        or real.lock.locked()
    ):
        raise not_at_rest(
            "in somebody's use: a transaction(), a notifies() or a call has not ended"
        )
    return real


def watch(real: Any, recipe: Recipe, *in_front: type[Any]) -> tuple[PGconn, set[str]]:
    """Make a connection one that notes changes of its settings: its handle, and what notes them.

    Raises:
        NotAdopted: its class is of a shape that none can be put in front of.
    """
    try:
        # Not through a `__setattr__` of the class's.
        object.__setattr__(real, "__class__", watched(type(real), *in_front))
    except TypeError as error:
        raise NotAdopted(
            f"its class {type(real).__qualname__} cannot be watched ({error})",
            "let the class have no __slots__ and no metaclass of its own",
        ) from error
    attributes = vars(real)
    if recipe.statement_limit is not None:
        attributes[LIMIT] = recipe.statement_limit
    touched = equip(real, attributes["_adapters"])
    if recipe.autocommit and "autocommit" not in recipe.kwargs:
        attributes["_autocommit"] = True
    handle: PGconn = attributes["pgconn"]
    handle.nonblocking = 1
    return handle, touched
