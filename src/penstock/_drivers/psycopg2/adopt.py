"""psycopg2 connections that somebody else has opened: what may become a link, and of which classes.

A tracer that has replaced `psycopg2.connect` passes the pool's connection_factory on, or makes connections of
a class of its own, or puts a proxy around them. A connection of psycopg2's own class in C can change its
class for no other one, and so cannot be watched.

It must not know: links, pools. No lock: the connection is the caller's.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import psycopg2
from psycopg2.extensions import STATUS_READY, connection, parse_dsn

from penstock._drivers.adopting import (
    OwnConnect,
    is_original,
    not_at_rest,
    taken,
    unwrapped,
)
from penstock._drivers.psycopg2.guard import (
    RAW,
    Classes,
    classes_for,
    classes_of,
    is_noted,
)
from penstock._drivers.psycopg2.statement_limit import LIMIT, Clock, limited_connection
from penstock.config.secret import Hidden
from penstock.drivers import NotAdopted

if TYPE_CHECKING:
    from penstock.drivers import Recipe

_STEP_PLAIN: Final = (
    "make it with connection_factory= a subclass of psycopg2.extensions.connection, or pass "
    "the one on that is given"
)


def own_connect() -> OwnConnect | None:
    """What is in the place of psycopg2's `connect`; None: it is psycopg2's own."""
    if is_original(psycopg2.connect, "psycopg2"):
        return None
    return OwnConnect(psycopg2.connect, "psycopg2.connect()")


def is_librarys(error: Exception) -> bool:
    """Whether psycopg2's own connect, or the server, could have raised it; OSError: a token service is down."""
    return (
        isinstance(error, (psycopg2.OperationalError, psycopg2.ProgrammingError, OSError))
        or getattr(error, "pgcode", None) is not None
    )


# What a failed attempt was made with: a tracer or a program may have added a password, without which the
# attempt that diagnoses would be refused for another reason. Not in the error, which is shown and pickled.
_used: WeakKeyDictionary[BaseException, Hidden[str]] = WeakKeyDictionary()


def note_used(error: psycopg2.OperationalError, dsn: Hidden[str]) -> None:
    """Remember the string that psycopg2 was given at last in the attempt that raised `error`."""
    _used[error] = dsn


def params_used(error: BaseException) -> Hidden[dict[str, str]] | None:
    """What the attempt that raised `error` was made with, if that is known."""
    dsn = _used.get(error)
    return None if dsn is None else Hidden(parse_dsn(dsn.value))


def checked(conn: Any) -> connection:
    """The psycopg2 connection that `conn` is, or is a proxy of.

    Raises:
        NotAdopted: it is none, it is closed, in the middle of something, or a pool's.
    """
    real: connection = unwrapped(conn, connection)
    if type(real) is connection:
        raise NotAdopted("it is of psycopg2's own class, which cannot be watched", _STEP_PLAIN)
    if RAW["closed"].__get__(real):
        raise NotAdopted("it is closed", "give a connection that is open")
    if is_noted(real):
        raise taken()
    if RAW["async"].__get__(real):
        raise NotAdopted("it is asynchronous", "give one that was made without async_=True")
    if RAW["status"].__get__(real) != STATUS_READY or RAW["get_transaction_status"](real):
        raise not_at_rest("in a transaction, or in the middle of a statement")
    return real


def watch(real: connection, recipe: Recipe) -> Classes:
    """Make a connection one that notes changes of its settings; gives the classes that it changes between.

    Raises:
        NotAdopted: its class is of a shape that no other one can take the place of.
    """
    made = type(real)
    limit = recipe.statement_limit
    base = made if limit is None else limited_connection(made)
    # The pool's own class already, where a tracer has passed it on.
    classes = classes_of(made) or classes_for(base)
    try:
        real.__class__ = classes.live
    except TypeError as error:
        raise NotAdopted(
            f"its class {made.__qualname__} cannot be watched ({error})",
            "let the class have no __slots__ and no metaclass of its own",
        ) from error
    if limit is not None:
        vars(real)[LIMIT] = Clock(real, limit)
    return classes


def end(conn: Any) -> None:
    """Close what was opened and cannot be used, if it is a connection at all."""
    with suppress(NotAdopted, psycopg2.Error):
        RAW["close"](unwrapped(conn, connection))
