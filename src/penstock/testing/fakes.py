"""A clock, a server and a driver that do as they are told: for penstock's tests and for yours.

One job: play the outside world in a test, without a database and without sleeping::

    server = FakeServer()
    pool = ConnectionPool(driver=FakeDriver(server))
    server.mode = Mode.DOWN  # what happens when the server goes away?

It must not know: pools, slots, leases. A `FakeLink` behaves as every driver's link must
(`penstock.drivers`), and raises `DoubleUse` when it is lent twice or used by two threads
at once. Its `fd` is one end of a real socket pair, so that a watcher sees the server hang up. The
same over asyncio is in `async_fakes.py`; what both have, because it never waits, is `FakeEnd`.

Locks: `FakeServer._changed` protects all that a server knows; a link's `_wire` is held for the
time of one statement or ping and never waited for.
"""

# ruff: noqa: D102  the methods of a link and a clock are explained in the protocol

from __future__ import annotations

import contextlib
import os
import socket
import threading
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from penstock.drivers import (
    Activity,
    Diagnosis,
    Recipe,
    Reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class FakeClock:
    """A clock that moves when told: call it for the time."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        self.now += seconds


class Mode(Enum):
    """What a `FakeServer` does to whoever connects; the value is what it says."""

    UP = "up"
    DOWN = "connection refused"
    RESTARTING = "the database system is starting up"
    FULL = "sorry, too many clients already"
    WRONG_PASSWORD = "password authentication failed"  # noqa: S105  a server's words
    SLOW = "connecting takes until the test says so: FakeServer.admit()"
    HANGING = "the server does not answer"


_SQLSTATES: Final = {
    Mode.RESTARTING: "57P03",
    Mode.FULL: "53300",
    Mode.WRONG_PASSWORD: "28P01",
}
_SERVER_GOES: Final = ("57P01", "57P02", "57P03", "08")
_TOO_LATE: Final = "connection timeout expired"
_GONE: Final = "the server ended the session or said nothing"


class FakeError(Exception):
    """What this driver raises; `sqlstate` is the server's code, if it gave one."""

    def __init__(self, text: str, sqlstate: str | None = None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


class FakeOperationalError(FakeError):
    """The server's or the network's fault."""


class FakeInterfaceError(FakeError):
    """The program's fault."""


class DoubleUse(AssertionError):  # noqa: N818  it says what happened
    """One connection was lent to two, or used by two at once: penstock's fault."""


class FakeServer:
    """A server that is up, down, slow or worse, as the test says; usable as a context manager.

    Args:
        clock: where a `FakeClock` is given, waiting for this server moves it and blocks nobody.
        max_connections: more sessions than that are refused as if the mode were FULL.

    Attributes:
        sessions: the live sessions' links, by number, oldest first.
        connects: how many attempts to connect there were, failed ones too.
        pings: how many pings were asked.
        statements: (session number, statement) in order; transactions' ends and resets too.
        answers: the rows, or the error, that a statement has to give; others give ``[(1,)]``.
    """

    def __init__(
        self, *, clock: FakeClock | None = None, max_connections: int | None = None
    ) -> None:
        self.clock = clock
        self.max_connections = max_connections
        self.sessions: dict[int, Any] = {}
        self.connects = 0
        self.pings = 0
        self.statements: list[tuple[int, str]] = []
        self.answers: dict[str, Sequence[Any] | Exception] = {}
        self._mode = Mode.UP
        self._admitted = 0
        self._numbers = 0
        self._changed = threading.Condition()
        # Wake those who wait on an event loop; called in whichever thread changes the server.
        self._onlookers: set[Callable[[], object]] = set()

    @property
    def mode(self) -> Mode:
        """What happens to whoever connects; DOWN and RESTARTING end every session as they come."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            self._admitted = 0
            self._announce()
        if mode in {Mode.DOWN, Mode.RESTARTING}:
            self.hang_up()

    def admit(self, count: int = 1) -> None:
        """While SLOW: let so many connects complete, those under way first."""
        with self._changed:
            self._admitted += count
            self._announce()

    def hang_up(self, *numbers: int) -> None:
        """End these sessions, or all, from the server's side."""
        for number in numbers or tuple(self.sessions):
            link = self.sessions.pop(number, None)
            if link is not None:
                link._server_hangs_up()  # noqa: SLF001  the other end of one wire

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.hang_up()

    def _announce(self) -> None:
        """Tell whoever waits that something has changed. Under the lock, or by whoever needs none."""
        with self._changed:
            self._changed.notify_all()
            for tell in tuple(self._onlookers):
                tell()

    def _connect(self, link: FakeLink, seconds: float | None) -> int:
        with self._changed:
            self.connects += 1
            if not self._wait(self._settled, seconds):
                raise FakeOperationalError(_TOO_LATE)
            return self._welcome(link)

    def _welcome(self, link: FakeEnd) -> int:
        """A connect comes to its end: its session's number, or the refusal is raised."""
        mode = self._mode
        if mode is Mode.SLOW:
            self._admitted -= 1
        elif mode is not Mode.UP:
            raise FakeOperationalError(mode.value, _SQLSTATES.get(mode))
        if self.max_connections is not None and len(self.sessions) >= self.max_connections:
            raise FakeOperationalError(Mode.FULL.value, _SQLSTATES[Mode.FULL])
        self._numbers += 1
        self.sessions[self._numbers] = link
        return self._numbers

    def _settled(self) -> bool:
        """Whether a connect can come to its end, good or bad."""
        return self._mode is not Mode.HANGING and (
            self._mode is not Mode.SLOW or self._admitted > 0
        )

    def _answers(self, link: FakeLink, seconds: float | None) -> bool:
        """Wait until the server answers this session's statement; False if it does not."""
        with self._changed:
            there = self._wait(lambda: self._mode is not Mode.HANGING or link.ended, seconds)
            return there and not link.ended

    def _wait(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        if self.clock is None:
            return self._changed.wait_for(condition, seconds)
        if condition():
            return True
        assert seconds is not None, "this would wait for ever"
        self.clock.advance(seconds)
        return condition()


class FakeCursor:
    """What a statement gave."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rowcount = len(rows)
        self.description: Any = [("column",)]
        self.statusmessage = f"SELECT {len(rows)}"
        self._rows = list(rows)

    def fetchone(self) -> Any:
        """The next row, or None."""
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[Any]:
        """All rows that are left."""
        rows, self._rows = self._rows, []
        return rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fetchall())


class FakeConnection:
    """What a borrower holds; as psycopg's, it begins a transaction with the first statement."""

    def __init__(self, link: FakeLink, *, autocommit: bool) -> None:
        self.autocommit = autocommit
        self._link = link

    @property
    def closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._link.ended

    def execute(self, query: str, params: Any = None) -> FakeCursor:
        """Run a statement; what it gives is in `FakeServer.answers`."""
        del params
        return FakeCursor(self._link._ask(query, begins=not self.autocommit))  # noqa: SLF001

    def commit(self) -> None:
        """End the transaction."""
        self._link._end_transaction("COMMIT")  # noqa: SLF001

    def rollback(self) -> None:
        """End the transaction."""
        self._link._end_transaction("ROLLBACK")  # noqa: SLF001

    def close(self) -> None:
        """End the session."""
        self._link.close()


class _Gone:
    """What a connection object leads to when its session is lent as another object (`guard`)."""

    ended = True

    def close(self) -> _Gone:
        return self

    def __await__(self) -> Iterator[None]:  # of the asyncio fakes' close()
        return iter(())

    def __getattr__(self, name: str) -> NoReturn:
        raise FakeInterfaceError("the connection is closed")


_NOBODYS: Final = _Gone()


class FakeEnd:
    """The client's end of one session of a `FakeServer`: what a link of any kind does without waiting.

    Attributes:
        number: the session's number at the server.
        user: the thread or task that it was lent to, None while parked.
        ended: one of the two sides has ended the session.
        said_goodbye: it ended by `close`, not by `discard`, and not by the server.
    """

    conn: Any
    number = 0

    def __init__(self, server: FakeServer, recipe: Recipe) -> None:
        self.ended = False
        self.said_goodbye = False
        self.user: str | None = None
        self._server = server
        self._autocommit = recipe.autocommit
        self._limit = recipe.statement_limit
        self._parked = False
        self._activity = Activity.IDLE
        # Bare descriptors: a socket object that dies in a cycle warns before `__del__` can close it.
        self._ours, self._theirs = (end.detach() for end in socket.socketpair())
        self.fd = self._ours

    def __repr__(self) -> str:
        state = "ended" if self.ended else f"lent to {self.user}" if self.user else "parked"
        return f"<{type(self).__name__} {self.number} {state}>"

    def lend(self) -> None:
        if self.user is not None:
            raise DoubleUse(f"session {self.number} is lent to {self.user} already")
        self.user = self._caller()
        self._parked = False

    def park(self) -> bool:
        self.user = None
        self._parked = True
        return self.activity() is Activity.IDLE and self.conn.autocommit == self._autocommit

    def renew(self) -> bool:
        former = self.conn
        self.conn = type(former)(self, autocommit=former.autocommit)
        former._link = _NOBODYS  # noqa: SLF001  ours
        return True

    def activity(self) -> Activity:
        return Activity.BROKEN if self.ended else self._activity

    def set_autocommit(self, value: bool) -> None:
        self.conn.autocommit = value

    def start_reset(self) -> bool:
        self._activity = Activity.IDLE
        return not self.ended

    def hung_up(self) -> bool:
        return self.ended

    def discard(self) -> None:
        self._end()  # the descriptor stays: somebody may still hold the connection

    def abandon(self, *, busy: bool) -> None:
        with contextlib.suppress(OSError), open(os.devnull, "rb") as null:  # noqa: PTH123
            os.dup2(null.fileno(), self.fd, inheritable=False)
        self._parked = True
        if not busy:
            self._close_sockets()

    def __del__(self) -> None:
        if "_theirs" in vars(self):
            self._close_sockets()

    def _caller(self) -> str:
        return threading.current_thread().name

    def _refuse_if_closed(self) -> None:
        if self._parked or (self.ended and self.said_goodbye):
            raise FakeInterfaceError("the connection is closed")

    def _answered(self, query: str) -> Sequence[Any]:
        """What the server gives for this statement, which it has received."""
        answer = self._server.answers.get(query, [(1,)])
        if isinstance(answer, Exception):
            if self._activity is Activity.IN_TRANSACTION:
                self._activity = Activity.IN_FAILED_TRANSACTION
            raise answer
        return answer

    def _no_answer(self, bounded: bool) -> Exception:
        if bounded and self._limit is not None and not self.ended:
            self._end()
            return self._limit.given_up()
        return FakeOperationalError(_GONE, "57P01" if self.ended else None)

    def _goodbye(self) -> None:
        self.said_goodbye = not self.ended
        self._end()
        self._close_sockets()

    def _end(self) -> None:
        self.ended = True
        if self._server.sessions.get(self.number) is self:
            del self._server.sessions[self.number]
        _shut_down(self._ours)
        self._server._announce()  # noqa: SLF001  whoever waits for an answer gets none

    def _server_hangs_up(self) -> None:
        self.ended = True
        _shut_down(self._theirs)
        self._server._announce()  # noqa: SLF001  whoever waits for an answer gets none

    def _close_sockets(self) -> None:
        for end in (self._ours, self._theirs):
            if end >= 0:
                os.close(end)
        self._ours = self._theirs = -1


class FakeLink(FakeEnd):
    """A link for threads and gevent; see `penstock.drivers.Link` for the methods."""

    def __init__(self, server: FakeServer, recipe: Recipe, seconds: float | None) -> None:
        super().__init__(server, recipe)
        self._wire = threading.Lock()
        self.conn = FakeConnection(self, autocommit=recipe.autocommit)
        self.number = server._connect(self, seconds)  # noqa: SLF001  the other end of one wire

    def prepare(self) -> None:
        self._autocommit = self.conn.autocommit

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        self._ask(f"set {', '.join(settings)}", begins=True)

    def execute(self, query: Any, params: Any = None) -> Reply:
        del params
        rows = self._ask(query, begins=False)
        return Reply(rows=rows, rowcount=len(rows), description=[("column",)], statusmessage=None)

    def commit(self) -> None:
        if not self.said_goodbye:
            self._end_transaction("COMMIT")

    def tidy(self, seconds: float | None) -> bool:
        self.conn.autocommit = self._autocommit
        if self._activity is Activity.IDLE:
            return not self.ended
        return self._rounds_trip("ROLLBACK", seconds)

    def ping(self, seconds: float | None) -> bool:
        self._server.pings += 1
        return self._rounds_trip("", seconds)

    def finish_reset(self, seconds: float | None) -> bool:
        return self._rounds_trip("RESET", seconds)

    def close(self) -> None:
        self._goodbye()

    def _ask(self, query: str, *, begins: bool) -> Sequence[Any]:
        self._refuse_if_closed()
        self._go(query, None)
        if begins:
            self._activity = Activity.IN_TRANSACTION
        return self._answered(query)

    def _end_transaction(self, how: str) -> None:
        if self._activity is not Activity.IDLE:
            self._go(how, None)
            self._activity = Activity.IDLE

    def _rounds_trip(self, statement: str, seconds: float | None) -> bool:
        try:
            self._go(statement, seconds)
        except FakeError:
            return False
        self._activity = Activity.IDLE
        return True

    def _go(self, statement: str, seconds: float | None) -> None:
        if not self._wire.acquire(blocking=False):
            raise DoubleUse(f"session {self.number} is used by two at once")
        bound = self._limit.seconds if seconds is None and self._limit else seconds
        try:
            if not self._server._answers(self, bound):  # noqa: SLF001
                raise self._no_answer(bound is not seconds)
            if statement:
                self._server.statements.append((self.number, statement))
        finally:
            self._wire.release()


def _shut_down(end: int) -> None:
    if end < 0:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(end)) as same:  # ended already
        same.shutdown(socket.SHUT_RDWR)


class FakeDriver:
    """A driver for penstock over a `FakeServer`; see `penstock.drivers.Driver`."""

    name = "fake"
    renews = renews_in_place = True
    limits_statements = True
    operational_error: type[Exception] = FakeOperationalError
    interface_error: type[Exception] = FakeInterfaceError

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def open(self, recipe: Recipe, seconds: float | None) -> FakeLink:
        """Connect, if the server's mode allows it."""
        return FakeLink(self.server, recipe, seconds)

    def diagnose(self, error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
        """Tell the server's code; only a wrong password does not heal."""
        del recipe, seconds
        sqlstate = getattr(error, "sqlstate", None)
        return Diagnosis(sqlstate=sqlstate, heals=sqlstate != "28P01", text=str(error))

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether this error casts doubt on the other sessions."""
        sqlstate = getattr(error, "sqlstate", None) or ""
        return sqlstate.startswith(_SERVER_GOES) or (read_write and sqlstate == "25006")
