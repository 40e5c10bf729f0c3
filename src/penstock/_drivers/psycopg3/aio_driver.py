"""The driver for psycopg 3 (3.2.1 and newer), asyncio connections.

It must not know: pools, slots, leases, waiters, limits. Every wait of its own is for the descriptor, on
the running loop, up to a deadline; what psycopg runs for its user is the user's to bound.

A cancellation is heard at every wait, at once, and leaves the session as it is: what was sent goes on at
the server, `activity` says ACTIVE, and the link remembers whether the reply that is to come is to
something of its own (a COMMIT, a ROLLBACK, a reset: `tidy` reads it) or to the borrower's statement
(`tidy` has the server cancel it first).

What needs no waiting is in `psycopg3_link`, for this driver and the one for threads.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus

from penstock._drivers.adopting import awaited
from penstock._drivers.blocking_calls import call_aside
from penstock._drivers.loop_wait import stop_awaiting
from penstock._drivers.psycopg3 import adopt as adoption
from penstock._drivers.psycopg3 import connect as connecting
from penstock._drivers.psycopg3.aio_cancellation import in_front_of
from penstock._drivers.psycopg3.aio_connect import connect
from penstock._drivers.psycopg3.aio_exchange import (
    ASKED_TO_CANCEL,
    CUT_OFF,
    ask_to_cancel,
    read_answers,
    stop_statement,
)
from penstock._drivers.psycopg3.diagnose import diagnosis_at_hand, diagnosis_by_trying, one_line
from penstock._drivers.psycopg3.exchange import all_done, send
from penstock._drivers.psycopg3.guard import Settings
from penstock._drivers.psycopg3.link import (
    PgconnLink,
    PsycopgDriver,
    check_interval_query,
    check_set_up,
    connection_over,
    settings_statement,
)
from penstock._drivers.psycopg3.outdated import failed_at_bind
from penstock._drivers.psycopg3.session_reset import LEARN
from penstock._drivers.psycopg3.statement_limit import LIMIT, AsyncLimitsStatements, end_awaited
from penstock._process import inflight
from penstock._process.sockets import deadline_in, seconds_to
from penstock.drivers import Diagnosis, NotAdopted, Recipe, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from psycopg.pq.abc import PGconn, PGresult

    from penstock._drivers.adopting import OwnConnect
    from penstock.drivers import StatementLimit


class AsyncPsycopg3Link(PgconnLink):
    """One asyncio psycopg connection, used on one event loop only."""

    # _heard: what came of the answer to something of ours that is under way; None: nothing is.
    # _resetting: that is a reset, and must succeed.
    __slots__ = ("_heard", "_resetting")

    conn: psycopg.AsyncConnection[Any]

    def __init__(
        self,
        conn: psycopg.AsyncConnection[Any],
        handle: PGconn,
        touched: set[str],
        *,
        resets_session: bool,
    ) -> None:
        super().__init__(conn, handle, touched, resets_session=resets_session)
        self._heard: list[PGresult] | None = None
        self._resetting = False

    # --- one exchange of ours

    def _send(self, message: bytes) -> list[PGresult]:
        send(self.handle, message)
        heard: list[PGresult] = []
        self._heard = heard
        return heard

    async def _answered(self, deadline: float) -> list[PGresult] | None:
        """Every result of what is under way; None if they are not complete in time.

        Cancelled, it can be called again.
        """
        heard = [] if self._heard is None else self._heard
        if not await read_answers(self.handle, self.fd, heard, deadline):
            return None
        self._heard = None
        return heard

    async def _ask(self, message: bytes, deadline: float) -> list[PGresult] | None:
        self._send(message)
        return await self._answered(deadline)

    # --- with the server

    async def prepare(self, seconds: float | None = None) -> None:
        """Remember the settings as they are now as those to go back to.

        With ``reset="session"`` one round trip learns what `configure` set on the server. It does not
        see custom settings (``app.tenant``), nor are temporary tables made again.

        Raises:
            psycopg.OperationalError: the server did not answer that question, or not in time.
        """
        self._settings = Settings(self.real)
        if self._reset is not None:
            self._learn(await self._ask(LEARN, deadline_in(seconds)))

    async def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit: one round trip. The connection must be lent.

        Of several statements in one string the answer to the first is returned, which is what a
        psycopg cursor shows first; an error in any of them raises. One that failed before it began, since what
        psycopg had prepared is of an older schema, is asked once more, unprepared. Cancelled, it ends at once,
        and the statement goes on at the server until `tidy`.

        Raises:
            psycopg.ProgrammingError: a transaction is open.
            psycopg.Error: whatever the statement raises.
        """
        self._refuse_if_busy("execute in autocommit")
        attributes = self.attributes
        autocommit = attributes["_autocommit"]
        try:
            attributes["_autocommit"] = True
            try:
                return await _detached(await self._executed(query, params))
            except psycopg.Error as error:
                if not failed_at_bind(self.real, error, query, params):
                    raise
            return await _detached(await self._executed(query, params, prepare=False))
        finally:
            attributes["_autocommit"] = autocommit

    async def _executed(self, query: Any, params: Any, **how: Any) -> psycopg.AsyncCursor[Any]:
        if self.conn is self.real:
            return await self.real.execute(query, params, **how)
        cursor: psycopg.AsyncCursor[Any] = (
            self.conn.cursor()
        )  # which is what all proxies of tracers trace
        await cursor.execute(query, params, **how)
        return cursor

    async def begin(self) -> None:
        """See to it that this borrow is not in autocommit: psycopg then begins by itself."""
        if self.handle.transaction_status == TransactionStatus.IDLE:
            self.set_autocommit(False)

    async def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction, which this begins if none is open.

        One round trip, two if it begins the transaction. The connection must be lent. A value of
        None means the parameter's default.

        Raises:
            psycopg.Error: the server refused one; none is set, and the transaction has failed.
        """
        if not settings:
            return
        conn = self.real
        if begin := self._begin_first():
            await conn.execute(begin)
        # psycopg's own cursor: the user's may have other placeholders.
        async with psycopg.AsyncCursor(conn) as cursor:
            await cursor.execute(*settings_statement(settings), prepare=False)

    async def commit(self) -> None:
        """Commit if a transaction is open. The connection must be lent.

        COMMIT is sent before the first wait. Cancelled, it goes on at the server, and `tidy` reads the
        answer. (What psycopg must do itself, it does: in pipeline mode, after a statement that was cut off,
        and where it refuses.)

        Raises:
            psycopg.Error: the server's, or the session broke and took a transaction with it.
        """
        if self._has_nothing_to_commit():
            return
        conn = self.real
        attributes = self.attributes
        if (
            attributes["_num_transactions"]
            or attributes["_tpc"]
            or attributes["_pipeline"]
            or CUT_OFF in self.touched
            or type(conn).commit is not psycopg.AsyncConnection.commit
            or conn is not self.conn
        ):
            await self.conn.commit()
            return
        async with conn.lock:  # waits only for a statement of another task, as psycopg does
            conn._check_connection_ok()  # noqa: SLF001
            if self.handle.transaction_status != TransactionStatus.IDLE:
                await self._commit()

    async def _commit(self) -> None:
        heard = self._send(b"COMMIT")
        limit: StatementLimit | None = self.attributes.get(LIMIT)
        seconds = None if limit is None else limit.seconds
        try:
            answer = await self._answered(deadline_in(seconds))
        except psycopg.OperationalError:
            _raise_first(self.handle, heard)  # what the server said before it hung up
            raise
        _raise_first(self.handle, heard)
        if answer is None and limit is not None:
            end_awaited(self.handle)
            raise limit.given_up()

    async def tidy(self, seconds: float | None) -> bool:
        """Read what is pending, roll back, restore client-side settings; within `seconds`.

        A reply to a statement of the borrower is not waited for: the server is asked to cancel it. False,
        and the link is good for `discard` only: broken, not in time, a COPY under way, or somebody is
        still inside a ``transaction()``, ``pipeline()`` or ``notifies()`` of it, or in a statement in
        another task.
        """
        if ASKED_TO_CANCEL in self.touched or self._is_inside_block():
            return False
        deadline = deadline_in(seconds)
        try:
            return (
                await self._has_read(deadline)
                and await self._left_pipeline(deadline)
                and await self._rolled_back(deadline)
                and self._settle()
            )
        except psycopg.Error:
            return False

    async def _has_read(self, deadline: float) -> bool:
        """Whether nothing is pending any more, and a reset that was has succeeded."""
        handle = self.handle
        if handle.transaction_status != TransactionStatus.ACTIVE:
            return True
        if handle.pipeline_status != PipelineStatus.OFF:
            # Leaving it reads the answers.
            return self._heard is not None or await ask_to_cancel(handle, self.touched, deadline)
        if self._heard is None:
            return await stop_statement(handle, self.fd, self.touched, deadline)
        results = await self._answered(deadline)
        if results is None or not self._resetting:
            return results is not None
        self._resetting = False
        self._forget_notifications()
        return all_done(results)

    async def _left_pipeline(self, deadline: float) -> bool:
        handle = self.handle
        if handle.pipeline_status == PipelineStatus.OFF:
            return True
        handle.pipeline_sync()
        # Results come one per get_result(), each statement's ended by a None, up to the sync's.
        for _ in range(10_000):
            self._heard = []
            results = await self._answered(deadline)
            if results is None:
                return False
            if any(result.status == ExecStatus.PIPELINE_SYNC for result in results):
                break
        handle.exit_pipeline_mode()
        return True

    async def _rolled_back(self, deadline: float) -> bool:
        status = self.handle.transaction_status
        if status == TransactionStatus.IDLE:
            return True
        if status not in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            return False
        return all_done(await self._ask(self._rollback(), deadline))

    async def ping(self, seconds: float | None) -> bool:
        """One round trip with an empty query. False if dead or not answered in time."""
        return await self._says(b"", seconds)

    async def forget(self, seconds: float | None) -> bool:
        """A ping after which neither psycopg nor the server knows a statement that psycopg prepared."""
        return await self._says(self._forgetting(), seconds)

    async def _says(self, message: bytes, seconds: float | None) -> bool:
        try:
            return all_done(await self._ask(message, deadline_in(seconds)))
        except psycopg.Error:
            return False

    def start_reset(self) -> bool:
        """Send the session reset without waiting. False: could not; discard."""
        if not super().start_reset():
            return False
        self._heard = []
        self._resetting = True
        return True

    async def finish_reset(self, seconds: float | None) -> bool:
        """Read the answer to `start_reset`. False: not clean, or not in time; discard."""
        try:
            self.handle.consume_input()
            if not all_done(await self._answered(deadline_in(seconds))):
                return False
        except psycopg.Error:
            return False
        self._resetting = False
        self._forget_notifications()
        return self._settle()

    # --- the end

    def on_end(self, tell: Callable[[], object]) -> bool:  # noqa: ARG002
        """Say False: psycopg does not tell; the pool watches `fd`."""
        return False

    async def close(self) -> None:
        """End the session politely. Never raises, never waits: the handle is non-blocking.

        It needs no running loop.
        """
        if self._holds_descriptor():
            # A loop that still knew the number would mistake its next owner's socket for this one.
            stop_awaiting(self.fd)
        self._finish()


def _raise_first(handle: PGconn, results: list[PGresult]) -> None:
    """Raise the first error among the results."""
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding=handle._encoding)  # noqa: SLF001


async def _detached(cursor: psycopg.AsyncCursor[Any]) -> Reply:
    description = cursor.description
    reply = Reply(
        rows=None if description is None else await cursor.fetchall(),
        rowcount=cursor.rowcount,
        description=description,
        statusmessage=cursor.statusmessage,
    )
    await cursor.close()
    return reply


class AsyncPsycopg3Driver(PsycopgDriver):
    """psycopg 3 for asyncio, as penstock sees it."""

    kind = psycopg.AsyncConnection

    async def open(self, recipe: Recipe, seconds: float | None) -> AsyncPsycopg3Link:
        """Connect within `seconds`, name look-up included; the link is lent.

        The connection is what ``connection_class.connect()`` would make of the same arguments. Where that
        is not psycopg's own function, or a tracer has replaced it, it is called.
        Cancelled, it leaves nothing behind but a daemon thread, where a resolver does not answer.

        Raises:
            psycopg.OperationalError: no connection; the text has the server's or libpq's words.
            psycopg.errors.ConnectionTimeout: not in time.
            psycopg.ProgrammingError: the connection string or an option is wrong, or the loop is
                of a kind that psycopg cannot use.
            ConnectRaised: a `connect` that is not psycopg's raised what psycopg does not raise.
            NotAdopted: what it gave cannot be lent.
        """
        deadline = deadline_in(seconds)
        own = adoption.own_connect(recipe, psycopg.AsyncConnection)
        if own is not None:
            return await self._opened_by(own, recipe, deadline)
        params = connecting.connection_params(recipe)
        try:
            handle = await connect(params, deadline)
        except NotImplementedError as error:  # asyncio's own on Windows, for one
            raise psycopg.ProgrammingError(
                "this event loop cannot wait for descriptors (add_reader); run a SelectorEventLoop"
            ) from error
        try:
            return await _linked(handle, recipe, deadline)
        except BaseException:
            handle.finish()
            raise

    async def _opened_by(
        self, own: OwnConnect, recipe: Recipe, deadline: float
    ) -> AsyncPsycopg3Link:
        """A link of what a function gives that is not psycopg's own. It looks up names as it likes."""
        conninfo, options, ports = adoption.arguments(recipe, deadline)
        limit = asyncio.timeout(seconds_to(deadline))
        with inflight.searching(ports):
            try:
                async with limit:
                    conn = await awaited(own, (conninfo,), options, adoption.is_librarys)
            except psycopg.OperationalError as error:
                adoption.note_failure(error)
                raise
            except TimeoutError:
                if not limit.expired():
                    raise
                raise psycopg.errors.ConnectionTimeout("no connection in time") from None
            adoption.note_socket(conn)
        try:
            return await self.adopt(conn, recipe, adoption.seconds_left(deadline))
        except NotAdopted as error:
            if not error.taken:
                adoption.end(conn)
            raise error.of(own.name) from None

    async def adopt(
        self, conn: psycopg.AsyncConnection[Any], recipe: Recipe, seconds: float | None
    ) -> AsyncPsycopg3Link:
        """Make a link of an open connection, or of a tracer's proxy of one; the link is lent.

        Its settings as they are now are those to go back to.

        Raises:
            NotAdopted: it is closed, in the middle of something, or a pool's; it is left as it was.
            psycopg.OperationalError: the session did not answer; it is closed.
        """
        real = adoption.checked(conn, psycopg.AsyncConnection)
        handle, touched = adoption.watch(real, recipe, *_in_front(recipe, type(real)))
        try:
            link = AsyncPsycopg3Link(
                real, handle, touched, resets_session=recipe.reset == "session"
            )
            link.conn = conn
            await _set_up(link, recipe, deadline_in(seconds))
        except BaseException:
            handle.finish()
            raise
        return link

    async def diagnose(
        self, error: BaseException, recipe: Recipe, seconds: float | None
    ) -> Diagnosis:
        """Tell why `open` raised `error`; may make one more attempt to learn the server's code.

        The attempt is made in a daemon thread.
        """
        found = diagnosis_at_hand(error)
        if found is not None:
            return found
        deadline = deadline_in(seconds)
        try:
            attempt = partial(diagnosis_by_trying, error, recipe, deadline)
            return await call_aside(None, attempt, deadline)
        except TimeoutError:  # a resolver that does not answer
            return Diagnosis(sqlstate=None, heals=True, text=one_line(error))


async def _linked(handle: PGconn, recipe: Recipe, deadline: float) -> AsyncPsycopg3Link:
    """Build the connection as psycopg's `connect()` would, and set the session up."""
    in_front = _in_front(recipe, recipe.connection_class or psycopg.AsyncConnection)
    conn, touched = connection_over(handle, recipe, psycopg.AsyncConnection, *in_front)
    link = AsyncPsycopg3Link(conn, handle, touched, resets_session=recipe.reset == "session")
    await _set_up(link, recipe, deadline)
    return link


def _in_front(recipe: Recipe, kind: type[Any]) -> tuple[type[Any], ...]:
    limits: tuple[type[Any], ...] = (AsyncLimitsStatements,) if recipe.statement_limit else ()
    return (*limits, *in_front_of(kind))


async def _set_up(link: AsyncPsycopg3Link, recipe: Recipe, deadline: float) -> None:
    query = check_interval_query(link.handle, recipe.server_check_interval)
    if query is not None:
        check_set_up(link.handle, await link._ask(query, deadline))  # noqa: SLF001


driver: Final = AsyncPsycopg3Driver()
