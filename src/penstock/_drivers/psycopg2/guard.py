"""What penstock puts round a psycopg2 connection: a dead class, and a watch over its settings.

psycopg2 keeps everything in C, so no attribute leads to the wire that could be taken away. But an
object may change its class: while nobody has borrowed a connection, it is of a class whose methods
and attributes raise (two changes cost 62 ns, a query nothing). And while it is lent it is of a
subclass of what the user asked for, made once per class, that notes which settings were changed:
the return then reads one attribute and compares nothing.

What this cannot see: objects made before the return that keep the connection inside C (cursors,
large objects) and functions of psycopg2's C that take one. docs/psycopg2.md says so.

It must not know: how links are opened or cleaned, deadlines, the server.
"""

from __future__ import annotations

from types import new_class
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import psycopg2
from psycopg2.extensions import connection

from penstock._drivers.misuse import GIVEN_BACK, INHERITED_SESSION, misuse_error

if TYPE_CHECKING:
    from collections.abc import Callable

Misuse: Final = misuse_error("psycopg2", psycopg2.InterfaceError)

#: psycopg2's own descriptors by name: they work on a connection of whatever class it is just now.
RAW: Final[dict[str, Any]] = dict(vars(connection))

# Where the note is kept in the connection's attributes; the link holds the same set.
_NOTE: Final = "_penstock_touched"

#: What is noted while somebody is inside ``with conn:``, and when the borrower has closed it.
BLOCK: Final = "block"
CLOSE: Final = "close"


def _note(conn: connection, what: str) -> None:
    touched: set[str] | None = vars(conn).get(_NOTE)
    if touched is not None:  # else psycopg2 is still building it
        touched.add(what)


def _noted(name: str) -> property:
    """psycopg2's own attribute, with a note taken when it is set; read as quickly as before."""
    raw = RAW[name]

    def store(conn: connection, value: object) -> None:
        _note(conn, name)
        raw.__set__(conn, value)

    return property(raw.__get__, store, doc=raw.__doc__)


# The settings that live in the connection object, and the lists that a borrower may replace.
_WATCHED: Final = (
    *("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory"),
    *("notices", "notifies"),
)


class Watching(connection):
    """What is put in front of a connection class: the connection notes changes of its settings."""

    @property
    def broken(self) -> bool:
        """Whether the session was lost, and not closed by its borrower; as psycopg 3 has it.

        psycopg2's own `closed` does not tell under gevent: it closes a connection whose statement
        was interrupted.
        """
        return bool(self.closed) and CLOSE not in vars(self)[_NOTE]

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        """Set the characteristics of transactions, as in psycopg2."""
        _note(self, "session")
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: int | None) -> None:
        """Set the isolation level, as in psycopg2."""
        _note(self, "isolation_level")
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        """Set the client's encoding, as in psycopg2."""
        _note(self, "encoding")
        super().set_client_encoding(encoding)

    def reset(self) -> None:
        """Return to psycopg2's defaults, as in psycopg2."""
        _note(self, "session")
        super().reset()

    def close(self) -> None:
        """End the session, as in psycopg2; the pool replaces it."""
        _note(self, CLOSE)
        super().close()

    def __enter__(self) -> Any:
        # Before: else an interrupt could leave psycopg2 inside, and the next borrower refused.
        _note(self, BLOCK)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        try:
            super().__exit__(*exception)  # type: ignore[arg-type]  # as they came
        finally:
            vars(self)[_NOTE].discard(BLOCK)


def _refuse(conn: Any, *_args: object, **_kwargs: object) -> NoReturn:
    raise Misuse(conn._penstock_why)  # noqa: SLF001  ours


def _shown(conn: Any) -> str:
    return f"<{type(conn).__name__} object at {id(conn):#x}; {conn._penstock_why}>"  # noqa: SLF001


def _refusals() -> dict[str, Any]:
    """Everything of a connection, made to raise; but for the exceptions' classes and `status`."""
    found: dict[str, Any] = {}
    for name, value in RAW.items():
        is_exception = isinstance(getattr(psycopg2, name, None), type)
        if name.startswith("__") or name == "status" or is_exception:
            continue
        found[name] = _refuse if callable(value) else property(_refuse, _refuse)
    return {
        **found,
        "__enter__": _refuse,
        "__exit__": _refuse,
        "__repr__": _shown,
        "closed": property(lambda _conn: 1, _refuse),
        "close": lambda _conn: None,
    }


_REFUSALS: Final = _refusals()


class Classes(NamedTuple):
    """What a connection is.

    Attributes:
        live: while lent.
        dead: while nobody has it.
        inherited: in a forked child.
        tended: while the pool itself asks the server something on a dead one. A wait callback
            (gevent) is given the connection, and needs its `poll` and `fileno`.
    """

    live: type[Any]
    dead: type[Any]
    inherited: type[Any]
    tended: type[Any]


# Two threads may both make them for the same base: one set is then used for a few connections only.
_known: dict[type[Any], Classes] = {}


def classes_for(base: type[Any]) -> Classes:
    """The classes for connections of the class `base`; those who look see `base`."""
    if base not in _known:
        live = _live(base)
        _known[base] = Classes(
            live=live,
            dead=_dead(live, GIVEN_BACK),
            inherited=_dead(live, INHERITED_SESSION),
            tended=_dead(live, GIVEN_BACK, poll=RAW["poll"], fileno=RAW["fileno"]),
        )
    return _known[base]


def classes_of(live: type[Any]) -> Classes | None:
    """The classes of which `live` is one, if it is one of ours."""
    return next((each for each in _known.values() if each.live is live), None)


def _live(base: type[Any]) -> type[Any]:
    bases = (Watching,) if base is connection else (Watching, base)

    def fill(namespace: dict[str, Any]) -> None:
        for name in _WATCHED:
            # One that the user's class has defined anew is its own.
            if getattr(base, name) is RAW[name]:
                namespace[name] = _noted(name)

    return _named_like(base, new_class(base.__name__, bases, exec_body=fill))


def _dead(live: type[Any], why: str, **permitted: Any) -> type[Any]:
    def fill(namespace: dict[str, Any]) -> None:
        # No slots, no new attributes: only classes of the same shape may be changed into another.
        namespace.update(_REFUSALS, _penstock_why=why, __slots__=(), **permitted)

    return _named_like(live, new_class(live.__name__, (live,), exec_body=fill))


def _named_like(base: type[Any], made: type[Any]) -> type[Any]:
    made.__qualname__ = base.__qualname__
    made.__module__ = base.__module__
    made.__doc__ = base.__doc__
    return made


def is_noted(conn: connection) -> bool:
    """Whether a connection is watched already."""
    return _NOTE in vars(conn)


def equip(conn: connection) -> set[str]:
    """Begin to watch a connection of a `live` class; returns what notes the changes."""
    touched: set[str] = set()
    vars(conn)[_NOTE] = touched
    for name in ("notices", "notifies"):
        RAW[name].__set__(conn, Messages(name, touched))
    return touched


#: psycopg2 keeps so many notices of a connection, and all its notifications.
_NOTICES: Final = 50


class Messages(list[Any]):
    """A connection's `notices` or `notifies`: psycopg2 appends, and that is noted.

    psycopg2 takes any object with an `append` here (its documentation, "Changed in version 2.7"); two
    lists less to look at are 20 ns per return.
    """

    def __init__(self, name: str, touched: set[str]) -> None:
        super().__init__()
        self._name = name
        self._touched = touched

    def append(self, message: Any) -> None:
        """Take in a message, as psycopg2's list would."""
        self._touched.add(self._name)
        super().append(message)
        if self._name == "notices":
            del self[:-_NOTICES]


class Settings:
    """The client-side settings of a connection as they were at one instant.

    psycopg2 keeps isolation level, read-only and deferrable in the connection and says them in each
    BEGIN; in autocommit it says them to the server at once. So setting them back may take a round
    trip (`needs_server`).
    """

    __slots__ = (
        "_autocommit",
        "_characteristics",
        "_cursor_factory",
        "_encoding",
        "_notices",
        "_notifies",
        "_types",
    )

    def __init__(self, conn: connection) -> None:
        self._autocommit: bool = _autocommit_of(conn)
        self._characteristics = _characteristics_of(conn)
        self._cursor_factory = RAW["cursor_factory"].__get__(conn)
        self._encoding: str = RAW["encoding"].__get__(conn)
        self._types: dict[int, Any] = dict(RAW["string_types"].__get__(conn))
        self._notices = RAW["notices"].__get__(conn)
        self._notifies = RAW["notifies"].__get__(conn)
        self._forget(conn)

    def _forget(self, conn: connection) -> None:
        self._notices.clear()
        self._notifies.clear()
        vars(conn)[_NOTE].clear()

    def odd_types(self, conn: connection) -> Any:
        """Something that is true when other types are registered than there were."""
        types = RAW["string_types"].__get__(conn)
        return OddTypes(types, self._types) if self._types else types

    def needs_server(self, conn: connection) -> bool:
        """Whether `restore` would say something to the server."""
        if RAW["encoding"].__get__(conn) != self._encoding:
            return True
        now = _characteristics_of(conn)
        if _autocommit_of(conn) == self._autocommit:
            return self._autocommit and now != self._characteristics
        return (now, self._characteristics) != (_DEFAULTS, _DEFAULTS)

    def restore(self, conn: connection) -> None:
        """Set everything back. Works on a returned connection.

        Raises:
            psycopg2.Error: the server was needed, and refused or did not answer.
        """
        now, then = _characteristics_of(conn), self._characteristics
        if now != then:
            words = ("DEFAULT" if each is None else each for each in then)
            isolation, readonly, deferrable = words
            RAW["set_session"](
                conn,
                isolation_level=isolation,
                readonly=readonly,
                deferrable=deferrable,
                autocommit=self._autocommit,
            )
        elif _autocommit_of(conn) != self._autocommit:
            set_autocommit(conn, self._autocommit)
        if RAW["encoding"].__get__(conn) != self._encoding:
            RAW["set_client_encoding"](conn, self._encoding)
        RAW["cursor_factory"].__set__(conn, self._cursor_factory)
        types = RAW["string_types"].__get__(conn)
        types.clear()
        types.update(self._types)
        RAW["notices"].__set__(conn, self._notices)
        RAW["notifies"].__set__(conn, self._notifies)
        self._forget(conn)


class OddTypes:
    """True while two mappings differ. Where no types were registered, the mapping itself will do.

    By identity: psycopg2's types are equal when their numbers are.
    """

    __slots__ = ("_now", "_then")

    def __init__(self, now: dict[int, Any], then: dict[int, Any]) -> None:
        self._now = now
        self._then = then

    def __bool__(self) -> bool:
        now, then = self._now, self._then
        return len(now) != len(then) or any(now[key] is not then.get(key) for key in now)


_DEFAULTS: Final = (None, None, None)

_get_autocommit: Final[Callable[[connection], bool]] = RAW["autocommit"].__get__
#: Set it without taking a note, whatever class the connection is of just now.
set_autocommit: Final[Callable[[connection, bool], None]] = RAW["autocommit"].__set__


def _autocommit_of(conn: connection) -> bool:
    return _get_autocommit(conn)


def _characteristics_of(conn: connection) -> tuple[Any, Any, Any]:
    return (
        RAW["isolation_level"].__get__(conn),
        RAW["readonly"].__get__(conn),
        RAW["deferrable"].__get__(conn),
    )
