"""What a unit of work (a request, a command) has borrowed: one connection per database, at most.

One job: borrow at first use, keep for the whole unit, end the transaction as told, and give back
whatever happens. Frameworks say where a unit begins and ends; this file says what follows.

It must not know: frameworks, settings, responses. It knows pools by `connection()`, and connections
by what psycopg and psycopg2 have in common (`info.transaction_status`, `autocommit`, `broken`, which
penstock's psycopg2 connections have, `commit`, `rollback`); `execute` below hides the one difference.

Lock: `Loans._lock` makes "look, then borrow" one step, for units that several threads work on (an
async view's, a copied context's). It is held while the pool is waited for and while `on_first_use`
runs, by one unit against itself only. It is an RLock since `on_first_use` may use the unit's
connection.

Two nets. `Loans.end` is called by whoever runs the unit. If that never comes, the lease falls with
its unit, and what nobody holds comes home to its pool by itself (slot.py), closed and replaced.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet, WeakValueDictionary

from penstock._machine.slot import Reason
from penstock._pool.procedures import GivenBack
from penstock._process import runtime
from penstock._process.lock import Lock
from penstock._process.stacks import place_of_caller
from penstock.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock._pool.sync.pool import ConnectionPool

    Hooks = Sequence[Callable[[Any], object]]

_log = logging.getLogger("penstock.loans")

#: `conn.info.transaction_status`: libpq's numbers.
IDLE: Final = 0
ACTIVE: Final = 1
IN_TRANSACTION: Final = 2
FAILED: Final = 3
UNKNOWN: Final = 4  # the session is gone

# One row if the transaction has written anything (or locked rows); since PostgreSQL 10.
_WROTE: Final = "select 1 where pg_catalog.txid_current_if_assigned() is not null"


def execute(conn: Any, query: Any, params: Any = None) -> Any:
    """What psycopg's ``conn.execute`` does, on psycopg2's connections, too, which have none."""
    if hasattr(conn, "execute"):
        return conn.execute(query, params)
    cursor = conn.cursor()
    cursor.execute(query, params)
    return cursor


def note_place(lease: Any, place: tuple[str, int] | None) -> None:
    """Remember where a connection was borrowed, for the error of a unit that asks for a second one."""
    if place is not None and getattr(lease, "_slot", None) is not None:
        lease._slot.place = (lease._slot.borrowed_at, *place)  # noqa: SLF001  plain leases note none


class Loan:
    """One borrowed connection, and what is known about its transaction.

    Attributes:
        conn: the driver's connection.
        streams: the response bodies that want it kept after the request.
    """

    __slots__ = (
        "__weakref__",
        "_equipped",
        "_equipping",
        "_has_pgconn",
        "_in_transaction",
        "_lease",
        "_over",
        "_pid",
        "conn",
        "name",
        "streams",
    )

    def __init__(
        self, pool: ConnectionPool[Any], *, autocommit: bool, place: tuple[str, int] | None = None
    ) -> None:
        self.name = pool.name
        self.streams: WeakSet[Any] | tuple[()] = ()  # made for the first one
        self._pid = os.getpid()
        self._over = False
        self._equipped = False
        self._equipping = False
        self._in_transaction = False
        # None leaves it to the pool, which may be in autocommit by itself. A lease with an option costs
        # twice as much as one without, and does nothing more on a pool that asks for nothing more.
        plain = pool._plain  # noqa: SLF001
        self._lease = pool.connection(autocommit=True if autocommit and not plain else None)
        self.conn: Any = self._lease.__enter__()
        self._has_pgconn = hasattr(self.conn, "pgconn")
        if autocommit and plain:
            self._set_autocommit()
        note_place(self._lease, place or place_of_caller())

    def _set_autocommit(self) -> None:
        slot = getattr(self._lease, "_slot", None)
        try:
            if slot is not None and not self.conn.autocommit:
                slot.link.set_autocommit(True)
        except BaseException as error:
            slot = None  # this frame is kept by the error
            self._lease.__exit__(type(error), error, None)
            raise

    def keep_for(self, stream: object) -> None:
        """A response body wants it after the request."""
        if not isinstance(self.streams, WeakSet):
            self.streams = WeakSet()
        self.streams.add(stream)

    def keeps_for(self, stream: object) -> bool:
        """A response body wants it no longer; whether others do."""
        if isinstance(self.streams, WeakSet):
            self.streams.discard(stream)
        return bool(self.streams)

    def status(self) -> int:
        """What the session is doing, without asking the server."""
        if self._over or self._pid != os.getpid():  # after a fork the session is the parent's
            return UNKNOWN
        if self._has_pgconn:  # psycopg's `info` makes an object each time
            return int(self.conn.pgconn.transaction_status)
        return int(self.conn.info.transaction_status)

    def is_spent(self) -> bool:
        """Whether another connection may take its place: no transaction is lost with it.

        A session that broke in the middle of a transaction is kept. Its holder gets the driver's
        error again until he rolls back: going on elsewhere would commit the second half alone.
        """
        if self._over or self._pid != os.getpid():
            return True
        status = self.status()
        if status == UNKNOWN:
            closed_by_user = not getattr(self.conn, "broken", True)
            return closed_by_user or bool(self.conn.autocommit)
        return status == IDLE and self._has_hung_up()

    def _has_hung_up(self) -> bool:
        slot = getattr(self._lease, "_slot", None)
        return slot is not None and slot.condemned is Reason.HUNG_UP

    def equip(self, hooks: Hooks) -> None:
        """Run `on_first_use`, once; again when the transaction that it was run in has ended.

        What it set for that transaction only (`set_config(..., true)`) has ended, too.
        """
        if self._equipping or not hooks or not self._wants_equipment():
            return
        self._equipping = True  # a hook that uses the unit's connection gets it as it is
        try:
            for hook in hooks:
                hook(self.conn)
        finally:
            self._equipping = False
        self._equipped = True
        self._in_transaction = self.status() == IN_TRANSACTION

    def _wants_equipment(self) -> bool:
        return not self._equipped or (self._in_transaction and self.status() == IDLE)

    def commit(self) -> None:
        """Commit.

        Raises:
            MisuseError: a statement failed and nobody rolled back. The server would answer a
                COMMIT with a rollback, and a driver would not tell.
            Exception: the driver's errors.
        """
        if self.status() == FAILED:
            raise MisuseError(
                "commit of a transaction in which a statement failed",
                pool=self.name,
                next_step="roll back first, or run what may fail inside `with "
                "conn.transaction():`, which rolls back to where it began",
            )
        self.conn.commit()

    def roll_back(self) -> None:
        """Roll back what is open; a lost session is given back, so that another one is borrowed."""
        status = self.status()
        if status == UNKNOWN:
            self.give_back(None)
        elif status != IDLE:
            self.conn.rollback()

    def has_written(self) -> bool:
        """Whether the transaction that is open has anything to commit. One round trip."""
        return self._ask_wrote(_WROTE)

    def give_back(self, error: BaseException | None) -> bool:
        """End it: roll back what is open, and return the connection. Does nothing the second time.

        Args:
            error: what ended the unit of work, or None.

        Returns:
            Whether work was lost that no error tells about.
        """
        if self._over:
            return False
        status, lost = self.status(), False
        if status == IN_TRANSACTION and error is None:
            lost = self._roll_back_asking()
            status = self.status()
        if self._over:  # another thread of the unit has, meanwhile
            return False
        self._over = True
        cause = None if status == IDLE else GivenBack() if error is None else error
        self._lease.__exit__(type(cause) if cause else None, cause, None)
        return lost

    def _roll_back_asking(self) -> bool:
        if not _log.isEnabledFor(logging.WARNING):
            return False
        # In one message: as dear as the rollback alone. psycopg2 shows the last answer only; its
        # transaction is rolled back by the pool.
        query = f"{_WROTE}; rollback" if hasattr(self.conn, "execute") else _WROTE
        try:
            return self._ask_wrote(query)
        except Exception:  # noqa: BLE001  then the pool rolls back, or closes it
            return False

    def _ask_wrote(self, query: str) -> bool:
        # Not by `execute`: psycopg would prepare it after a few times.
        options = {"prepare": False} if hasattr(self.conn, "execute") else {}
        cursor = self.conn.cursor()
        cursor.execute(query, **options)
        return bool(cursor.rowcount)


class Loans:
    """What one unit of work has borrowed, by database.

    Attributes:
        where: names the unit in warnings: "POST /orders (endpoint 'shop.order')".
        answered: how it ended, for the same warnings; "" if it is not known.
        refused: it ended with an error that somebody was told of.
    """

    def __init__(self, where: str | Callable[[], str]) -> None:
        self._where = where
        self.answered = ""
        self.refused = False
        # A unit waits for a connection while it has this: on gevent it is a lock that lets others run.
        self._lock: Any = threading.RLock() if runtime.is_green() else Lock()
        self._open: dict[str, Loan] = {}
        # Those that only their stream keeps, after the request.
        self._streamed: WeakValueDictionary[str, Loan] | dict[str, Loan] = {}  # made for the first

    @property
    def where(self) -> str:
        return self._where if isinstance(self._where, str) else self._where()

    def borrow(
        self,
        key: str,
        pool: ConnectionPool[Any],
        hooks: Hooks = (),
        *,
        autocommit: bool = False,
        place: tuple[str, int] | None = None,
    ) -> Loan:
        """Give the loan of a database: the one that is there, or a new one.

        `place`: whose connection it is (file, line), where that code does not call.

        Raises:
            PenstockError: as `pool.connection()`.
            Exception: what a hook raises. The connection is given back; the next call tries anew.
        """
        with self._lock:
            loan = self.get(key)
            if loan is not None and loan.is_spent():
                self._drop(key, loan, None)
                loan = None
            if loan is None:
                loan = self._open[key] = Loan(pool, autocommit=autocommit, place=place)
            try:
                loan.equip(hooks)
            except BaseException as error:
                self._drop(key, loan, error)
                raise
            return loan

    def get(self, key: str) -> Loan | None:
        """Give the loan of a database, if there is one."""
        return self._open.get(key) or self._streamed.get(key)

    def _drop(self, key: str, loan: Loan, error: BaseException | None) -> None:
        self._open.pop(key, None)
        self._streamed.pop(key, None)
        loan.give_back(error)

    # -- the answer -------------------------------------------------------------------------------

    def commit_all(self) -> None:
        """Commit every database's transaction, one after the other.

        A transaction that has only read and that a stream wants is left open: a stream may read
        from a server-side cursor that is in it. One in which a statement failed is rolled back,
        with a warning.

        Raises:
            MisuseError: a statement is still under way.
            Exception: the driver's errors. The databases after that are not committed.
        """
        for loan in list(self._open.values()):
            self._commit(loan)

    def _commit(self, loan: Loan) -> None:
        status = loan.status()
        if status == FAILED:
            loan.roll_back()
            self._warn(loan, "a statement failed and the transaction went on without a rollback")
        elif status == ACTIVE and not loan.streams:
            raise MisuseError(
                f"{self.where} ended while a statement of its own is under way (a COPY or a "
                "stream() that was not read to its end): nothing was committed",
                pool=loan.name,
                next_step="read or close it first, or answer with a stream of it",
            )
        elif status == IN_TRANSACTION and not (loan.streams and not loan.has_written()):
            loan.conn.commit()
        elif status == UNKNOWN and not loan.is_spent():
            loan.commit()  # raises: the session was lost with its transaction

    def drop_streams(self) -> None:
        """No stream was answered: whatever was made for one is not kept."""
        for loan in list(self._open.values()):
            loan.streams = ()

    def close_streams(self) -> None:
        """A stream was answered, and nobody will read or close it."""
        for loan in list(self._open.values()):
            for stream in list(loan.streams):
                stream.close()

    # -- the end ----------------------------------------------------------------------------------

    def end(self, error: BaseException | None) -> None:
        """Roll back what is open and give everything back, but for what a stream keeps.

        May be called any number of times; in between, more may be borrowed.

        Args:
            error: what ended the unit; None: nothing did. With an error streams keep nothing.
        """
        for key in list(self._open):
            with self._lock:
                loan = self._open.pop(key, None)
            if loan is None:
                continue
            if error is None and loan.streams:
                if not self._streamed:
                    self._streamed = WeakValueDictionary()
                self._streamed[key] = loan
            else:
                self._give_back(loan, error)

    def end_stream(self, key: str, loan: Loan, stream: object, error: BaseException | None) -> None:
        """A stream has ended: give back what only it has kept."""
        with self._lock:
            if loan.keeps_for(stream) or self._open.get(key) is loan:
                return
            self._streamed.pop(key, None)
        self._give_back(loan, error)

    def _give_back(self, loan: Loan, error: BaseException | None) -> None:
        failed = error is None and not self.refused and loan.status() == FAILED
        try:
            if loan.give_back(error) or failed:
                self._warn(loan, "nobody committed it")
        except Exception:  # noqa: BLE001  the others must come back, too
            # This one does by itself, once nobody holds it.
            _log.exception("%s: giving back to pool %r failed", self.where, loan.name)

    def _warn(self, loan: Loan, why: str) -> None:
        _log.warning(
            "%s%s: uncommitted work on pool %r was thrown away: %s. Commit it; or say by a "
            "rollback() that this is meant.",
            self.where,
            self.answered,
            loan.name,
            why,
        )
