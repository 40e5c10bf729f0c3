"""A link of psycopg2: a connection that blocks, lent, parked, tidied, asked and ended.

Everything goes through psycopg2's own calls, so that they are cooperative under gevent as soon as a wait
callback is installed, and safe from other threads that still have a cursor (psycopg2 has a lock per
connection). They block as long as the server likes: those made here are bounded by a `Bound`, those
of the user by whoever calls `discard` from another thread.

A connection is of another class while it is parked (`psycopg2_guard`), so the link uses psycopg2's
own functions (`RAW`), which do not care.

It must not know: pools, slots, leases, waiters, limits.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final

import psycopg2
from psycopg2.extensions import (
    STATUS_PREPARED,
    STATUS_READY,
    UNICODE,
    connection,
    cursor,
    register_type,
)

from penstock._drivers.outdated import outdated_by
from penstock._drivers.psycopg2.deadline import Bound
from penstock._drivers.psycopg2.guard import (
    BLOCK,
    CLOSE,
    RAW,
    Classes,
    Settings,
    equip,
    set_autocommit,
)
from penstock._drivers.psycopg2.statement_limit import LIMIT, limited_cursor
from penstock._drivers.renewal import ALONE
from penstock._drivers.session_reset import LEARN, reset_message
from penstock._process.sockets import (
    READ,
    deadline_in,
    point_at_null,
    shut_down,
    shut_down_without_duplicate,
    wait,
)
from penstock.drivers import Activity, Outdated, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# libpq's numbers (psycopg2.extensions.TRANSACTION_STATUS_*).
IDLE: Final = 0
ACTIVE: Final = 1
UNKNOWN: Final = 4
_ACTIVITY: Final = {
    IDLE: Activity.IDLE,
    ACTIVE: Activity.ACTIVE,
    2: Activity.IN_TRANSACTION,
    3: Activity.IN_FAILED_TRANSACTION,
}

#: A link's references to its connection: `conn`, `real`, and `status`, which is bound to it.
_OURS: Final = ALONE + 1

#: How long the reset of a session may take at its return, in seconds: it is one round trip.
RESET_SECONDS: Final = 5.0

# In a forked child: connections that another thread was using at the fork. psycopg2's lock of such a
# one is held for ever, so that closing or freeing it would never end.
GRAVEYARD: Final[list[object]] = []


class Psycopg2Link:
    """One psycopg2 connection, the classes that it changes between, and what it was like when new.

    Attributes:
        conn: the connection that borrowers get: `real`, or a tracer's proxy of it.
        real: psycopg2's connection.
        fd: its descriptor as it was when the link was opened.
        live: its class while lent.
        dead: its class while parked.
        status: gives libpq's transaction status, whatever the class.
        touched: what of the connection has been changed since it was new; empty nearly always.
        odd_types: true when types are registered that were not when it was new.
    """

    held = False  # psycopg2 keeps no lock that an interrupt in Python could leave held

    __slots__ = (
        "_inherited",
        "_inode",
        "_reset",
        "_settings",
        "_tended",
        "_was_lent",
        "conn",
        "dead",
        "fd",
        "live",
        "odd_types",
        "real",
        "status",
        "touched",
    )

    def __init__(self, conn: connection, classes: Classes, *, resets_session: bool) -> None:
        self.conn = self.real = conn
        self.live, self.dead, self._inherited, self._tended = classes
        self.fd: int = conn.fileno()
        self._inode = os.fstat(self.fd).st_ino
        self.status: Callable[[], int] = RAW["get_transaction_status"].__get__(conn)
        self._was_lent = False
        self.touched = equip(conn)
        self._reset = reset_message(self._login()) if resets_session else None
        self._remember()

    def _remember(self) -> None:
        self._settings = Settings(self.real)
        self.odd_types = self._settings.odd_types(self.real)

    #: `start_reset` waits for the answer.
    reset_waits = True

    # --- hot

    def lend(self) -> None:
        """Make the connection usable: give it its class back."""
        self.real.__class__ = self.live

    def park(self) -> bool:
        """Change its class, so that using the returned connection raises; tell if it is clean.

        Client-side settings that were changed are set back here where that takes no round trip.
        Not clean are: a transaction, a statement under way, a ``with conn:`` that somebody is still
        in, settings that the server must be told.
        """
        conn = self.real
        conn.__class__ = self.dead
        if (
            self.status()  # IDLE is 0 in libpq, and READY 1 in psycopg2
            or conn.status != 1
            or self.touched
            or self.odd_types
        ):
            return self._settle()
        return True

    def renew(self) -> bool:
        """Whether the next borrower's object is his alone. False: somebody had it; it is closed.

        A psycopg2 connection is one object in C, of which no second one can be made. What was never
        lent is nobody's, whatever `configure` has kept.
        """
        if self._was_lent and (
            getrefcount(self.real) > _OURS
            or (self.conn is not self.real and getrefcount(self.conn) >= ALONE)
        ):
            self.close()
            return False
        self._was_lent = True
        return True

    def _settle(self) -> bool:
        """Set back what can be without the server; tell if that is all there is to do."""
        if not self._is_at_rest() or BLOCK in self.touched:
            return False
        if self._settings.needs_server(self.real):
            return False
        self._settings.restore(self.real)
        return True

    def _is_at_rest(self) -> bool:
        # psycopg2's own status is another matter: it stays at "begun" when SQL ends a transaction,
        # and the next borrower's statements would then run without one.
        return self.status() == IDLE and self.real.status == STATUS_READY

    # --- without a word to the server

    def activity(self) -> Activity:
        """What the session is doing, also while parked."""
        return _ACTIVITY.get(self.status(), Activity.BROKEN)

    def set_autocommit(self, value: bool) -> None:
        """Set autocommit until the connection is given back; only while idle.

        Raises:
            psycopg2.ProgrammingError: a transaction is open.
        """
        self._refuse_if_busy("set autocommit")
        if RAW["autocommit"].__get__(self.real) != value:
            self.touched.add("autocommit")
            set_autocommit(self.real, value)

    def _refuse_if_busy(self, what: str) -> None:
        if self.status() != IDLE:
            raise psycopg2.ProgrammingError(
                f"cannot {what}: the session is {self.activity().value}"
            )

    def outdated(self, error: BaseException | None) -> Outdated | None:
        """What the error that leaves the block says to be outdated: types, or what the session remembers.

        psycopg2 prepares nothing; what the user prepares by SQL is the user's.
        """
        if not isinstance(error, psycopg2.Error):
            return None
        said = error.diag
        found = outdated_by(error.pgcode, said.source_function, said.message_primary, "")
        return None if found is Outdated.STATEMENTS else found

    # --- with the server

    def prepare(self, seconds: float | None = None) -> None:
        """Remember the settings as they are now as those to go back to.

        With ``reset="session"`` one round trip learns what `configure` set on the server. It does not
        see custom settings (``app.tenant``), nor are temporary tables made again.

        Raises:
            psycopg2.Error: the server did not answer that question, or not in time.
        """
        if self._reset is not None:
            learned = self._ask(LEARN, deadline_in(seconds))
            self._reset = reset_message(self._login(), learned)
        self._remember()

    def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit: one round trip. The connection must be lent.

        Of several statements in one string the answer to the last is returned, as by a psycopg2
        cursor; an error in any of them raises.

        Raises:
            psycopg2.ProgrammingError: a transaction is open.
            psycopg2.Error: whatever the statement raises.
        """
        self._refuse_if_busy("execute in autocommit")
        real = self.real
        if RAW["autocommit"].__get__(real):
            return _detached(self.conn.cursor(), query, params)
        try:
            set_autocommit(real, True)
            return _detached(self.conn.cursor(), query, params)
        finally:
            self._end_autocommit()

    def _end_autocommit(self) -> None:
        if self.status() != UNKNOWN:  # else it is closed, and refuses
            set_autocommit(self.real, False)

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction, which this begins if none is open.

        One round trip, two if it begins the transaction. A value of None means the parameter's
        default.

        Raises:
            psycopg2.Error: the server refused one; none is set, and the transaction has failed.
        """
        if not settings:
            return
        conn = self.real
        calls = ", ".join(["pg_catalog.set_config(%s, %s, true)"] * len(settings))
        values = [text for pair in settings.items() for text in map(_setting_text, pair)]
        with self._cursor() as own:
            if RAW["autocommit"].__get__(conn) and self.status() == IDLE:
                own.execute("begin")
            own.execute(f"select {calls}", values)

    def commit(self) -> None:
        """Commit if a transaction is open. The connection must be lent.

        A session that broke meanwhile took its transaction with it, and that raises, even if the
        borrower has caught the error that told it: else a block would end well that was not
        committed. One that the borrower closed does not: that was a wish.
        """
        status = self.status()
        if status == UNKNOWN:
            if CLOSE not in self.touched and not RAW["autocommit"].__get__(self.real):
                raise psycopg2.OperationalError(
                    "the session was lost, and what was not committed with it"
                )
        elif status != IDLE:
            if self.real.status == STATUS_READY:  # begun by SQL: psycopg2's commit() does nothing
                self._say("commit")
            else:
                self.conn.commit()

    def _say(self, statement: str) -> None:
        with self._cursor() as own:
            own.execute(statement)

    def _cursor(self) -> cursor:
        """A cursor of psycopg2's own kind: the user's may be of any."""
        kind = limited_cursor(cursor) if LIMIT in vars(self.real) else cursor
        return kind(self.real)

    def tidy(self, seconds: float | None) -> bool:
        """Roll back, restore client-side settings; within `seconds`.

        False, and the link is good for `discard` only: broken, a statement under way, not in time,
        in the midst of a two-phase commit, or somebody is still inside a ``with conn:`` of it and would
        end that block on the next borrower's connection.
        """
        if BLOCK in self.touched or self.real.status == STATUS_PREPARED:
            return False
        if self.status() in {ACTIVE, UNKNOWN}:
            return False
        try:
            with self._tending(deadline_in(seconds)) as bound:
                self._roll_back()
                self._settings.restore(self.real)
        except psycopg2.Error:
            return False
        return not bound.rang and self._is_at_rest()

    def _roll_back(self) -> None:
        conn = self.real
        if self.status() != IDLE and conn.status == STATUS_READY:  # begun by SQL
            self._say("rollback")
        if conn.status != STATUS_READY:
            RAW["rollback"](conn)

    def ping(self, seconds: float | None) -> bool:
        """One round trip. False if dead or not answered in time."""
        try:
            self._ask("select 1", deadline_in(seconds))
        except psycopg2.Error:
            return False
        return True

    def _ask(self, query: str, deadline: float) -> list[Any]:
        """Ask in autocommit, whatever the connection's class and autocommit are: one round trip.

        Raises:
            psycopg2.Error: an error of the server, a broken session, or no answer in time.
        """
        conn = self.real
        autocommit = RAW["autocommit"].__get__(conn)
        with self._tending(deadline) as bound:
            try:
                set_autocommit(conn, True)
                with cursor(conn) as own:
                    register_type(UNICODE, own)  # whatever `configure` makes of texts
                    own.execute(query)
                    rows = own.fetchall() if own.description else []
            finally:
                if not autocommit:
                    self._end_autocommit()
        if bound.rang:
            raise psycopg2.OperationalError("the server did not answer in time")
        return rows

    @contextmanager
    def _tending(self, deadline: float) -> Iterator[Bound]:
        """Ask the server something, until the deadline; a parked connection stays refused to others."""
        conn = self.real
        found = conn.__class__
        if found is self.dead:
            conn.__class__ = self._tended
        try:
            with Bound(self, deadline) as bound:
                yield bound
        finally:
            conn.__class__ = found

    def start_reset(self) -> bool:
        """Reset the session: one round trip, and waited for. False: could not; discard.

        psycopg2 cannot send without waiting; left to the next borrower, locks of this one would be
        held until somebody came.
        """
        try:
            clock = vars(self.real).get(LIMIT)
            seconds = RESET_SECONDS if clock is None else min(RESET_SECONDS, clock.limit.seconds)
            with self._tending(deadline_in(seconds)):
                self._roll_back()
            self._ask(self._reset or reset_message(self._login()), deadline_in(seconds))
        except psycopg2.Error:
            return False
        return self._settle()

    def _login(self) -> str:
        return str(RAW["info"].__get__(self.real).user)

    def finish_reset(self, seconds: float | None) -> bool:  # noqa: ARG002  the protocol's
        """Tell if `start_reset` left it clean; nothing is awaited."""
        return self._is_at_rest()

    # --- the end

    def hung_up(self) -> bool:
        """Whether the server ended the session, by a look at the socket."""
        try:
            if self.status() != UNKNOWN and wait(self.fd, READ, 0.0):
                # The first call swallows the server's last message without an error, the second
                # meets the end of the stream.
                RAW["poll"](self.real)
                RAW["poll"](self.real)
        except psycopg2.Error:
            return True
        return self.status() == UNKNOWN

    def close(self) -> None:
        """End the session politely. Never raises, never blocks.

        While a statement is under way, its lock would have to be waited for, and what it has not
        sent yet: then it is discarded.
        """
        self.touched.add(CLOSE)
        if self.status() == ACTIVE:
            self.discard()
            return
        with suppress(psycopg2.Error):
            RAW["close"](self.real)

    def discard(self) -> None:
        """Shut the socket down, and leave the memory to whoever still holds the connection."""
        try:
            duplicate = os.dup(self.fd)
        except OSError as error:
            if error.errno != errno.EBADF and self._holds_descriptor():  # no descriptor is left
                shut_down_without_duplicate(self.fd)
            return
        # Looked at after the dup: a connection that still has this number had it then, too.
        if self._holds_descriptor():
            shut_down(duplicate)
        else:
            os.close(duplicate)

    def abandon(self, *, busy: bool) -> None:
        """In a forked child: let go of the parent's session without a byte on the wire."""
        self.real.__class__ = self._inherited
        holds = self._holds_descriptor()
        # A child that ran no at-fork hooks may have closed the number and opened a file on it.
        ours = holds and self._is_same_socket()
        if ours:
            point_at_null(self.fd)
        if busy or (holds and not ours):
            GRAVEYARD.append((self.conn, self.real))
        else:
            RAW["close"](self.real)

    def _is_same_socket(self) -> bool:
        try:
            return os.fstat(self.fd).st_ino == self._inode
        except OSError:
            return False

    def _holds_descriptor(self) -> bool:
        try:
            return bool(RAW["fileno"](self.real) == self.fd)
        except psycopg2.Error:  # closed or broken: libpq has closed it
            return False


def _setting_text(value: object) -> str | None:
    """A setting's value as SET would take it; None for its default."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _detached(own: Any, query: Any, params: Any) -> Reply:
    """Execute by a cursor, read to the end and close it."""
    with own:
        own.execute(query, params)
        description = own.description
        return Reply(
            rows=None if description is None else own.fetchall(),
            rowcount=own.rowcount,
            description=description,
            statusmessage=own.statusmessage,
        )
