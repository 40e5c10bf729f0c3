"""`statement_timeout_client` on psycopg2: a connection's clock, and what starts and stops it.

psycopg2 waits inside libpq, where no deadline reaches it, so the thread of `psycopg2_deadline` shuts the socket
down when a statement's time is up; the call fails a millisecond later, and what it raises becomes a
`StatementTimeout`. The same on gevent, where that thread is a greenlet.

A connection has one clock for all its life. To start and to stop it costs a microsecond and no change of
threads: the thread looks at all clocks when the earliest is due. Each call that asks the server something is
between the two: of the connection (`commit` ...), of its cursors, of large objects. A COPY's clock stands still
while psycopg2 reads or writes the program's file.

Threads that share a connection take turns here, and not only inside psycopg2: the time of each begins with its
turn. A user's class may ask something else in its `execute`, or be slow before it asks: then the clock begins
anew, or looks again after a while.

Only connections whose recipe has a limit are of these classes. It must not know: links, pools. The clock's lock
decides who is first, the end of the call or the deadline; it is held for one shutdown. Its `turn` is held for
a call, and taken before.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import partial, wraps
from math import inf
from operator import attrgetter
from time import monotonic
from types import new_class
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE, connection, cursor, lobject

from penstock._drivers.psycopg2.deadline import current_bell
from penstock._drivers.psycopg2.guard import RAW
from penstock._process import runtime
from penstock._process.sockets import shut_down, shut_down_without_duplicate

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock._drivers.psycopg2.deadline import Bell
    from penstock.drivers import StatementLimit

#: Where a call is under way, but nothing asked: the clock is looked at this often within the limit.
_LOOKS: Final = 4

#: Where a connection's clock is kept, in its attributes.
LIMIT: Final = "_penstock_limit"


class Clock:
    """The time of one connection's statements, one after the other.

    Attributes:
        deadline: when the statement's time is up; infinite while none is under way.
        rang: the time was up, and the connection has been shut down.
        turn: held by the thread whose call is under way.
        depth: how many of its calls are, one in the other.
    """

    __slots__ = (
        *("_bell", "_conn", "_fd", "_lock", "_rested"),
        *("deadline", "depth", "limit", "rang", "turn"),
    )

    def __init__(self, conn: connection, limit: StatementLimit) -> None:
        self._conn = ref(conn)  # weak: the connection has this
        self._fd: int = RAW["fileno"](conn)
        self._lock = runtime.Lock()
        self._bell: Bell | None = None  # that looks at this clock
        self._rested = -inf  # when a look last found nothing asked
        self.limit = limit
        self.deadline = inf
        self.rang = False
        self.turn = runtime.Lock()
        self.depth = 0

    def start(self) -> None:
        """A statement begins."""
        self.deadline = deadline = monotonic() + self.limit.seconds
        bell = current_bell()
        if self._bell is bell:
            bell.look_by(deadline)
        else:
            self._bell = bell
            bell.watch(self)

    def stop(self) -> None:
        """It has ended: from here on the connection is not touched."""
        with self._lock:
            self.deadline = inf

    @property
    def is_over(self) -> bool:
        """For the bell: whether it may forget this clock; the next statement then tells it again."""
        bell, self._bell = self._bell, None
        # Looked at after that: of a statement that begins just now, one of the two hears.
        if self.deadline == inf:
            return True
        self._bell = bell
        return False

    def ring(self) -> None:
        """In the bell: the time is up, unless the statement has ended."""
        with self._lock:
            now = monotonic()
            if self.deadline <= now:
                self._strike(now)

    def _strike(self, now: float) -> None:
        conn = self._conn()
        if conn is None or not is_asked(conn):
            # A call that has not asked yet; or an interrupt kept the clock from being stopped.
            self._rested = now
            self.deadline = now + self.limit.seconds / _LOOKS if self.depth and conn else inf
            return
        if now < (due := self._rested + self.limit.seconds):
            self.deadline = due
            return
        self.rang = True
        with suppress(OSError, psycopg2.Error):  # it is closed already
            self._shut_down(conn)

    def _shut_down(self, conn: connection) -> None:
        try:
            duplicate = os.dup(self._fd)
        except OSError as error:
            if error.errno != errno.EBADF and RAW["fileno"](conn) == self._fd:  # none is left
                shut_down_without_duplicate(self._fd)
            return
        # Looked at after the dup: a connection that still has this number had it then, too.
        if RAW["fileno"](conn) == self._fd:
            shut_down(duplicate)
        else:
            os.close(duplicate)


def is_asked(conn: connection) -> bool:
    """Whether a statement is under way."""
    status: int = RAW["get_transaction_status"](conn)
    return status == TRANSACTION_STATUS_ACTIVE


def bounded(conn: connection, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call it; if the server does not answer in time, the connection ends.

    Raises:
        StatementTimeout: that.
        psycopg2.Error: what it raises.
    """
    clock: Clock | None = vars(conn).get(LIMIT)
    if clock is None:  # it is being made
        return call(*arguments, **named)
    with clock.turn:
        # Of the same thread, with a statement under way: another greenlet, whom psycopg2 refuses.
        if clock.depth and is_asked(conn):
            return call(*arguments, **named)
        return _in_turn(conn, clock, partial(call, *arguments, **named))


def _in_turn(conn: connection, clock: Clock, call: Callable[[], Any]) -> Any:
    answer = None
    outer = clock.depth
    try:
        clock.depth = outer + 1
        clock.start()
        answer = call()
    except psycopg2.Error:
        if not clock.rang:
            raise
    finally:
        clock.depth = outer
        clock.stop()
        if outer:  # its own statement is still to come
            clock.start()
    if clock.rang:
        clock.rang = False  # said once
        RAW["close"](conn)
        raise clock.limit.given_up() from None
    return answer


# -- classes whose methods are bounded ------------------------------------------------------------

_OF_CURSORS: Final = ("execute", "executemany", "callproc")
_OF_NAMED: Final = ("fetchone", "fetchmany", "fetchall", "scroll", "__next__", "close")
_OF_FILES: Final = ("copy_expert", "copy_from", "copy_to")
_OF_CONNECTIONS: Final = (
    *("commit", "rollback", "reset", "set_session", "set_isolation_level", "set_client_encoding"),
    *("tpc_begin", "tpc_prepare", "tpc_commit", "tpc_rollback", "tpc_recover"),
)
_OF_LARGE_OBJECTS: Final = (
    *("read", "write", "seek", "tell", "truncate", "export", "close", "unlink"),
)

Made = dict[tuple[type[Any], bool], type[Any]]
_made: Made = {}


def limited_connection(base: type[Any]) -> type[Any]:
    """A subclass that looks like `base`, and bounds what it asks the server and what its cursors do."""

    def fill(namespace: dict[str, Any]) -> None:
        for name in _OF_CONNECTIONS:
            namespace[name] = _bound(getattr(base, name), _itself)
        namespace["cursor"] = _cursors(base)
        namespace["lobject"] = _large_objects(base)

    return _known(base, fill, named=False)


def limited_cursor(base: type[Any], *, named: bool = False) -> type[Any]:
    """A subclass that looks like `base`, and bounds its statements; `named`: its fetches, too."""

    def fill(namespace: dict[str, Any]) -> None:
        for name in (*_OF_CURSORS, *(_OF_NAMED if named else ())):
            namespace[name] = _bound(getattr(base, name), _connection_of)
        for name in _OF_FILES:
            namespace[name] = _bound_copy(getattr(base, name), first=name != "copy_expert")

    return _known(base, fill, named=named)


def _known(base: type[Any], fill: Callable[[dict[str, Any]], None], *, named: bool) -> type[Any]:
    found = _made.get((base, named))
    if found is None:
        found = new_class(base.__name__, (base,), exec_body=fill)
        found.__qualname__ = base.__qualname__
        found.__module__ = base.__module__
        found.__doc__ = base.__doc__
        # Of two threads that get here together, both use one.
        found = _made.setdefault((base, named), found)
    return found


def _itself(conn: connection) -> connection:
    return conn


def _connection_of(own: cursor) -> connection:
    return own.connection


def _bound(raw: Callable[..., Any], of: Callable[[Any], connection]) -> Callable[..., Any]:
    def method(own: Any, *arguments: Any, **named: Any) -> Any:
        return bounded(of(own), raw, own, *arguments, **named)

    return wraps(raw)(method)


def _bound_copy(raw: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
    """A method that is given a file, as its first argument or its second."""

    def method(own: cursor, *arguments: Any, **named: Any) -> Any:
        conn = own.connection
        clock: Clock = vars(conn)[LIMIT]
        given = list(arguments)
        place = 0 if first else 1
        if len(given) > place:
            given[place] = File(given[place], clock)
        elif "file" in named:
            named["file"] = File(named["file"], clock)
        return bounded(conn, raw, own, *given, **named)

    return wraps(raw)(method)


def _cursors(base: type[Any]) -> Callable[..., Any]:
    raw = base.cursor

    def make(conn: Any, *arguments: Any, **named: Any) -> Any:
        made = raw(conn, *arguments, **named)
        kind = limited_cursor(type(made), named=made.name is not None)
        try:
            made.__class__ = kind
        except (
            TypeError
        ):  # psycopg2's own class, of which no object can change; it has asked nothing
            if type(made) is not cursor:
                raise psycopg2.InterfaceError(
                    f"statement_timeout_client: cursors of the class {type(made).__qualname__} "
                    "cannot be bounded: it has __slots__, or is made in C"
                ) from None
            named.pop("cursor_factory", None)
            given = [*arguments[:1], kind, *arguments[2:]]
            if not arguments:
                given = [named.pop("name", None), kind]
            made = RAW["cursor"](conn, *given, **named)
        return made

    return wraps(raw)(make)


def _large_objects(base: type[Any]) -> Callable[..., Any]:
    raw = base.lobject

    def make(conn: Any, *arguments: Any, **named: Any) -> Any:
        kind = arguments[4] if len(arguments) > 4 else named.pop("lobject_factory", None)
        named["lobject_factory"] = _limited_large_object(kind or lobject)
        made = bounded(conn, raw, conn, *arguments[:4], **named)
        made._penstock_connection = conn  # noqa: SLF001  ours
        return made

    return wraps(raw)(make)


def _limited_large_object(base: type[Any]) -> type[Any]:
    def fill(namespace: dict[str, Any]) -> None:
        for name in _OF_LARGE_OBJECTS:
            namespace[name] = _bound(getattr(base, name), attrgetter("_penstock_connection"))

    return _known(base, fill, named=False)


class File:
    """The program's file in a COPY: while it is read or written, the clock stands still."""

    def __init__(self, file: Any, clock: Clock) -> None:
        self._file = file
        self._clock = clock

    # psycopg2 asks whether it is a file of text.
    __class__ = property(lambda self: type(self._file))  # pyright: ignore[reportIncompatibleMethodOverride]  that is its use

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        return self._standing_still(found) if name in {"read", "readline", "write"} else found

    def _standing_still(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            self._clock.stop()
            try:
                return call(*arguments)
            finally:
                self._clock.start()

        return called
