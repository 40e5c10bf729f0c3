"""One client's talk with the stand-in: its transactions become savepoints of the shared session.

One job: answer a client's messages as a server with a session of its own would, by asking the
shared one. What rules transactions (BEGIN, COMMIT ...) is carried out here, all else is passed on.

It must not know: pools, drivers, threads. It runs in a thread of its own, which begins and ends
with the connection. `_sending` is held while something is sent to the client, because reports of
changed settings come from other dialogs' threads; all else belongs to the dialog's own thread.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING, Final, NoReturn

from pytest_penstock._stand_in import messages as say
from pytest_penstock._stand_in.extended import Batch
from pytest_penstock._stand_in.messages import (
    FAILED,
    IDLE,
    IN_TRANSACTION,
    Hangup,
    Message,
    Wire,
)
from pytest_penstock._stand_in.refusals import (
    HINT,
    Refused,
    explained,
    not_in_time,
    shown,
)
from pytest_penstock._stand_in.savepoints import READ_ONLY
from pytest_penstock._stand_in.session import Answer, NotYourTurn, SessionLost
from pytest_penstock._stand_in.statements import (
    Kind,
    Statement,
    local_settings,
    statements,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pytest_penstock._stand_in.savepoints import Transaction
    from pytest_penstock._stand_in.session import SharedSession

# How long a client that hangs up waits for its turn to be rolled back, in seconds.
_LAST_TURN: Final = 60.0


_IN_BLOCK: Final = frozenset((Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO, Kind.IN_BLOCK))

_log = logging.getLogger("penstock")


class Dialog:
    """The talk with one client.

    Args:
        wire: to the client.
        session: the shared session.
        number: what it is called in the session's statements.
        owner: tells whose client this is at the moment; see `SharedSession`.
        describe: tells people who the holder of a client is.
        seconds: how long a statement waits for the session at most.

    Attributes:
        last: the statement that it sent last, for the error of whoever waits for it.
    """

    def __init__(
        self,
        wire: Wire,
        session: SharedSession,
        number: int,
        *,
        owner: Callable[[], Hashable | None],
        describe: Callable[[Dialog], str],
        seconds: float,
    ) -> None:
        self.number = number
        self.last = b""
        self._wire = wire
        self._session = session
        self._owner = owner
        self._describe = describe
        self._seconds = seconds
        self._batch = Batch(self, b"c%d:" % number)
        self._sending = threading.Lock()
        self._out: list[bytes] = []

    # -- the talk ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Talk until the client or the session is gone."""
        try:
            self._talk()
        except Hangup:
            pass
        except SessionLost as lost:
            self._say_goodbye(str(lost))
        finally:
            self._leave()

    def _talk(self) -> None:
        while (heard := self._wire.receive()).kind != b"X":
            if heard.kind == b"Q":
                self._on_query(say.first_text(heard.body)[0])
            elif heard.kind == b"F":
                self._out.append(say.report("0A000", "no function calls in here", hint=HINT))
                self.flush(ready=True)
            elif heard.kind not in b"dcf":  # the end of a COPY that had failed already
                self._batch.add(heard)

    def _say_goodbye(self, why: str) -> None:
        with contextlib.suppress(Hangup):
            self.send(say.report("57P01", why, hint=HINT, severity="FATAL"))

    def _leave(self) -> None:
        """Roll back what the client left open."""
        with contextlib.suppress(NotYourTurn, SessionLost), self.turn(_LAST_TURN):
            if (mine := self.transaction) is not None:
                self._roll_back(mine)
        self.close()

    def close(self) -> None:
        """Close the connection; in the dialog's own thread."""
        self._wire.socket.close()

    def hang_up(self, why: str) -> None:
        """End the talk, from another thread."""
        self._say_goodbye(why)
        with contextlib.suppress(OSError):
            self._wire.socket.shutdown(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """In a forked child: the client is the parent's."""
        self._wire.socket.close()

    def send(self, data: bytes) -> None:
        """Send to the client; from any thread."""
        with self._sending:
            self._wire.send(data)

    def say(self, *data: bytes) -> None:
        """Put messages behind what is to be sent when the request is done."""
        self._out += data

    def flush(self, *, ready: bool) -> None:
        """Send what is to be sent. Not during a turn: a client that does not read holds up nobody."""
        out, self._out = self._out, []
        if ready:
            out.append(say.ready(self.status))
        self.send(b"".join(out))

    @property
    def transaction(self) -> Transaction | None:
        """What the client has open."""
        return self._session.transactions.get(self)

    @property
    def status(self) -> bytes:
        """The transaction status as the client is told."""
        mine = self.transaction
        if mine is None or mine.implicit:
            return IDLE
        return FAILED if mine.failed else IN_TRANSACTION

    @contextlib.contextmanager
    def turn(self, seconds: float | None = None) -> Iterator[None]:
        """Have the session.

        Raises:
            NotYourTurn, SessionLost: as the session's `turn`.
        """
        seconds = self._seconds if seconds is None else seconds
        with self._session.turn(self, self._owner(), seconds):
            yield

    # -- simple queries ---------------------------------------------------------------------------

    def _on_query(self, sql: bytes) -> None:
        parts = statements(sql)
        if parts and parts[0].kind is Kind.EMPTY:
            self.say(say.message(b"I"))  # a ping: it waits for nobody
        else:
            self.do(lambda: self._do_all(parts))
        self.flush(ready=True)

    def do(self, request: Callable[[], None], *, ends: bool = True) -> bool:
        """Carry out a request in a turn. `ends`: and commit what was begun for it only."""
        try:
            with self.turn():
                try:
                    request()
                    if ends:
                        self._end_implicit()
                except Refused as refused:
                    self.say(refused.error)
                    self._drop_implicit()
                    return False
        except NotYourTurn as why:
            who = ""
            if isinstance(why.holder, Dialog):
                who = f"{self._describe(why.holder)}; its last statement: {shown(why.holder.last)}"
            self.say(not_in_time(self._seconds, who, self._describe(self), busy=why.busy))
            return False
        return True

    def _do_all(self, parts: list[Statement]) -> None:
        for part in parts:
            self.carry_out(part)
        # A server commits before it calls the last command of a simple query done.
        last = next((at for at in reversed(range(len(self._out))) if self._out[at][:1] == b"C"), -1)
        try:
            self._end_implicit()
        except Refused:
            if last >= 0:
                del self._out[last]
            raise

    def carry_out(self, part: Statement) -> None:
        """One statement of a simple query, or an Execute of one that rules transactions.

        Raises:
            Refused: it failed.
        """
        self.last = part.sql
        act = {
            Kind.BEGIN: self._on_begin,
            Kind.COMMIT: self._on_commit,
            Kind.ROLLBACK: self._on_rollback,
            Kind.TWO_PHASE: self._on_two_phase,
            Kind.LISTEN: self._on_listen,
            Kind.DEALLOCATE: self._on_deallocate,
            Kind.READ_ONLY: self._on_read_only,
        }.get(part.kind)
        if act is not None:
            act(part)
            return
        if part.kind is not Kind.ROLLBACK_TO:
            self._refuse_if_failed()
        if part.kind in _IN_BLOCK:
            self._refuse_outside(part)
        mine = self._enter()
        self._remember(mine, part.sql, [])
        self._hear(mine, self._session.exchange(say.query(part.sql), self.copy_in))
        self._note_savepoint(mine, part)

    def pass_on(
        self,
        request: bytes,
        executed: list[tuple[Statement, list[bytes | None]]],
        on_copy: Callable[[Answer], None],
    ) -> None:
        """Messages of the extended protocol, a Sync at their end.

        Raises:
            Refused: one of them failed.
        """
        self._refuse_if_failed()
        mine = self._enter()
        for part, params in executed:
            self.last = part.sql
            if part.kind in _IN_BLOCK:
                self._refuse_outside(part)
            self._remember(mine, part.sql, params)
        self._hear(mine, self._session.exchange(request, on_copy))

    def _enter(self) -> Transaction:
        """The client's transaction; an implicit one is begun where there is none."""
        return self.transaction or self._begin(implicit=True)

    def _refuse_if_failed(self) -> None:
        """As a server: in a failed transaction nothing is done.

        Raises:
            Refused: it has failed.
        """
        mine = self.transaction
        if mine is not None and mine.failed:
            raise Refused(
                say.report(
                    "25P02",
                    "current transaction is aborted, commands ignored until end of transaction block",
                    detail=mine.doomed,
                    hint=HINT if mine.doomed else "",
                )
            )

    def _hear(self, mine: Transaction, answer: Answer) -> None:
        """Take in what the server said to a client's statement, and pass it on.

        Raises:
            Refused: it was an error.
        """
        for tag in answer.tags:
            self._session.stack.heard(mine, tag)
        self.say(*(each.raw for each in answer.messages if each.kind != b"E"))
        if answer.failed:
            # At once, so that others of this owner can begin theirs above it.
            mine.failed = True
            self._session.must(b"rollback to savepoint " + mine.resort)
        if answer.error is not None:
            raise Refused(explained(answer.error))

    def _remember(self, mine: Transaction, sql: bytes, params: list[bytes | None]) -> None:
        """Write down the settings that the statement changes for its transaction only."""
        for name in local_settings(sql, params) - mine.local.keys():
            found = self._session.ask(
                b"select pg_catalog.current_setting('%b', true)" % name.replace(b"'", b"''")
            )
            row = next((each.body for each in found.messages if each.kind == b"D"), b"")
            mine.local[name] = row[6:]  # one column: its count and its length come first

    def _note_savepoint(self, mine: Transaction, part: Statement) -> None:
        if part.name is None:
            return
        if part.kind is Kind.SAVEPOINT:
            self._session.stack.name(mine, part.name)
        elif part.kind is Kind.RELEASE:
            self._session.stack.forget(mine, part.name, keep=False)
        elif part.kind is Kind.ROLLBACK_TO:
            self._session.stack.forget(mine, part.name, keep=True)
            mine.failed = bool(mine.doomed)

    def copy_in(self, answer: Answer) -> None:
        """COPY FROM STDIN: the server wants data. The turn lasts until it has them."""
        self.say(*(each.raw for each in answer.messages))
        answer.messages.clear()
        # Whatever becomes of the client, the exchange with the server comes to its end.
        with contextlib.suppress(Hangup):
            self.flush(ready=False)
        while True:
            heard = self._next_of_copy()
            self._session.pass_on(heard.raw)
            if heard.kind in b"cf":
                return

    def _next_of_copy(self) -> Message:
        try:
            heard = self._wire.receive()
        except Hangup:
            return Message(b"f", say.message(b"f", say.text(b"the client hung up")))
        return heard if heard.kind in b"dcf" else self._next_of_copy()

    def swallow_sync(self) -> None:
        """After the data of a COPY in the extended protocol the client sends one more Sync."""
        with contextlib.suppress(Hangup):
            self._wire.receive()
        self._session.pass_on(say.message(b"S"))

    # -- what rules transactions ------------------------------------------------------------------

    def _begin(self, *, implicit: bool = False, read_only: bool = False) -> Transaction:
        stack = self._session.stack
        mine, sql = stack.begin(self._owner(), implicit=implicit, read_only=read_only)
        self._session.transactions[self] = mine
        self._session.must(sql)
        return mine

    def _on_begin(self, part: Statement) -> None:
        self._refuse_if_failed()
        mine = self.transaction
        if mine is None:
            self._begin(read_only=part.read_only)
        elif mine.implicit:
            mine.implicit = False
        else:
            self._warn("25001", "there is already a transaction in progress")
        if mine is not None and part.read_only:
            self._session.must(self._session.stack.make_read_only(mine))
        self.say(say.done(part.tag))

    def _on_commit(self, part: Statement) -> None:
        mine = self._ruled(part)
        was_read_only = mine is not None and not mine.failed and READ_ONLY in mine.names
        if mine is not None and mine.doomed:
            self._roll_back(mine)
            raise Refused(
                say.report(
                    "40000", "this transaction is undone already", detail=mine.doomed, hint=HINT
                )
            )
        failed = mine is not None and mine.failed
        if mine is not None and failed:
            self._roll_back(mine)
        elif mine is not None:
            self._commit(mine)
        self._chain(part, was_read_only)
        self.say(say.done(b"ROLLBACK" if failed else b"COMMIT"))

    def _on_rollback(self, part: Statement) -> None:
        mine = self._ruled(part)
        was_read_only = mine is not None and not mine.failed and READ_ONLY in mine.names
        if mine is not None:
            self._roll_back(mine)
        self._chain(part, was_read_only)
        self.say(say.done(b"ROLLBACK"))

    def _refuse_outside(self, part: Statement) -> None:
        if self.transaction is None or self.transaction.implicit:
            words = f"{shown(part.sql)} can only be used in transaction blocks"
            raise Refused(say.report("25P01", words))

    def _ruled(self, part: Statement) -> Transaction | None:
        if part.chain:
            self._refuse_outside(part)
        mine = self.transaction
        if mine is None or mine.implicit:
            self._warn("25P01", "there is no transaction in progress")
        return mine

    def _chain(self, part: Statement, was_read_only: bool) -> None:
        if part.chain:
            self._begin(read_only=was_read_only)

    def _commit(self, mine: Transaction) -> None:
        """Check what a commit checks, then keep it; if the check fails, roll back and say so."""
        session = self._session
        checked = session.ask(session.stack.check(mine))
        if checked.error is not None:
            mine.failed = True
            session.must(b"rollback to savepoint " + mine.savepoint)
            self._roll_back(mine)
            raise Refused(explained(checked.error))
        del session.transactions[self]
        session.must(session.stack.commit(mine))

    def _roll_back(self, mine: Transaction) -> None:
        session = self._session
        del session.transactions[self]
        session.must(session.stack.roll_back(mine))
        if session.stack.lost:
            words = (
                f"a ROLLBACK has undone {session.stack.lost} transaction(s) that other connections "
                "of the same thread committed meanwhile; in production they would stay"
            )
            session.stack.lost = 0
            _log.warning("pytest_penstock.undone: %s (%s)", words, self._describe(self))
            self._warn("01000", words)

    def _end_implicit(self) -> None:
        """Commit what was begun for one request only.

        Raises:
            Refused: a deferred constraint was violated.
        """
        mine = self.transaction
        if mine is not None and mine.implicit:
            self._commit(mine)

    def _drop_implicit(self) -> None:
        """Roll back what was begun for one request only; a real one has failed."""
        mine = self.transaction
        if mine is not None and mine.implicit:
            self._roll_back(mine)
        elif mine is not None and not mine.failed:
            mine.failed = True
            self._session.must(b"rollback to savepoint " + mine.resort)

    def _on_read_only(self, part: Statement) -> None:
        self._refuse_if_failed()
        mine = self.transaction
        if mine is None or mine.implicit:
            self._warn("25P01", f"{shown(part.sql)} can only be used in transaction blocks")
        else:
            self._session.must(self._session.stack.make_read_only(mine))
        self.say(say.done(b"SET"))

    def _on_two_phase(self, part: Statement) -> NoReturn:
        raise Refused(
            say.report("0A000", f"no two-phase commit here: {shown(part.sql)}", hint=HINT)
        )

    def _on_listen(self, part: Statement) -> NoReturn:
        raise Refused(
            say.report(
                "0A000",
                f"{shown(part.sql)} would hear nothing: notifications come with a commit",
                hint=HINT,
            )
        )

    def _on_deallocate(self, part: Statement) -> None:
        """Statements are the session's, and so shared; ALL means the client's own."""
        self._refuse_if_failed()
        mine = self._enter()
        names = self._batch.own_names(part.name)
        if names:
            closing = b"".join(say.message(b"C", b"S" + say.text(name)) for name in names)
            self._session.exchange(closing + say.message(b"S"), None)
        elif part.name is not None:  # one of PREPARE's
            self._hear(mine, self._session.exchange(say.query(part.sql), None))
            return
        self.say(say.done(b"DEALLOCATE ALL" if part.name is None else b"DEALLOCATE"))

    def _warn(self, sqlstate: str, words: str) -> None:
        self.say(say.report(sqlstate, words, severity="WARNING"))
