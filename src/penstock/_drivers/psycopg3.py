"""The driver for psycopg 3 (3.2 and newer), synchronous connections.

It must not know: pools, slots, leases, waiters, limits. Everything that can block is bounded by a
deadline of its own, by exchanging messages through libpq's non-blocking calls; what psycopg runs
for its user (statements, commit) is bounded from outside, by `discard` in another thread.

Of a connection (`link.conn`) only the class and a few attributes are touched; the connection's
`pgconn` is the libpq handle while it is lent and a dead one while it is not, so the link keeps the
handle itself and never goes through the connection's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.pq import ConnStatus, ExecStatus, PipelineStatus, TransactionStatus

from penstock._drivers import psycopg3_connect as connecting
from penstock._drivers.protocol import Activity, Diagnosis, Recipe, Reply
from penstock._drivers.psycopg3_diagnose import diagnose
from penstock._drivers.psycopg3_guard import (
    DEAD,
    INHERITED,
    Settings,
    equip,
    is_inside_block,
    watched,
)
from penstock._drivers.psycopg3_reset import LEARN, reset_message
from penstock._drivers.psycopg3_wire import all_done, answers, ask, send
from penstock._drivers.sockets import READ, deadline_in, point_at_null, shut_down, wait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg.pq.abc import PGconn

AnyConnection = psycopg.Connection[Any]

_ACTIVITY: Final = {
    TransactionStatus.IDLE: Activity.IDLE,
    TransactionStatus.ACTIVE: Activity.ACTIVE,
    TransactionStatus.INTRANS: Activity.IN_TRANSACTION,
    TransactionStatus.INERROR: Activity.IN_FAILED_TRANSACTION,
}

# 57P01 admin shutdown, 57P02 crash shutdown, 57P03 cannot connect now.
_SERVER_GOES: Final = ("57P01", "57P02", "57P03")

# Linux's largest process id: a "server process" beyond it is a pooler's invention, and a pooler
# would hand our SET to other clients.
_PID_MAX: Final = 4_194_304

# In a forked child: connections that another thread was using at the fork. Their memory must
# neither be used nor freed, because a lock inside may be held by a thread that does not exist here.
GRAVEYARD: Final[list[object]] = []


class Psycopg3Link:
    """One psycopg connection, the handle that leads to the wire, and what it was like when new.

    Attributes:
        conn: the connection that borrowers get.
        handle: its libpq handle.
        fd: the handle's descriptor as it was when the link was opened.
        dead: what stands in for the handle while the link is parked.
        attributes: the connection's own; to store past its class's __setattr__ (9 instead of 150 ns).
        touched: what of the connection has been changed since it was new; empty nearly always.
    """

    __slots__ = (
        "_inode",
        "_reset",
        "_settings",
        "attributes",
        "conn",
        "dead",
        "fd",
        "handle",
        "touched",
    )

    def __init__(
        self, conn: AnyConnection, handle: PGconn, touched: set[str], *, resets_session: bool
    ) -> None:
        self.conn = conn
        self.handle = handle
        self.dead = DEAD  # an attribute of each link: one of the class takes 3.11 40 ns to find
        self.fd: int = handle.socket
        self._inode = os.fstat(self.fd).st_ino
        self.attributes: dict[str, Any] = vars(conn)
        self.touched = touched
        self._settings = Settings(conn)
        self._reset = reset_message(handle, None) if resets_session else None

    # --- hot

    def lend(self) -> None:
        """Make the connection usable: put the real handle in its place."""
        self.attributes["pgconn"] = self.handle

    def park(self) -> bool:
        """Take the handle away, so that using the returned connection raises; tell if it is clean.

        Client-side settings that were changed are set back here, at no round trip. Not clean are:
        a transaction, a statement under way, pipeline mode, a block that somebody is still in.
        """
        self.attributes["pgconn"] = DEAD
        handle = self.handle
        # IDLE and OFF are 0 in libpq.
        if handle.transaction_status or handle.pipeline_status or self.touched:
            return self._settle()
        return True

    def _settle(self) -> bool:
        if not self._is_at_rest() or is_inside_block(self.conn, self.touched):
            return False
        self._settings.restore(self.conn)
        return True

    def _is_at_rest(self) -> bool:
        return (
            self.handle.transaction_status == TransactionStatus.IDLE
            and self.handle.pipeline_status == PipelineStatus.OFF
        )

    # --- without a word to the server

    def activity(self) -> Activity:
        """What the session is doing, also while parked."""
        if self.handle.status == ConnStatus.BAD:
            return Activity.BROKEN
        return _ACTIVITY.get(TransactionStatus(self.handle.transaction_status), Activity.BROKEN)

    def set_autocommit(self, value: bool) -> None:
        """Set autocommit until the connection is given back; only while idle.

        Raises:
            psycopg.ProgrammingError: a transaction is open.
        """
        self._refuse_if_busy("set autocommit")
        if self.attributes["_autocommit"] != value:
            self.touched.add("_autocommit")
            self.attributes["_autocommit"] = value

    def _refuse_if_busy(self, what: str) -> None:
        if self.handle.transaction_status != TransactionStatus.IDLE:
            raise psycopg.ProgrammingError(f"cannot {what}: the session is {self.activity().value}")

    # --- with the server

    def prepare(self, seconds: float | None = None) -> None:
        """Remember the settings as they are now as those to go back to.

        With ``reset="session"`` one round trip learns what `configure` set on the server. It does not
        see custom settings (``app.tenant``), nor are temporary tables made again.

        Raises:
            psycopg.OperationalError: the server did not answer that question, or not in time.
        """
        self._settings = Settings(self.conn)
        if self._reset is None:
            return
        results = ask(self.handle, self.fd, LEARN, deadline_in(seconds))
        if results is None or not all_done(results):
            raise psycopg.OperationalError("could not learn the settings of a new session")
        self._reset = reset_message(self.handle, results[-1])

    def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit: one round trip. The connection must be lent.

        Of several statements in one string the answer to the first is returned, which is what a
        psycopg cursor shows first; an error in any of them raises.

        Raises:
            psycopg.ProgrammingError: a transaction is open.
            psycopg.Error: whatever the statement raises.
        """
        self._refuse_if_busy("execute in autocommit")
        attributes = self.attributes
        autocommit = attributes["_autocommit"]
        try:
            attributes["_autocommit"] = True
            return _detached(self.conn.execute(query, params))
        finally:
            attributes["_autocommit"] = autocommit

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction, which this begins if none is open.

        One round trip, two if it begins the transaction. The connection must be lent. A value of
        None means the parameter's default.

        Raises:
            psycopg.Error: the server refused one; none is set, and the transaction has failed.
        """
        if not settings:
            return
        conn = self.conn
        if conn.autocommit and self.handle.transaction_status == TransactionStatus.IDLE:
            conn.execute(conn._get_tx_start_command())  # noqa: SLF001  (with its isolation level)
        calls = b", ".join([b"pg_catalog.set_config(%s, %s, true)"] * len(settings))
        values = [text for pair in settings.items() for text in map(_setting_text, pair)]
        # psycopg's own cursor: the user's may have other placeholders.
        with psycopg.Cursor(conn) as cursor:
            cursor.execute(b"select " + calls, values, prepare=False)

    def commit(self) -> None:
        """Commit if a transaction is open. The connection must be lent.

        A session that broke meanwhile took its transaction with it, and that raises, even if the
        borrower has caught the error that told it: else a block would end well that was not
        committed. One that the borrower closed does not: that was a wish.
        """
        status = self.handle.transaction_status
        if status == TransactionStatus.UNKNOWN and (
            self.attributes["_closed"] or self.attributes["_autocommit"]
        ):
            return
        if status != TransactionStatus.IDLE:
            self.conn.commit()

    def tidy(self, seconds: float | None) -> bool:
        """Roll back, leave pipeline mode, restore client-side settings; within `seconds`.

        False, and the link is good for `discard` only: broken, a statement under way, not in time,
        or somebody is still inside a ``transaction()``, ``pipeline()`` or ``notifies()`` of it and
        would end that block on the next borrower's connection.
        """
        if is_inside_block(self.conn, self.touched):
            return False
        deadline = deadline_in(seconds)
        try:
            return self._left_pipeline(deadline) and self._rolled_back(deadline) and self._settle()
        except psycopg.Error:
            return False

    def _left_pipeline(self, deadline: float) -> bool:
        handle = self.handle
        if handle.pipeline_status == PipelineStatus.OFF:
            return True
        handle.pipeline_sync()
        # Results come one per get_result(), each statement's ended by a None, up to the sync's.
        for _ in range(10_000):
            results = answers(handle, self.fd, deadline)
            if results is None:
                return False
            if any(result.status == ExecStatus.PIPELINE_SYNC for result in results):
                break
        handle.exit_pipeline_mode()
        return True

    def _rolled_back(self, deadline: float) -> bool:
        status = self.handle.transaction_status
        if status == TransactionStatus.IDLE:
            return True
        if status not in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            return False
        return all_done(ask(self.handle, self.fd, self._rollback(), deadline))

    def _rollback(self) -> bytes:
        # What psycopg's own rollback() does: the statements it has prepared may be about objects
        # that were made in this transaction. psycopg would send the second one by itself later.
        prepared = self.conn._prepared  # noqa: SLF001
        if not prepared.clear():
            return b"ROLLBACK"
        prepared._to_flush.clear()  # noqa: SLF001
        return b"ROLLBACK; DEALLOCATE ALL"

    def ping(self, seconds: float | None) -> bool:
        """One round trip with an empty query. False if dead or not answered in time."""
        try:
            return all_done(ask(self.handle, self.fd, b"", deadline_in(seconds)))
        except psycopg.Error:
            return False

    def start_reset(self) -> bool:
        """Send the session reset without waiting. False: could not; discard."""
        message = self._reset or reset_message(self.handle, None)
        try:
            # Told before and not by "ROLLBACK" always: that is a warning in the server's log.
            if self.handle.transaction_status:
                message = self._rollback() + b"; " + message
            send(self.handle, message)
        except psycopg.Error:
            return False
        return True

    def finish_reset(self, seconds: float | None) -> bool:
        """Read the answer to `start_reset`. False: not clean, or not in time; discard."""
        handle = self.handle
        try:
            handle.consume_input()
            if not all_done(answers(handle, self.fd, deadline_in(seconds))):
                return False
        except psycopg.Error:
            return False
        # Notifications of channels that the last borrower listened to.
        while handle.notifies() is not None:
            pass
        if backlog := self.attributes["_notifies_backlog"]:
            backlog.clear()
        return self._settle()

    # --- the end

    def hung_up(self) -> bool:
        """Whether the server ended the session, by a look at the socket."""
        handle = self.handle
        try:
            if handle.status == ConnStatus.OK and wait(handle.socket, READ, 0.0):
                # The first call swallows the server's last message without an error, the second
                # meets the end of the stream.
                handle.consume_input()
                handle.consume_input()
        except psycopg.Error:
            return True
        return handle.status != ConnStatus.OK

    def close(self) -> None:
        """End the session politely. Never raises, never blocks: the handle is non-blocking."""
        self.attributes["_closed"] = True  # else psycopg calls the connection "broken"
        self.handle.finish()

    def discard(self) -> None:
        """Shut the socket down, and leave the memory to whoever still holds the connection."""
        try:
            duplicate = os.dup(self.fd)
        except OSError:  # closed already
            return
        # Looked at after the dup: a handle that still has this number had it then, too.
        if self._holds_descriptor():
            shut_down(duplicate)
        else:
            os.close(duplicate)

    def abandon(self, *, busy: bool) -> None:
        """In a forked child: let go of the parent's session without a byte on the wire."""
        self.attributes["pgconn"] = INHERITED
        holds = self._holds_descriptor()
        # A child that ran no at-fork hooks may have closed the number and opened a file on it.
        ours = holds and self._is_same_socket()
        if ours:
            point_at_null(self.fd)
        if busy or (holds and not ours):
            GRAVEYARD.append((self.conn, self.handle))
        else:
            self.handle.finish()

    def _is_same_socket(self) -> bool:
        try:
            return os.fstat(self.fd).st_ino == self._inode
        except OSError:
            return False

    def _holds_descriptor(self) -> bool:
        try:
            return self.handle.socket == self.fd
        except psycopg.Error:  # finished or broken: libpq has closed it
            return False


def _setting_text(value: object) -> str | None:
    """A setting's value as SET would take it; None for its default."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _detached(cursor: psycopg.Cursor[Any]) -> Reply:
    description = cursor.description
    reply = Reply(
        rows=None if description is None else cursor.fetchall(),
        rowcount=cursor.rowcount,
        description=description,
        statusmessage=cursor.statusmessage,
    )
    cursor.close()
    return reply


class Psycopg3Driver:
    """psycopg 3, as penstock sees it."""

    name = "psycopg"
    #: Its links have `attributes`, `handle`, `dead` and `touched`: a lease may swap by itself.
    pgconn_shaped = True
    operational_error: type[Exception] = psycopg.OperationalError
    interface_error: type[Exception] = psycopg.InterfaceError

    def open(self, recipe: Recipe, seconds: float | None) -> Psycopg3Link:
        """Connect within `seconds`, name look-up included; the link is lent.

        The connection is what ``connection_class.connect()`` would make of the same arguments,
        except that this class method is not called, so that one overridden there is not heard.
        The resolver cannot be bounded: a dead one holds the caller for its own time-outs.

        Raises:
            psycopg.OperationalError: no connection; the text has the server's or libpq's words.
            psycopg.errors.ConnectionTimeout: not in time.
            psycopg.ProgrammingError: the connection string or an option is wrong.
        """
        deadline = deadline_in(seconds)
        params = connecting.connection_params(recipe)
        handle = connecting.connect(params, deadline)
        try:
            return _linked(handle, recipe, deadline)
        except BaseException:
            handle.finish()
            raise

    def diagnose(self, error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
        """Tell why `open` raised `error`; may make one more attempt to learn the server's code.

        A certificate that fails verification, and a missing certificate file, cannot be told from
        a network error without reading text: they count as failures that heal.
        """
        return diagnose(error, recipe, seconds)

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether `error`, raised in a lease, means that this and older sessions are not to be trusted.

        Besides the server's own words these are the failures without a code, which libpq raises
        when the network gave up (keepalives, tcp_user_timeout, a reset).
        """
        if not isinstance(error, psycopg.Error):
            return False
        sqlstate = error.sqlstate
        if sqlstate is None:
            # Exactly this class: subclasses are penstock's own time-outs, and psycopg's.
            return type(error) is psycopg.OperationalError
        return (
            sqlstate in _SERVER_GOES
            or sqlstate.startswith("08")
            or (read_write and sqlstate == "25006")
        )


def _linked(handle: PGconn, recipe: Recipe, deadline: float) -> Psycopg3Link:
    """Build the connection as psycopg's `connect()` would, and set the session up."""
    options = connecting.driver_options(recipe)
    cls: type[AnyConnection] = recipe.connection_class or psycopg.Connection
    conn = watched(cls)(handle)
    context = options.get("context")
    touched = equip(conn, None if context is None else context.adapters)
    conn.prepare_threshold = options.get("prepare_threshold", 5)
    if options.get("row_factory"):
        conn.row_factory = options["row_factory"]
    if options.get("cursor_factory"):
        conn.cursor_factory = options["cursor_factory"]
    # Not by the property: it asks whether a transaction is open, and none can be.
    vars(conn)["_autocommit"] = bool(options.get("autocommit", recipe.autocommit))
    link = Psycopg3Link(conn, handle, touched, resets_session=recipe.reset == "session")
    _set_check_interval(link, recipe.server_check_interval, deadline)
    return link


def _set_check_interval(link: Psycopg3Link, seconds: float | None, deadline: float) -> None:
    """Let the server notice a client that died during a long statement; one round trip.

    Before PostgreSQL 14 the setting does not exist. Somebody who turned it on already (for the role,
    by `options`) is left alone. Errors do not matter: not every platform and pooler takes it.
    """
    handle = link.handle
    if not seconds or handle.server_version < 140000 or not 0 < handle.backend_pid <= _PID_MAX:
        return
    name = b"'client_connection_check_interval'"
    query = (
        b"select pg_catalog.set_config(%b, '%d', false) where pg_catalog.current_setting(%b) = '0'"
        % (name, max(1, round(seconds * 1000)), name)
    )
    if ask(handle, link.fd, query, deadline) is None:
        raise psycopg.errors.ConnectionTimeout("the new session did not answer in time")
    if handle.status != ConnStatus.OK:
        raise psycopg.OperationalError(handle.get_error_message())


driver: Final = Psycopg3Driver()
