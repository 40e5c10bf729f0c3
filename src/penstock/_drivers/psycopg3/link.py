"""What the links of both psycopg 3 drivers have in common: all that needs no waiting.

A link for threads and gevent and one for asyncio are the same thing until somebody has to wait for the
server: the same handle, the same guard, the same ways to end. What waits is in `psycopg3` and
`psycopg3_async`.

It must not know: pools, slots, leases, event loops, deadlines. It takes no lock: whoever
calls owns the link.

Of a connection (`link.conn`) only the class and a few attributes are touched; the connection's
`pgconn` is the libpq handle while it is lent and a dead one while it is not, so the link keeps the
handle itself and never goes through the connection's.
"""

from __future__ import annotations

import os
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus

from penstock._drivers.outdated import MARKS, take_from
from penstock._drivers.psycopg3.adopt import class_of, own_connect
from penstock._drivers.psycopg3.connect import driver_options, unfit_option
from penstock._drivers.psycopg3.exchange import all_done, send
from penstock._drivers.psycopg3.guard import (
    DEAD,
    INHERITED,
    Settings,
    equip,
    is_inside_block,
    watched,
)
from penstock._drivers.psycopg3.outdated import FORGOTTEN
from penstock._drivers.psycopg3.renewal import renewed
from penstock._drivers.psycopg3.session_reset import reset_message
from penstock._drivers.psycopg3.statement_limit import LIMIT
from penstock._drivers.renewal import ALONE, is_held
from penstock._process.sockets import (
    READ,
    point_at_null,
    shut_down,
    wait,
)
from penstock.drivers import Activity, Outdated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from psycopg.pq.abc import PGconn, PGresult

    from penstock.drivers import Recipe, UnfitOption

AnyConnection = psycopg.BaseConnection[Any]
C = TypeVar("C", bound=AnyConnection)

_ACTIVITY: Final[dict[int, Activity]] = {
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

# In a forked child: connections that were in use at the fork. Their memory must neither be used nor
# freed, because a lock inside may be held by a thread that does not exist here.
GRAVEYARD: Final[list[object]] = []


class PgconnLink:
    """One psycopg connection, the handle that leads to the wire, and what it was like when new.

    Attributes:
        conn: the connection that borrowers get: `real`, or a tracer's proxy of it.
        real: psycopg's connection.
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
        "real",
        "touched",
    )

    conn: Any  # of another class in each driver
    real: Any

    def __init__(
        self, conn: AnyConnection, handle: PGconn, touched: set[str], *, resets_session: bool
    ) -> None:
        self.conn = self.real = conn
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

    def renew(self) -> bool:
        """See to it that the next borrower's object is his alone: make a new one if anybody has this.

        For a parked link that is clean. 15 ns where nobody has it. False: the session is ended.
        """
        if self.conn is not self.real:
            return self._renew_in_proxy()
        if getrefcount(self.real) > ALONE:
            old = self.real
            self.conn = self.real = renewed(old, self.handle)
            self._settings.follow(old, self.real)
            self.attributes = vars(self.real)
        return True

    def _renew_in_proxy(self) -> bool:
        if not is_held(self):
            return True
        self._finish()  # a tracer's proxy cannot be made again
        return False

    def _settle(self) -> bool:
        if not self._is_at_rest() or self._is_inside_block():
            return False
        if not self.touched.isdisjoint(MARKS):
            return False
        self._settings.restore(self.real)
        return True

    def _is_at_rest(self) -> bool:
        return (
            self.handle.transaction_status == TransactionStatus.IDLE
            and self.handle.pipeline_status == PipelineStatus.OFF
        )

    def _is_inside_block(self) -> bool:
        return is_inside_block(self.real, self.touched)

    # --- without a word to the server

    @property
    def held(self) -> bool:
        """Whether psycopg's own lock is: by somebody in a call, or for ever, by one who was struck at its end."""
        locked: bool = self.attributes["lock"].locked()
        return locked

    def activity(self) -> Activity:
        """What the session is doing, also while parked."""
        if self.handle.status == ConnStatus.BAD:
            return Activity.BROKEN
        return _ACTIVITY.get(self.handle.transaction_status, Activity.BROKEN)

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

    # --- parts of what waits

    def _learn(self, results: Sequence[PGresult] | None) -> None:
        """Make the reset's message of the answer to `LEARN`."""
        if results is None or not all_done(results):
            raise psycopg.OperationalError("could not learn the settings of a new session")
        self._reset = reset_message(self.handle, results[-1])

    def _has_nothing_to_commit(self) -> bool:
        """Whether commit() is to do nothing.

        A session that broke meanwhile took its transaction with it, and commit() is to raise, even if
        the borrower has caught the error that told it: else a block would end well that was not
        committed. One that the borrower closed is not: that was a wish.
        """
        status = self.handle.transaction_status
        if status == TransactionStatus.UNKNOWN:
            return bool(self.attributes["_closed"] or self.attributes["_autocommit"])
        return status == TransactionStatus.IDLE

    def _begin_first(self) -> bytes | None:
        """What opens the transaction that `apply_settings` needs, where psycopg would open none."""
        if self.real.autocommit and self.handle.transaction_status == TransactionStatus.IDLE:
            # With its isolation level.
            return self.real._get_tx_start_command()  # type: ignore[no-any-return]  # noqa: SLF001
        return None

    def _rollback(self) -> bytes:
        # What psycopg's own rollback() does: the statements it has prepared may be about objects
        # that were made in this transaction. psycopg would send the second one by itself later.
        forget = self._forgetting()
        return b"ROLLBACK; " + forget if forget else b"ROLLBACK"

    def _forgetting(self) -> bytes:
        """Have psycopg forget what it prepared; what has the server do so, empty if there is nothing."""
        prepared = self.real._prepared  # noqa: SLF001
        prepared.clear()
        known = bool(prepared._to_flush) or bool(self.attributes.pop(FORGOTTEN, ()))  # noqa: SLF001
        prepared._to_flush.clear()  # noqa: SLF001
        return b"DEALLOCATE ALL" if known else b""

    def outdated(self, error: BaseException | None) -> Outdated | None:  # noqa: ARG002  it was noted
        """What the server's errors said to be outdated since the connection was lent; tells it once."""
        return take_from(self.touched)

    def start_reset(self) -> bool:
        """Send the session reset without waiting. False: could not; discard."""
        try:
            message = self._reset or reset_message(self.handle, None)
            # Told before and not by "ROLLBACK" always: that is a warning in the server's log.
            if self.handle.transaction_status:
                message = self._rollback() + b"; " + message
            send(self.handle, message)
        except psycopg.Error:
            return False
        return True

    def _forget_notifications(self) -> None:
        # Of channels that the last borrower listened to.
        handle = self.handle
        while handle.notifies() is not None:
            pass
        if backlog := self.attributes.get("_notifies_backlog"):  # not before psycopg 3.2.4
            backlog.clear()

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

    def _finish(self) -> None:
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
            GRAVEYARD.append((self.conn, self.real, self.handle))
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


class PsycopgDriver:
    """What is the same of psycopg 3 for both drivers."""

    name = "psycopg"
    kind: type[AnyConnection]
    #: Its links have `attributes`, `handle`, `dead` and `touched`: a lease may swap by itself.
    pgconn_shaped = True
    limits_statements = True
    #: Its links have `renew`, which opens no session.
    renews = renews_in_place = True
    operational_error: type[Exception] = psycopg.OperationalError
    interface_error: type[Exception] = psycopg.InterfaceError

    def unfit_option(self, recipe: Recipe) -> UnfitOption | None:
        """The first option of a recipe that cannot be honoured; a `connect` of a class's own may have others."""
        found = unfit_option(recipe)
        if found is not None and found.key in recipe.kwargs and own_connect(recipe, self.kind):
            return None
        return found

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


def connection_over(
    handle: PGconn, recipe: Recipe, kind: type[C], *in_front: type[Any]
) -> tuple[C, set[str]]:
    """The connection that psycopg's `connect()` would make, watched; and what notes its changes.

    `in_front` are classes that go in front of the recipe's class.

    Raises:
        psycopg.ProgrammingError: the recipe's class is no subclass of `kind`.
    """
    cls = class_of(recipe, kind)
    options = driver_options(recipe)
    conn: Any = watched(cls, *in_front)(handle)
    if recipe.statement_limit is not None:
        vars(conn)[LIMIT] = recipe.statement_limit
    context = options.get("context")
    touched = equip(conn, None if context is None else context.adapters)
    conn.prepare_threshold = options.get("prepare_threshold", 5)
    if options.get("row_factory"):
        conn.row_factory = options["row_factory"]
    if options.get("cursor_factory"):
        conn.cursor_factory = options["cursor_factory"]
    # Not by the property: it asks whether a transaction is open, and none can be.
    vars(conn)["_autocommit"] = bool(options.get("autocommit", recipe.autocommit))
    return conn, touched


def settings_statement(settings: Mapping[str, Any]) -> tuple[bytes, list[str | None]]:
    """The query, and its values, that sets run-time parameters for the running transaction."""
    calls = b", ".join([b"pg_catalog.set_config(%s, %s, true)"] * len(settings))
    values = [text for pair in settings.items() for text in map(_setting_text, pair)]
    return b"select " + calls, values


def _setting_text(value: object) -> str | None:
    """A setting's value as SET would take it; None for its default."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def check_interval_query(handle: PGconn, seconds: float | None) -> bytes | None:
    """What lets the server notice a client that died during a long statement; None: nothing to say.

    Before PostgreSQL 14 the setting does not exist. Somebody who turned it on already (for the role,
    by `options`) is left alone. Errors do not matter: not every platform and pooler takes it.
    """
    if not seconds or handle.server_version < 140000 or not 0 < handle.backend_pid <= _PID_MAX:
        return None
    name = b"'client_connection_check_interval'"
    return (
        b"select pg_catalog.set_config(%b, '%d', false) where pg_catalog.current_setting(%b) = '0'"
        % (name, max(1, round(seconds * 1000)), name)
    )


def check_set_up(handle: PGconn, results: Sequence[PGresult] | None) -> None:
    """Whether the new session has answered to the first thing it was asked.

    Raises:
        psycopg.errors.ConnectionTimeout: not in time.
        psycopg.OperationalError: it broke.
    """
    if results is None:
        raise psycopg.errors.ConnectionTimeout("the new session did not answer in time")
    if handle.status != ConnStatus.OK:
        raise psycopg.OperationalError(handle.get_error_message())
