"""What a unit of work (a request, a message, a task) has borrowed on an event loop.

One job: as loans.py, for asyncio: borrow at first use, one connection per database, keep it for the
whole unit, end the transaction as told, and give back whatever happens.

It must not know: frameworks, ASGI, how drivers begin and end transactions (async_transactions.py). It
knows pools by `connection()`, and links by `activity()`.

No lock of threads: it runs on one loop. `AsyncLoans._turns` makes "look, then borrow" one step for the
tasks of one unit, by database; `on_first_use` and the tasks that it starts may use the connection
that it was given meanwhile, and any other database.

Cancellation can strike at every await. So what is ended is taken out of the books before the first
await of its end, and a lease that is told its end goes back in the background if its task is not
let wait for it. If nobody ends the unit, the lease falls with it, and comes home by itself (slot.py).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import weakref
from collections import defaultdict
from contextvars import ContextVar
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from penstock._machine.slot import Reason
from penstock._pool.procedures import GivenBack
from penstock._process.stacks import place_of_caller
from penstock.drivers import Activity
from penstock.errors import MisuseError
from penstock.integrations._unit.aio_transactions import AsyncpgShape, PsycopgShape
from penstock.integrations._unit.loans import note_place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Hooks = Sequence[Callable[[Any], object]]

_log = logging.getLogger("penstock.loans")

#: How long an answer waits for a statement that its own body has begun already, in seconds.
QUIET_SECONDS: Final = 1.0

#: What a statement in a failed transaction raises. asyncpg tells in no other way that it has failed.
_FAILED: Final = "25P02"

# One row if the transaction has written anything (or locked rows); since PostgreSQL 10.
_WROTE: Final = "select 1 where pg_catalog.txid_current_if_assigned() is not null"

# As many rows as `Written` says. The portal of this very statement has no name.
_WRITTEN: Final = (
    "with wrote as (select 1 where pg_catalog.txid_current_if_assigned() is not null) "
    "select 1 from wrote union all "
    "(select 1 from wrote, pg_catalog.pg_cursors where name <> '' and not is_holdable limit 1)"
)

#: The marks of the loans whose `on_first_use` this code is a part of, also in tasks that it started.
_equipping: ContextVar[tuple[object, ...]] = ContextVar("penstock_equipping", default=())


class Written(IntEnum):
    """What a commit would do to a transaction."""

    NO = 0  #: It has only read.
    YES = 1
    BESIDE_A_CURSOR = 2  #: It has written, and a commit would close a cursor that is open in it.


class AsyncLoan:
    """One borrowed connection, and what is known about its transaction.

    Attributes:
        abandoned: a body may stand in the middle of its transaction, and be closed when somebody else has
            the connection (a cursor of psycopg's sends CLOSE then): the session is ended at its end.
        commits_at_end: the answer has left its transaction open.
        conn: the driver's connection; None until it is borrowed.
        equipping: marks who runs `on_first_use` on it just now; None: nobody.
        failed: at its end, a statement of its transaction was found to have failed.
    """

    __slots__ = (
        "__weakref__",
        "_equipped",
        "_equipped_in_transaction",
        "_lease",
        "_over",
        "_pid",
        "_task",
        "abandoned",
        "commits_at_end",
        "conn",
        "equipping",
        "failed",
        "name",
        "shape",
    )

    def __init__(self, pool: Any, *, autocommit: bool) -> None:
        self.name: str = pool.name
        self.abandoned = False
        self.commits_at_end = False
        self.conn: Any = None
        self.equipping: object | None = None
        self.failed = False
        self.shape: PsycopgShape | AsyncpgShape
        self._pid = os.getpid()
        self._task: weakref.ref[asyncio.Task[Any]] | None = None
        self._over = False
        self._equipped = False
        self._equipped_in_transaction = False
        # None leaves it to the pool, which may be in autocommit by itself.
        self._lease = pool.connection(autocommit=True if autocommit else None)

    async def borrow(self, *, begins: bool) -> None:
        """Wait for the connection.

        Args:
            begins: whether transactions are to be begun on one that does not do so by itself.
        """
        conn = self.conn = await self._lease.__aenter__()
        note_place(self._lease, place_of_caller())
        by_itself = hasattr(conn, "commit") and hasattr(conn, "rollback")
        self.shape = PsycopgShape(conn) if by_itself else AsyncpgShape(conn, begins=begins)

    def activity(self) -> Activity:
        """What the session is doing, without asking the server."""
        if self._over or self._pid != os.getpid():  # after a fork the session is the parent's
            return Activity.BROKEN
        found: Activity = self._lease._slot.link.activity()  # noqa: SLF001  it knows without a word
        return found

    def is_asked_for(self) -> None:
        """Remember who did."""
        task = asyncio.current_task()
        self._task = None if task is None else weakref.ref(task)

    def is_in_other_hands(self) -> bool:
        """Whether the task that asked for it last is another than this one, and goes on beside it."""
        task = None if self._task is None else self._task()
        return task is not None and task is not asyncio.current_task() and not task.done()

    async def quiet_down(self) -> None:
        """Wait for a statement that is under way, but not for long: it may wait for us."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + QUIET_SECONDS
        while self.activity() is Activity.ACTIVE and loop.time() < deadline:  # noqa: ASYNC110  no event
            await asyncio.sleep(0.001)

    def is_spent(self) -> bool:
        """Whether another connection may take its place: no transaction is lost with it.

        A session that broke in the middle of a transaction is kept. Its holder gets the driver's
        error again until he rolls back: going on elsewhere would commit the second half alone.
        """
        if self._over or self._pid != os.getpid():
            return True
        activity = self.activity()
        if activity is Activity.BROKEN:
            return self.shape.loses_nothing()
        return activity is Activity.IDLE and self._has_hung_up()

    def _has_hung_up(self) -> bool:
        slot = getattr(self._lease, "_slot", None)
        return slot is not None and slot.condemned is Reason.HUNG_UP

    def is_ready(self, hooks: Hooks) -> bool:
        """Whether the connection may be used as it is."""
        return (
            not self.is_spent()
            and self.equipping is None
            and not (hooks and self._wants_equipment())
            and not self.shape.wants_begin(self.activity())
        )

    async def equip(self, hooks: Hooks) -> None:
        """Begin, and run `on_first_use`, once; again when its transaction has ended.

        What it set for that transaction only (`set_config(..., true)`) has ended, too.
        """
        if self.shape.wants_begin(self.activity()):
            await self.shape.begin()
        if not hooks or not self._wants_equipment():
            return
        mark = self.equipping = object()  # a hook may use the unit's connection
        token = _equipping.set((*_equipping.get(), mark))
        try:
            for hook in hooks:
                answer = hook(self.conn)
                if inspect.isawaitable(answer):
                    await answer
        finally:
            _equipping.reset(token)
            self.equipping = None
        self._equipped = True
        self._equipped_in_transaction = self.activity() is Activity.IN_TRANSACTION

    def _wants_equipment(self) -> bool:
        if not self._equipped:
            return True
        return self._equipped_in_transaction and self.activity() is Activity.IDLE

    async def commit(self) -> bool:
        """Commit.

        Returns:
            False: a statement had failed, and everything is rolled back.

        Raises:
            Exception: the driver's errors.
        """
        self._equipped = self._equipped and not self._equipped_in_transaction
        if self.activity() is Activity.IN_FAILED_TRANSACTION:
            await self.shape.roll_back()
            return False
        return await self.shape.commit()

    async def roll_back(self) -> None:
        """Roll back what is open; a lost session is given back, so that another one is borrowed."""
        self._equipped = self._equipped and not self._equipped_in_transaction
        activity = self.activity()
        if activity is Activity.BROKEN:
            await self.give_back(None)
        elif activity is not Activity.IDLE:
            await self.shape.roll_back()

    async def written(self) -> Written:
        """Whether the transaction that is open has anything to commit, or to lose. One round trip."""
        try:
            return Written(await self.shape.count(_WRITTEN))
        except Exception as error:
            if _says_failed(error):
                return Written.YES
            raise

    async def give_back(self, error: BaseException | None) -> bool:
        """End it: roll back what is open, and return the connection. Does nothing the second time.

        Args:
            error: what ended the unit of work, or None.

        Returns:
            Whether work was lost that no error tells about.
        """
        if self._over:
            return False
        lost = False
        if self.abandoned and self.activity() not in {Activity.IDLE, Activity.BROKEN}:
            self._lease._slot.link.discard()  # noqa: SLF001  the server rolls back
        try:
            lost = error is None and await self._roll_back_asking()
            clean = self.activity() is Activity.IDLE
            cause = None if clean else GivenBack() if error is None else error
        except BaseException as cut_off:
            await self._return(cut_off)
            raise
        await self._return(cause)
        return lost

    async def _return(self, cause: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        await self._lease.__aexit__(type(cause) if cause else None, cause, None)

    async def _roll_back_asking(self) -> bool:
        activity = self.activity()
        self.failed = activity is Activity.IN_FAILED_TRANSACTION
        if activity is not Activity.IN_TRANSACTION:
            return False
        if not _log.isEnabledFor(logging.WARNING):
            return False
        try:
            return await self.shape.roll_back_asking(_WROTE)
        except Exception as error:  # noqa: BLE001  then the pool rolls back, or closes it
            self.failed = _says_failed(error)
            return False


class AsyncLoans:
    """What one unit of work has borrowed, by database.

    Args:
        where: names the unit in warnings, when one is due: "POST /orders (shop.add)".

    Attributes:
        answered: how it ended, for the same warnings; "" if it is not known.
        refused: it ended with an error that somebody was told of.
        over: why nothing can be borrowed any more, as an error; None while it can.
        cut_off: a body that streams has not come to its end, and may never.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self.where = where
        self.answered = ""
        self.refused = False
        self.cut_off = False
        self.over: Callable[[], MisuseError] | None = None
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._open: dict[str, AsyncLoan] = {}

    async def borrow(
        self, key: str, pool: Any, hooks: Hooks = (), *, autocommit: bool = False
    ) -> AsyncLoan:
        """Give the loan of a database: the one that is there, or a new one.

        Raises:
            MisuseError: the unit is over.
            PenstockError: as `pool.connection()`.
            Exception: what a hook raises. The connection is given back; the next call tries anew.
        """
        if self.over is not None:
            raise self.over()
        loan = self._open.get(key)
        if loan is None or not (loan.is_ready(hooks) or _runs_hooks_of(loan)):
            async with self._turns[key]:
                loan = await self._borrow(key, pool, hooks, autocommit=autocommit)
        loan.is_asked_for()
        return loan

    async def _borrow(self, key: str, pool: Any, hooks: Hooks, *, autocommit: bool) -> AsyncLoan:
        loan = self._open.get(key)
        if loan is not None and loan.is_spent():
            await self._drop(key, loan, None)
            loan = None
        if loan is None:
            loan = await self._borrow_new(key, pool, autocommit=autocommit)
        try:
            await loan.equip(hooks)
        except BaseException as error:
            await self._drop(key, loan, error)
            raise
        return loan

    async def _borrow_new(self, key: str, pool: Any, *, autocommit: bool) -> AsyncLoan:
        loan = AsyncLoan(pool, autocommit=autocommit)
        await loan.borrow(begins=not autocommit and not begins_nothing(pool))
        if self.over is not None:  # it ended while this task waited
            await loan.give_back(GivenBack())
            raise self.over()
        self._open[key] = loan
        return loan

    async def commit(self, key: str) -> None:
        """Commit one database's transaction, if there is one.

        Raises:
            MisuseError: a statement of it had failed. The server answers such a COMMIT with a
                rollback, and drivers do not tell.
            Exception: the driver's errors.
        """
        loan = self._open.get(key)
        if loan is None:
            return
        committed = await loan.commit()
        await self._go_on(loan)
        if not committed:
            raise MisuseError(
                "commit of a transaction in which a statement failed: it was rolled back",
                pool=loan.name,
                next_step="run what may fail inside `async with conn.transaction():`, which rolls "
                "back to where it began",
            )

    async def roll_back(self, key: str) -> None:
        """Roll one database's transaction back. A connection that was lost is replaced later."""
        loan = self._open.get(key)
        if loan is not None:
            await loan.roll_back()
            await self._go_on(loan)

    @staticmethod
    async def _go_on(loan: AsyncLoan) -> None:
        """Begin anew: a variable may hold the connection, and would commit each statement by itself."""
        if loan.shape.wants_begin(loan.activity()):
            await loan.shape.begin()

    async def _drop(self, key: str, loan: AsyncLoan, error: BaseException | None) -> None:
        if self._open.get(key) is loan:
            del self._open[key]
        await loan.give_back(error)

    # -- the answer -------------------------------------------------------------------------------

    async def commit_all(self, *, streams: bool = False) -> None:
        """Commit every database's transaction, one after the other.

        One in which a statement failed is rolled back, with a warning. One that has only read stays
        open to the unit's end, and is committed there, if a body may go on in it: where the answer
        streams, or another task goes on with it (Starlette's BaseHTTPMiddleware makes tasks).

        Args:
            streams: the answer's body may come in chunks, and may have begun already.

        Raises:
            MisuseError: a statement is still under way, or a commit would end the cursor of a body
                that has begun. Nothing is committed.
            Exception: the driver's errors. The databases after that are not committed.
        """
        due = [loan for loan in list(self._open.values()) if await self._is_due(loan, streams)]
        for loan in due:
            # Raises if the session was lost with its transaction.
            if not loan.is_spent() and not await loan.commit():
                self._warn(
                    loan, "a statement failed and the transaction went on without a rollback"
                )

    async def _is_due(self, loan: AsyncLoan, streams: bool) -> bool:
        """Whether its transaction is to be committed now."""
        shared = loan.is_in_other_hands()
        if shared:
            await loan.quiet_down()
        activity = loan.activity()
        if (shared or streams) and activity is Activity.IN_TRANSACTION:
            written = await loan.written()
            if written is Written.BESIDE_A_CURSOR:
                loan.abandoned = True
                raise self._would_close_a_cursor(loan)
            loan.commits_at_end = not written
            return bool(written)
        if activity is Activity.ACTIVE:
            raise MisuseError(
                f"{self.where()} was answered while a statement of its own is under way (in a task, "
                "a COPY or a stream() that was not read to its end): nothing was committed",
                pool=loan.name,
                next_step="await it first; a task that outlives the answer works in "
                "`async with db.unit():`; a body that reads from a stream() needs db.middleware "
                "inside of what holds the answer's start back (compression, say)",
            )
        return activity is not Activity.IDLE

    def _would_close_a_cursor(self, loan: AsyncLoan) -> MisuseError:
        return MisuseError(
            f"{self.where()} has written, and its answer's body has begun to read from a cursor of the "
            "same transaction before the answer arrived here: a commit would close the cursor, so "
            "nothing was committed",
            pool=loan.name,
            next_step="await db.commit() before the stream is returned; or put db.middleware inside of "
            "the middleware that holds answers back until their first chunk (compression, say): "
            "there the commit comes before the body begins",
        )

    # -- the end ----------------------------------------------------------------------------------

    async def give_back(self, key: str) -> None:
        """Give back one database's connection; the next use borrows anew."""
        loan = self._open.pop(key, None)
        if loan is not None:
            await self._give_back(loan, None)

    async def give_all_back(self, error: BaseException | None) -> None:
        """Roll back what is open and give everything back. More may be borrowed afterwards.

        Args:
            error: what ended the unit; None: nothing did.
        """
        first: BaseException | None = None
        while self._open:
            _, loan = self._open.popitem()
            try:
                await self._give_back(loan, first or error)
            except BaseException as cut_off:  # noqa: BLE001  the others must come back, too
                first = first or cut_off
        if first is not None:
            raise first

    async def end(self, error: BaseException | None, over: Callable[[], MisuseError]) -> None:
        """Give everything back, and lend nothing any more.

        Args:
            error: as `give_all_back`.
            over: makes the error that whoever asks from now on gets.
        """
        self.over = over
        await self.give_all_back(error)

    async def _give_back(self, loan: AsyncLoan, error: BaseException | None) -> None:
        loan.abandoned = loan.abandoned or self.cut_off
        if error is None and loan.commits_at_end and loan.activity() is Activity.IN_TRANSACTION:
            try:
                # What the body has written itself, it commits itself.
                if not await loan.written():
                    await loan.commit()  # there may be a NOTIFY
            except BaseException as failure:
                await loan.give_back(failure)
                raise
        try:
            if await loan.give_back(error) or (loan.failed and not self.refused):
                self._warn(loan, "nobody committed it")
        except Exception:  # noqa: BLE001  the others must come back, too
            # This one does by itself, once nobody holds it.
            _log.exception("%s: giving back to pool %r failed", self.where(), loan.name)

    def _warn(self, loan: AsyncLoan, why: str) -> None:
        _log.warning(
            "%s%s: uncommitted work on pool %r was thrown away: %s. Commit it; or say by a "
            "rollback() that this is meant.",
            self.where(),
            self.answered,
            loan.name,
            why,
        )


def begins_nothing(pool: Any) -> bool:
    """Whether the pool's own option says that each statement commits itself."""
    return bool(pool._config.autocommit)  # noqa: SLF001  a pool does not tell it otherwise


def _runs_hooks_of(loan: AsyncLoan) -> bool:
    return loan.equipping is not None and loan.equipping in _equipping.get()


def _says_failed(error: Exception) -> bool:
    return getattr(error, "sqlstate", None) == _FAILED
