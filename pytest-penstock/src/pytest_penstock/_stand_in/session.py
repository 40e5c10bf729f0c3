"""One server session that many clients share, one after the other.

One job: exchange messages with the real server inside one transaction that is never committed, and
say whose turn it is.

It must not know: pools, drivers, what clients are told. Threads are known as owners: a client's
transaction belongs to whoever `owner` says, and another owner's has to wait for its end.

Lock: `_changed` protects the turn and the queue for it. Whoever has the turn (`turn`) may exchange
messages and change the stack; nobody else does. It is never held while anything is exchanged.
"""

from __future__ import annotations

import contextlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pytest_penstock._stand_in.messages import (
    FAILED,
    Hangup,
    Message,
    Wire,
    fields_of,
    first_text,
    query,
)
from pytest_penstock._stand_in.savepoints import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pytest_penstock._stand_in.savepoints import Transaction

#: All settings that a server reports to its clients, up to PostgreSQL 18.
_REPORTED: Final = (
    *("application_name", "client_encoding", "DateStyle", "default_transaction_read_only"),
    *("in_hot_standby", "integer_datetimes", "IntervalStyle", "is_superuser", "scram_iterations"),
    *("search_path", "server_encoding", "server_version", "session_authorization"),
    *("standard_conforming_strings", "TimeZone"),
)

# The transaction lasts as long as the test; a server that ends long ones would end the test.
_BEGIN: Final = b"""begin isolation level read committed read write;
select pg_catalog.set_config(name, '0', false) from pg_catalog.pg_settings
 where name in ('idle_in_transaction_session_timeout', 'transaction_timeout', 'idle_session_timeout')"""


class NotYourTurn(Exception):  # noqa: N818  it says what happened
    """The session was not free in time; `holder` is who has it, None: nobody known."""

    def __init__(self, holder: Any, *, busy: bool) -> None:
        super().__init__()
        self.holder = holder
        self.busy = busy


class SessionLost(Exception):  # noqa: N818
    """The server ended the shared session, or the test did."""


@dataclass(slots=True)
class Answer:
    """What the server said to one request.

    Attributes:
        messages: all but the "ready" at the end.
        error: the error among them.
        failed: whether the transaction has failed.
    """

    messages: list[Message] = field(default_factory=list)
    error: Message | None = None
    failed: bool = False

    @property
    def tags(self) -> list[bytes]:
        """What the server calls the commands that it did."""
        return [first_text(each.body)[0] for each in self.messages if each.kind == b"C"]


# A client who waits for its turn, whose it is, and whether it is the last.
_Entry = tuple[Any, "Hashable | None", bool]


class SharedSession:
    """A session, the stack of transactions in it, and the queue for it.

    Args:
        wire: the way to the server; nobody else uses it any more.
        tell_all: called with a setting that the server reports, for the other clients.
    """

    def __init__(self, wire: Wire, tell_all: Callable[[bytes], None]) -> None:
        self.stack = Stack()
        self.lost: str = ""
        self._wire = wire
        self._tell_all = tell_all
        self._changed = threading.Condition()
        self._busy: Any = None
        self._waiting: list[_Entry] = []
        #: By client: the transaction that it has open.
        self.transactions: dict[Any, Transaction] = {}

    def begin(self) -> None:
        """Begin the transaction that is never committed."""
        self.ask(_BEGIN)

    def end(self) -> None:
        """Roll everything back; the last thing that is asked of the session."""
        with contextlib.suppress(SessionLost):
            self.ask(b"rollback")

    def close(self) -> None:
        """Let go of the server's socket, without a word."""
        self.lost = self.lost or "the session is closed"
        self._wire.socket.close()

    # -- whose turn it is -------------------------------------------------------------------------

    @contextmanager
    def turn(
        self, client: Any, owner: Hashable | None, seconds: float, *, last: bool = False
    ) -> Iterator[None]:
        """Have the session for one exchange.

        Args:
            client: who wants it.
            owner: whose transaction it may become.
            seconds: how long to wait at most.
            last: to end it: open transactions are no obstacle, a statement under way is.

        Raises:
            NotYourTurn: it was not free in time.
            SessionLost: it is gone.
        """
        self._take((client, owner, last), seconds)
        try:
            yield
        finally:
            with self._changed:
                self._busy = None
                self._changed.notify_all()

    def _take(self, entry: _Entry, seconds: float) -> None:
        with self._changed:
            self._waiting.append(entry)
            try:
                in_time = self._changed.wait_for(lambda: self._is_next(entry), seconds)
                if self.lost:
                    raise SessionLost(self.lost)
                if not in_time:
                    raise self._not_in_time(entry)
                self._busy = entry[0]
            finally:
                self._waiting.remove(entry)
                self._changed.notify_all()

    def _is_next(self, entry: _Entry) -> bool:
        if self.lost:
            return True
        return self._busy is None and entry == _first(self._may, self._waiting)

    def _may(self, entry: _Entry) -> bool:
        client, owner, last = entry
        if last:
            return True
        top = self.stack.open[-1] if self.stack.open else None
        mine = self.transactions.get(client)
        if top is not None and top.owner is None and top is not mine:
            return False
        return mine is not None or self.stack.may_begin(owner)

    def _not_in_time(self, entry: _Entry) -> NotYourTurn:
        """Who has the session, and whether with a statement that is under way."""
        if self._busy is not None:
            return NotYourTurn(self._busy, busy=True)
        blocker = self.stack.blocker(entry[1])
        clients = [client for client, one in list(self.transactions.items()) if one is blocker]
        return NotYourTurn(clients[0] if clients else None, busy=False)

    def holds_turn(self, client: Any) -> bool:
        """Whether this client's request is what the server works on."""
        return self._busy is client

    def lose(self, why: str) -> None:
        """The session is gone: everybody who waits is told so."""
        with self._changed:
            self.lost = self.lost or why
            self._changed.notify_all()

    # -- with the server; only by whoever has the turn --------------------------------------------

    def ask(self, sql: bytes) -> Answer:
        """Penstock's own SQL.

        Raises:
            SessionLost: it is gone.
        """
        return self.exchange(query(sql), None)

    def must(self, sql: bytes) -> None:
        """Penstock's own SQL that cannot fail while the session is what it should be."""
        answer = self.ask(sql) if sql else Answer()
        if answer.error is not None:
            words = fields_of(answer.error.body).get("M", b"").decode(errors="replace")
            self.lose(f"{sql.decode(errors='replace')!r} failed: {words}")
            raise SessionLost(self.lost)

    def exchange(self, request: bytes, on_copy: Callable[[Answer], None] | None) -> Answer:
        """Send a request that ends with a "ready", and hear it out.

        Args:
            request: the messages.
            on_copy: called when the server wants data; it sends them by `pass_on`, and tells the
                client what was answered so far.

        Raises:
            SessionLost: it is gone.
        """
        answer = Answer()
        self.pass_on(request)
        while (heard := self._hear()).kind != b"Z":
            self._note(heard, answer, on_copy)
        answer.failed = heard.body == FAILED
        if heard.body == b"I":
            # Somebody got a COMMIT past us. What stays in the database must not stay unseen.
            self.lose("the test's transaction was ended by a statement that undone() did not see")
            raise SessionLost(self.lost)
        return answer

    def _note(
        self, heard: Message, answer: Answer, on_copy: Callable[[Answer], None] | None
    ) -> None:
        answer.messages.append(heard)
        if heard.kind == b"E":
            answer.error = heard
            fields = fields_of(heard.body)
            if fields.get("V") == b"FATAL":
                words = fields.get("M", b"").decode(errors="replace")
                self.lose(f"the server ended the test's session: {words}")
        elif heard.kind == b"S":
            self._tell_all(heard.raw)
        elif heard.kind == b"G" and on_copy is not None:
            on_copy(answer)

    def pass_on(self, data: bytes) -> None:
        """Send bytes as they are."""
        try:
            self._wire.send(data)
        except Hangup as why:
            self._hear_last_words()
            self._hung_up(why)

    def _hear_last_words(self) -> None:
        """A server that went before it was asked has said why."""
        with contextlib.suppress(Hangup):
            while True:
                self._note(self._wire.receive(), Answer(), None)

    def _hear(self) -> Message:
        try:
            return self._wire.receive()
        except Hangup as why:
            self._hung_up(why)
            raise

    def _hung_up(self, why: Hangup) -> None:
        self.lose(f"the server ended the test's session: {why}")
        raise SessionLost(self.lost) from None


def reported(value_of: Callable[[bytes], bytes | None]) -> dict[bytes, bytes]:
    """The settings that the server has reported, as libpq knows them."""
    known = {name.encode(): value_of(name.encode()) for name in _REPORTED}
    return {name: value for name, value in known.items() if value is not None}


def _first(may: Callable[[Any], bool], waiting: list[Any]) -> Any:
    return next((entry for entry in waiting if may(entry)), None)
