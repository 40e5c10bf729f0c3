"""One asyncpg connection as penstock moves it about: lend, park, clean, end.

It must not know: pools, slots, leases, waiters, how connections are opened. What can wait is bounded
by a deadline of its own. No lock: a link belongs to whoever moves it, on one event loop.

A connection's `_protocol` is asyncpg's way to the wire while it is lent and a dead one while it is
not, so the link keeps the protocol itself and never goes through the connection's.

Whether a statement is under way asyncpg does not tell, and asking costs 600 ns. But whatever is
under way refers to the protocol (its coroutine, and the callback of the future that it waits for),
so the number of references, which costs 15 ns, differs from that of a connection at rest; when it
does, `_is_busy` looks.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from gc import get_referents
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from penstock._drivers.asyncpg.adopt import fetched, shows_statements
from penstock._drivers.asyncpg.ending import drop, is_running, look_at
from penstock._drivers.asyncpg.guard import (
    COPYING,
    DEAD,
    INHERITED,
    Settings,
    outdated,
)
from penstock._drivers.asyncpg.renewal import renewed
from penstock._drivers.asyncpg.statement_limit import LimitedProtocol
from penstock._drivers.outdated import MARKS, take_from
from penstock._drivers.renewal import ALONE, is_held
from penstock._drivers.session_reset import LEARN, literal, reset_message
from penstock._process.sockets import deadline_in, point_at_null, seconds_to
from penstock.drivers import Activity, Outdated, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from penstock._drivers.asyncpg.guard import Watch
    from penstock.drivers import StatementLimit

#: What asyncpg raises of its own accord when a statement or a session fails.
FAILURES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError is one
    ValueError,
)

#: How long close() waits for the other side to read the last words and to end TLS, in seconds.
CLOSE_SECONDS: Final = 0.5

# https://www.postgresql.org/docs/current/protocol-message-formats.html
_TERMINATE: Final = b"X\x00\x00\x00\x04"

# In a forked child: what the parent's loop and epoll still know of. Freeing a transport would tell
# the epoll that parent and child share.
GRAVEYARD: Final[list[object]] = []


class AsyncpgLink:
    """One asyncpg connection, its protocol, and what it was like when new.

    Attributes:
        conn: the connection that borrowers get: `real`, or a tracer's proxy of it.
        real: asyncpg's connection.
        protocol: asyncpg's protocol object.
        lent: what stands in its place while it is lent: itself, or one that bounds statements.
        fd: the descriptor of its socket as it was when the link was opened.
        touched: what of the connection has been changed since it was new; empty nearly always.
    """

    __slots__ = (
        "_inode",
        "_login",
        "_loop",
        "_pending",
        "_references",
        "_reset",
        "_resets",
        "_settings",
        "_transaction",
        "_transport",
        "_watch",
        "conn",
        "fd",
        "lent",
        "protocol",
        "real",
        "touched",
    )

    def __init__(
        self,
        conn: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        resets_session: bool,
        limit: StatementLimit | None = None,
    ) -> None:
        self.conn = self.real = conn
        self.protocol = self.lent = conn._protocol
        if limit is not None:
            self.lent = LimitedProtocol(self.protocol, limit)
        self._loop = loop
        self._transport = conn._transport
        self.fd: int = self._transport.get_extra_info("socket").fileno()
        self._inode = os.fstat(self.fd).st_ino
        self._watch: Watch = conn._penstock
        self.touched = self._watch.touched
        self._references = 0  # of the protocol while nothing is under way; 0: not known yet
        self._transaction: Any = None
        self._pending: asyncio.Task[Any] | None = None
        self._resets = False  # whether that is a reset
        self._login: str = conn._params.user
        self._reset = reset_message(self._login) if resets_session else None
        conn.add_termination_listener(self._watch.has_ended)
        self._watch.drop = partial(drop, self.protocol, self._transport, loop, self.fd)
        self._settings = Settings(conn)

    # --- hot

    def lend(self) -> None:
        """Make the connection usable: put the real protocol in its place."""
        self.real._protocol = self.lent

    def park(self) -> bool:
        """Take the protocol away, so that using the returned connection raises; tell if it is clean.

        What was made on the connection (prepared statements, cursors, transactions) is dead for
        good, by asyncpg's own count of releases. Listeners and loggers are set back here, at no
        round trip. Not clean are: a transaction, a statement under way or being cancelled, codecs and
        channels that changed.
        """
        conn = self.real
        conn._protocol = DEAD
        conn._pool_release_ctr += 1
        if (
            self.protocol.is_in_transaction()
            or self.touched
            or conn._top_xact is not None
            or getrefcount(self.protocol) != self._references
        ):
            return self._settle()
        return True

    def renew(self) -> bool:
        """See to it that the next borrower's object is his alone: make a new one if anybody has this.

        For a parked link that is clean. 15 ns where nobody has it. False: the session is ended.
        """
        if self.conn is not self.real:
            return self._renew_in_proxy()
        if getrefcount(self.real) > ALONE:
            self.conn = self.real = renewed(self.real, self.protocol)
        return True

    def _renew_in_proxy(self) -> bool:
        if is_held(self):
            self.discard()  # a tracer's proxy cannot be made again
            return False
        return True

    def _settle(self) -> bool:
        references = getrefcount(self.protocol)
        if self.activity() is not Activity.IDLE or "copy" in self.touched:
            return False
        if not self._references or references < self._references:
            self._references = references
        self._forget_transaction()
        if self._watch.recoded or any(self._settings.channels(self.real)):
            return False
        if not self.touched.isdisjoint(MARKS):
            return False
        self._settings.restore(self.real)
        return True

    def _forget_transaction(self) -> None:
        self.real._top_xact = self._transaction = None

    # --- without a word to the server

    def activity(self) -> Activity:
        """What the session is doing, also while parked.

        asyncpg does not tell a failed transaction from one that goes well.
        """
        if self.hung_up():
            return Activity.BROKEN
        if self._is_busy():
            return Activity.ACTIVE
        return Activity.IN_TRANSACTION if self.protocol.is_in_transaction() else Activity.IDLE

    def _is_busy(self) -> bool:
        """Whether a statement is under way, or being cancelled: asyncpg waits for a future then."""
        if COPYING in self.touched or self.protocol._is_cancelling():
            return True
        return any(
            isinstance(each, asyncio.Future) and not each.done()
            for each in get_referents(self.protocol)
        )

    def set_autocommit(self, value: bool) -> None:
        """Asyncpg knows no other way than autocommit.

        Raises:
            asyncpg.InterfaceError: it was asked for one.
        """
        if not value:
            raise asyncpg.InterfaceError(
                "asyncpg has no autocommit=False: borrow with transaction=True"
            )

    def hung_up(self) -> bool:
        """Whether the session is known to have ended, without a round trip."""
        return not self.protocol.is_connected() or bool(self._transport.is_closing())

    def on_end(self, tell: Callable[[], object]) -> bool:
        """Have `tell` called when asyncpg learns of the end: its loop always reads the socket."""
        if self.hung_up():
            self._loop.call_soon(tell)
        else:
            self._watch.tell = tell
        return True

    # --- with the server

    async def prepare(self) -> None:
        """Remember listeners, loggers and codecs as they are now as those to go back to.

        With ``reset="session"`` this also learns what `configure` set on the server. It does not see
        custom settings (``app.tenant``), nor are temporary tables made again.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError: the server did not answer that question.
        """
        self._settings = Settings(self.real)
        if self._reset is not None:
            learned = await self.real._execute(
                LEARN, (), 0, None, ignore_custom_codec=True, record_class=asyncpg.Record
            )
            self._reset = reset_message(self._login, learned)

    async def begin(self) -> None:
        """Open a transaction that `commit` ends; in it, ``conn.transaction()`` makes savepoints.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError: it could not.
        """
        transaction = self.real.transaction()
        await transaction.start()
        self._transaction = transaction

    async def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction, which this begins if none is open.

        One round trip, two if it begins the transaction. The connection must be lent. A value of
        None means the parameter's default.

        Raises:
            asyncpg.PostgresError: the server refused one; none is set, and the transaction has
                failed.
        """
        if not settings:
            return
        if not self.protocol.is_in_transaction():
            await self.begin()
        calls = (
            f"pg_catalog.set_config({literal(name)}, {_setting_text(value)}, true)"
            for name, value in settings.items()
        )
        await self.lent.query("select " + ", ".join(calls), None)

    async def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit. The connection must be lent.

        One round trip where asyncpg has the statement in its cache, two where it does not. Several
        statements in one string work without parameters; then the answer is the last one's tag.

        Args:
            query: the statement, with $1, $2 for parameters.
            params: a sequence.

        Raises:
            asyncpg.InterfaceError: a transaction is open, or the parameters do not fit.
            asyncpg.PostgresError: whatever the statement raises.
        """
        if self.protocol.is_in_transaction():
            raise asyncpg.InterfaceError(f"cannot execute in autocommit: {self.activity().value}")
        self.real._check_open()
        args = () if params is None else tuple(params)
        try:
            answer, statement = await self._executed(query, args)
        except asyncpg.PostgresSyntaxError:
            if args:
                raise
            # What has several statements cannot be prepared, and only the simple protocol tells
            # that from a slip of the pen: nothing has been executed yet.
            status: str = await self.conn.execute(query)
            return Reply(rows=None, rowcount=_count(status), description=None, statusmessage=status)
        rows, tag, _ = answer
        return _reply(rows, tag.decode(), statement)

    async def _executed(self, query: Any, args: tuple[Any, ...]) -> Any:
        try:
            return await self._execute_once(query, args)
        except asyncpg.InvalidSQLStatementNameError as error:
            # The server has forgotten what asyncpg prepared: nothing was executed, and asyncpg knows by now.
            if outdated(error) is None:
                raise
        return await self._execute_once(query, args)

    async def _execute_once(self, query: Any, args: tuple[Any, ...]) -> Any:
        conn = self.real
        if shows_statements(conn) or self.conn is not conn:
            return await fetched(self.conn, conn, self.lent, query, args)
        with conn._stmt_exclusive_section:
            return await conn._Connection__execute(query, args, 0, None, return_status=True)

    async def commit(self) -> None:
        """Commit the transaction that `begin` opened; what the borrower opened by himself is his.

        The COMMIT is a task of its own: if this is cancelled it goes on, and `tidy` waits for it.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError: it could not, or the session broke and
                took the transaction with it. A borrower who closed the connection hears nothing.
        """
        if self._transaction is None:
            return
        if self.hung_up() and "closed" in self.touched:
            return
        if self.hung_up() or self.protocol.is_in_transaction():
            self._forget_transaction()
            await asyncio.shield(self._start(self.lent.query("COMMIT", None)))
        else:  # the borrower has ended it by SQL
            self._forget_transaction()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._pending = self._loop.create_task(work)
        task.add_done_callback(look_at)
        return task

    async def tidy(self, seconds: float | None) -> bool:
        """Bring the session back to rest: wait for a cancelled statement, roll back, restore.

        False, and the link is good for `discard` only: broken, a statement of another task under
        way, not in time.
        """
        deadline = deadline_in(seconds)
        try:
            async with asyncio.timeout(seconds):
                return await self._tidied(deadline)
        except FAILURES:
            return False

    async def _tidied(self, deadline: float) -> bool:
        if not await self._settled():
            return False
        protocol = self.protocol
        await protocol._wait_for_cancellation()
        if self.activity() in {Activity.BROKEN, Activity.ACTIVE}:
            return False
        self.real._pool_release_ctr += 1
        self._forget_transaction()
        unwanted, wanted = self._settings.channels(self.real)
        statements = ["ROLLBACK"] if protocol.is_in_transaction() else []
        statements += [f"UNLISTEN {_name(channel)}" for channel in unwanted]
        statements += [f"LISTEN {_name(channel)}" for channel in wanted]
        if "copy" in self.touched and not statements:
            statements.append("select 1")  # asyncpg raises if it is in the midst of something
        if statements:
            await protocol.query("; ".join(statements), seconds_to(deadline))
        if self._watch.recoded:
            await self._restore_codecs()
        self._settings.restore(self.real)
        return True

    async def _restore_codecs(self) -> None:
        self.lend()
        try:
            await self._settings.restore_codecs(self.real)
        finally:
            self.real._protocol = DEAD

    async def _settled(self) -> bool:
        """Wait for what was sent without waiting; whether that leaves a session to tidy."""
        task = self._pending
        if task is None:
            return True
        await asyncio.wait({task})
        self._pending = None
        # A commit that failed is rolled back, a reset that failed has cleaned nothing.
        was_reset, self._resets = self._resets, False
        return not (was_reset and (task.cancelled() or task.exception()))

    def outdated(self, error: BaseException | None) -> Outdated | None:
        """What the server's errors said to be outdated since the connection was lent; tells it once.

        What asyncpg prepared is forgotten by then, on every connection to this database, parked ones too.
        """
        if error is not None:  # in a cursor, or a statement that the borrower prepared
            self.real._note_outdated(error)
        return take_from(self.touched)

    async def forget(self, seconds: float | None) -> bool:
        """A ping after which asyncpg knows none of the statements that it prepared; it closes them itself."""
        self.real._drop_local_statement_cache()
        return await self.ping(seconds)

    async def ping(self, seconds: float | None) -> bool:
        """One round trip. False if dead, busy or not answered in time."""
        try:
            # An empty statement would be cheaper, but asyncpg 0.32 raises AttributeError for it.
            await self.protocol.query("select 1", seconds)
        except FAILURES:
            return False
        return True

    def start_reset(self) -> bool:
        """Send the session reset without waiting. False: could not; discard."""
        if self.activity() in {Activity.BROKEN, Activity.ACTIVE}:
            return False
        message = self._reset or reset_message(self._login)
        # Told before and not by "ROLLBACK" always: that is a warning in the server's log.
        if self.protocol.is_in_transaction():
            message = f"ROLLBACK; {message}"
        self._forget_transaction()
        self._start(self.protocol.query(message, None))
        self._resets = True
        return True

    async def finish_reset(self, seconds: float | None) -> bool:
        """Read the answer to `start_reset`. False: not clean, or not in time; discard."""
        task = self._pending
        if task is None:
            return False
        await asyncio.wait({task}, timeout=seconds)
        if not task.done() or not await self._settled():
            return False
        if self.activity() is not Activity.IDLE or self._watch.recoded:
            return False
        self._settings.restore(self.real)  # the server listens to what it did when it was new
        return True

    # --- the end

    async def close(self) -> None:
        """End the session politely.

        Nothing is waited for but what the kernel did not take at once, and what TLS has the other
        side say; that at most `CLOSE_SECONDS`.
        """
        self._watch.tell = None
        transport = self._transport
        if self.activity() in {Activity.BROKEN, Activity.ACTIVE}:
            self.discard()
            return
        self.real._protocol = DEAD  # nobody can begin anything; and asyncpg calls it closed
        ended: asyncio.Future[None] = self._loop.create_future()
        self._watch.tell = ended.cancel
        transport.write(_TERMINATE)
        transport.close()
        self.real._mark_stmts_as_closed()  # else a timer of five minutes keeps each that it caches
        if transport.get_extra_info("ssl_object") is None and not transport.get_write_buffer_size():
            self._watch.tell = self._watch.drop = None
            return
        try:
            await asyncio.wait({ended}, timeout=CLOSE_SECONDS)
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop the connection; repeatable, from any thread, and when its loop is closed.

        On its loop whoever waits for the connection is woken by an error at once. From elsewhere
        the socket is shut down, and the loop finds that when it runs.
        """
        self._watch.tell = self._watch.drop = None
        running = is_running(self._loop)
        if running:
            self.real._protocol = self.protocol
        elif self._loop.is_closed():
            self.real._protocol = DEAD
        drop(self.protocol, self._transport, self._loop, self.fd)
        if running:
            wished = "closed" in self.touched
            self.real.terminate()
            if not wished:  # it was not the borrower: his commit shall raise
                self.touched.discard("closed")

    def abandon(self, *, busy: bool) -> None:  # noqa: ARG002  nothing of it is ever freed
        """In a forked child: let go of the parent's session without a byte on the wire."""
        self.real._protocol = INHERITED
        self._watch.drop = None
        GRAVEYARD.append((self.conn, self.real, self.protocol, self._transport, self._loop))
        # A child that ran no at-fork hooks may have closed the number and opened a file on it.
        if self._is_same_socket():
            point_at_null(self.fd)

    def _is_same_socket(self) -> bool:
        try:
            return os.fstat(self.fd).st_ino == self._inode
        except OSError:
            return False


def _name(channel: str) -> str:
    return '"' + channel.replace('"', '""') + '"'


def _setting_text(value: object) -> str:
    """A setting's value as SQL; None for its default."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "'on'" if value else "'off'"
    return literal(str(value))


def _reply(rows: list[Any], status: str, statement: Any) -> Reply:
    description = () if statement is None else statement._get_attributes()
    return Reply(
        rows=rows if description else None,
        rowcount=_count(status),
        description=description or None,
        statusmessage=status,
    )


def _count(status: str) -> int:
    """How many rows, from the command tag ("INSERT 0 3"); -1 where it does not tell."""
    number = status.rpartition(" ")[2]
    return int(number) if number.isdigit() else -1
