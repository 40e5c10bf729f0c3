"""What penstock puts round a psycopg connection: a dead handle, and a watch over its settings.

Two things are wanted and neither may cost a query anything. A connection that was given back must
raise when it is used: `DEAD` takes the place of its libpq handle. And no setting that one borrower
made (autocommit, row factory, handlers, adapters ...) may reach the next: comparing them all at
each return costs 66 to 190 ns, so a subclass, made once per connection class, notes the change
when it happens and the return reads one attribute (5 ns).

It must not know: how links are opened or cleaned, deadlines, the server.
Private names of psycopg that this relies on are each held by tests/drivers/
test_third_party_assumptions.py.
"""

from __future__ import annotations

from types import new_class
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast
from weakref import ref

import psycopg
from psycopg.adapt import AdaptersMap
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus
from psycopg.types import TypesRegistry

from penstock._drivers.misuse import GIVEN_BACK, INHERITED_SESSION, misuse_error
from penstock._drivers.renewal import followed

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import AsyncConnection, BaseConnection, Connection
    from psycopg.abc import Dumper, Loader
    from psycopg.pq.abc import PGconn

    AnyConnection = BaseConnection[Any]

C = TypeVar("C", bound="BaseConnection[Any]")

Misuse: Final = misuse_error("psycopg", psycopg.InterfaceError)


class DeadHandle:
    """Stands where the libpq handle was while nobody has borrowed the connection.

    Its status is "bad", so that `conn.closed` is true, `conn.close()` does nothing and the
    connection's finalizer does not complain. Whatever else is asked of it raises.

    Attributes:
        why: what it says then.
    """

    __slots__ = ("why",)

    status = ConnStatus.BAD
    transaction_status = TransactionStatus.UNKNOWN
    pipeline_status = PipelineStatus.OFF
    # psycopg's notice callback reads this name from the connection; a notice can arrive while the
    # session of a returned connection is being reset.
    _encoding = "utf-8"

    def __init__(self, why: str) -> None:
        self.why = why

    def __getattr__(self, name: str) -> NoReturn:
        raise Misuse(self.why)


DEAD: Final = cast("PGconn", DeadHandle(GIVEN_BACK))
#: In a forked child, for what was open at the fork.
INHERITED: Final = cast("PGconn", DeadHandle(INHERITED_SESSION))


class InPool:
    """What `conn._pool` is: with it, psycopg's `with conn:` does not close the connection.

    It has no `close_returns`, so that `conn.close()` ends the session and the pool sees that.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<a penstock pool>"


IN_POOL: Final = InPool()

# The settings that live in the connection object itself, under psycopg's names for them.
_PLAIN: Final = (
    "_autocommit",
    "_isolation_level",
    "_read_only",
    "_deferrable",
    "row_factory",
    "cursor_factory",
    "server_cursor_factory",
)
_SETTINGS: Final = frozenset((*_PLAIN, "prepare_threshold", "prepared_max", "_tpc"))

# Blocks that somebody is still inside of, with the value that says "nobody". A connection that
# comes back like this cannot be lent again: whoever is inside would leave the block on it later.
_OPEN_BLOCKS: Final[dict[str, Callable[[Any], bool]]] = {
    "_num_transactions": bool,
    "_pipeline": bool,
    "_notifies_backlog": lambda backlog: backlog is None,
}
_WATCHED: Final = _SETTINGS | _OPEN_BLOCKS.keys()

# Where the note is kept in the connection's attributes; the link holds the same set.
_NOTE: Final = "_penstock_touched"


def _note(conn: AnyConnection, name: str, value: object) -> None:
    """Write down that an attribute changes; refuse if the connection is nobody's."""
    attributes = vars(conn)
    touched: set[str] | None = attributes.get(_NOTE)
    if touched is None:  # psycopg is still building it
        return
    is_open = _OPEN_BLOCKS.get(name)
    if is_open is None:
        if isinstance(handle := attributes["pgconn"], DeadHandle):
            raise Misuse(handle.why)
        touched.add(name)
    elif is_open(value):
        touched.add(name)
    else:
        touched.discard(name)


class Watching(psycopg.BaseConnection[Any]):
    """What is put in front of a connection class: the connection notes changes of its settings.

    Synchronous and asyncio connections have them in common, under the same names.

    It costs a query nothing: psycopg sets none of the watched attributes for a statement, and
    reading them takes the same way as before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _WATCHED:
            _note(self, name, value)
        super().__setattr__(name, value)

    @property
    def adapters(self) -> AdaptersMap:
        """The connection's adapters, as in psycopg, and watched.

        Made at first use, as in psycopg: what the application has registered globally until then
        is in it.
        """
        if self._adapters is None:
            self._adapters = WatchedAdapters(psycopg.adapters, self)
        return self._adapters

    def add_notice_handler(self, callback: Any) -> None:
        """Register a callable for notices, as in psycopg."""
        _note(self, "notice handlers", callback)
        super().add_notice_handler(callback)

    def remove_notice_handler(self, callback: Any) -> None:
        """Unregister a callable for notices, as in psycopg."""
        _note(self, "notice handlers", callback)
        super().remove_notice_handler(callback)

    def add_notify_handler(self, callback: Any) -> None:
        """Register a callable for notifications, as in psycopg."""
        _note(self, "notify handlers", callback)
        super().add_notify_handler(callback)

    def remove_notify_handler(self, callback: Any) -> None:
        """Unregister a callable for notifications, as in psycopg."""
        _note(self, "notify handlers", callback)
        super().remove_notify_handler(callback)

    def _check_connection_ok(self) -> None:
        # psycopg would say "the connection is closed", by an error that people retry.
        # Called once per statement, and as dear as the method that it replaces.
        if self.pgconn.status == ConnStatus.OK:
            return
        if isinstance(self.pgconn, DeadHandle):
            raise Misuse(self.pgconn.why)
        super()._check_connection_ok()


# Two threads may both make a class for the same base: one is then used for a few connections only.
_watched_classes: dict[tuple[type[Any], ...], type[Any]] = {}


def watched(base: type[C], *in_front: type[Any]) -> type[C]:
    """The class to build connections of: a subclass of `base` that looks like it and watches.

    `in_front` are classes that go in front of it as well.
    """
    key = (*in_front, base)
    if key not in _watched_classes:
        made = new_class(base.__name__, (*in_front, Watching, base))
        made.__qualname__ = base.__qualname__
        made.__module__ = base.__module__
        made.__doc__ = base.__doc__
        _watched_classes[key] = made
    return cast("type[C]", _watched_classes[key])


class WatchedTypes(TypesRegistry):
    """The types of a `WatchedAdapters`; adding one is a change of the connection's settings."""

    def __init__(self, template: TypesRegistry, owner: WatchedAdapters) -> None:
        super().__init__(template)
        self._owner = ref(owner)

    def add(self, info: Any) -> None:
        """Add a type, as in psycopg."""
        self._tell()
        super().add(info)

    def clear(self) -> None:
        """Forget all types, as in psycopg."""
        self._tell()
        super().clear()

    def _tell(self) -> None:
        owner = self._owner()
        if owner is not None:
            owner.about_to_change()


class WatchedAdapters(AdaptersMap):
    """A connection's adapters, keeping a copy of what they were before the first change.

    psycopg makes a map of this kind for each connection at its first cursor, and copies it for
    each cursor, so reading it cannot be the sign of a change; registering is.
    """

    before: AdaptersMap | None = None

    def __init__(self, template: AdaptersMap, conn: AnyConnection) -> None:
        super().__init__(template)
        # Weak: a cycle would leave dropped connections open until the garbage collector runs.
        self._connection = ref(conn)
        self.types = WatchedTypes(template.types, self)

    def register_dumper(self, cls: type | str | None, dumper: type[Dumper]) -> None:
        """Register a dumper, as in psycopg."""
        self.about_to_change()
        super().register_dumper(cls, dumper)

    def register_loader(self, oid: int | str, loader: type[Loader]) -> None:
        """Register a loader, as in psycopg."""
        self.about_to_change()
        super().register_loader(oid, loader)

    def about_to_change(self) -> None:
        """Note the change and keep a copy of the state before it."""
        conn = self._connection()
        if conn is None:
            return
        _note(conn, "adapters", self)
        if self.before is None:
            self.before = AdaptersMap(self)


def noted_of(conn: AnyConnection) -> set[str]:
    """The set that notes what has been changed of a connection, the same as the link's."""
    touched: set[str] = vars(conn)[_NOTE]
    return touched


def is_noted(conn: AnyConnection) -> bool:
    """Whether a connection is watched already."""
    return _NOTE in vars(conn)


def forget_notes(conn: AnyConnection) -> None:
    """Let what becomes of this object be noted nowhere that anybody looks."""
    vars(conn)[_NOTE] = set()


def equip(conn: AnyConnection, adapters: AdaptersMap | None) -> set[str]:
    """Begin to watch a connection built of a `watched` class; returns what notes the changes.

    `adapters` are those that the user's ``context`` gave, None for psycopg's global ones.
    """
    attributes = vars(conn)
    touched: set[str] = set()
    attributes["_pool"] = IN_POOL
    if adapters is not None:
        attributes["_adapters"] = WatchedAdapters(adapters, conn)
    attributes[_NOTE] = touched
    return touched


class Settings:
    """The client-side settings of a connection as they were at one instant."""

    __slots__ = ("_notice", "_notify", "_plain", "_prepared_max", "_threshold")

    def __init__(self, conn: AnyConnection) -> None:
        attributes = vars(conn)
        self._plain = {name: attributes[name] for name in _PLAIN}
        self._threshold = attributes["_prepared"].prepare_threshold
        self._prepared_max = attributes["_prepared"].prepared_max
        self._notice = tuple(attributes["_notice_handlers"])
        self._notify = tuple(attributes["_notify_handlers"])
        if attributes["_adapters"] is not None:
            attributes["_adapters"].before = None
        attributes[_NOTE].clear()

    def restore(self, conn: AnyConnection) -> None:
        """Set everything back. Works on a returned connection, and says nothing to the server."""
        attributes = vars(conn)
        attributes.update(self._plain)
        attributes["_tpc"] = None
        attributes["_begin_statement"] = b""  # psycopg's cache of what the settings above mean
        attributes["_prepared"].prepare_threshold = self._threshold
        attributes["_prepared"].prepared_max = self._prepared_max
        attributes["_notice_handlers"][:] = self._notice
        attributes["_notify_handlers"][:] = self._notify
        if (before := getattr(attributes["_adapters"], "before", None)) is not None:
            attributes["_adapters"] = WatchedAdapters(before, conn)
        attributes[_NOTE].clear()

    def follow(self, old: AnyConnection, new: AnyConnection) -> None:
        """The connection goes on as another object: handlers that are methods of it, too."""
        self._notice = tuple(followed(each, old, new) for each in self._notice)
        self._notify = tuple(followed(each, old, new) for each in self._notify)


def is_inside_block(conn: Connection[Any] | AsyncConnection[Any], touched: set[str]) -> bool:
    """Whether a transaction(), pipeline() or notifies() of this connection has not ended.

    The lock is held by a `notifies()` that somebody still iterates over, and by a statement under
    way in another thread or task.
    """
    return not _OPEN_BLOCKS.keys().isdisjoint(touched) or conn.lock.locked()
