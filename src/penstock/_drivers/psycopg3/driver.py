"""The driver for psycopg 3 (3.2.1 and newer), synchronous connections.

It must not know: pools, slots, leases, waiters, limits. Everything that can block is bounded by a
deadline of its own, by exchanging messages through libpq's non-blocking calls; what psycopg runs
for its user (statements, commit) is bounded from outside, by `discard` in another thread.

What needs no waiting is in `psycopg3_link`, for this driver and the one for asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus

from penstock._drivers.adopting import called
from penstock._drivers.psycopg3 import adopt as adoption
from penstock._drivers.psycopg3 import connect as connecting
from penstock._drivers.psycopg3.diagnose import diagnose
from penstock._drivers.psycopg3.exchange import all_done, answers, ask
from penstock._drivers.psycopg3.guard import Settings
from penstock._drivers.psycopg3.link import (
    PgconnLink,
    PsycopgDriver,
    check_interval_query,
    check_set_up,
    connection_over,
    settings_statement,
)
from penstock._drivers.psycopg3.outdated import failed_at_bind, in_front_of
from penstock._drivers.psycopg3.session_reset import LEARN
from penstock._drivers.psycopg3.statement_limit import LimitsStatements
from penstock._process import inflight
from penstock._process.sockets import deadline_in
from penstock.drivers import Diagnosis, NotAdopted, Recipe, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg.pq.abc import PGconn

    from penstock._drivers.adopting import OwnConnect


class Psycopg3Link(PgconnLink):
    """One synchronous psycopg connection."""

    __slots__ = ()

    conn: psycopg.Connection[Any]

    def prepare(self, seconds: float | None = None) -> None:
        """Remember the settings as they are now as those to go back to.

        With ``reset="session"`` one round trip learns what `configure` set on the server. It does not
        see custom settings (``app.tenant``), nor are temporary tables made again.

        Raises:
            psycopg.OperationalError: the server did not answer that question, or not in time.
        """
        self._settings = Settings(self.real)
        if self._reset is not None:
            self._learn(ask(self.handle, self.fd, LEARN, deadline_in(seconds)))

    def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit: one round trip. The connection must be lent.

        Of several statements in one string the answer to the first is returned, which is what a
        psycopg cursor shows first; an error in any of them raises. One that failed before it began, since what
        psycopg had prepared is of an older schema, is asked once more, unprepared.

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
                return _detached(self._executed(query, params))
            except psycopg.Error as error:
                if not failed_at_bind(self.real, error, query, params):
                    raise
            return _detached(self._executed(query, params, prepare=False))
        finally:
            attributes["_autocommit"] = autocommit

    def _executed(self, query: Any, params: Any, **how: Any) -> psycopg.Cursor[Any]:
        if self.conn is self.real:
            return self.real.execute(query, params, **how)
        cursor: psycopg.Cursor[Any] = (
            self.conn.cursor()
        )  # which is what all proxies of tracers trace
        cursor.execute(query, params, **how)
        return cursor

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
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
            conn.execute(begin)
        # psycopg's own cursor: the user's may have other placeholders.
        with psycopg.Cursor(conn) as cursor:
            cursor.execute(*settings_statement(settings), prepare=False)

    def commit(self) -> None:
        """Commit if a transaction is open. The connection must be lent.

        Raises if the session broke and took a transaction with it.
        """
        if not self._has_nothing_to_commit():
            self.conn.commit()

    def tidy(self, seconds: float | None) -> bool:
        """Roll back, leave pipeline mode, restore client-side settings; within `seconds`.

        False, and the link is good for `discard` only: broken, a statement under way, not in time,
        or somebody is still inside a ``transaction()``, ``pipeline()`` or ``notifies()`` of it and
        would end that block on the next borrower's connection.
        """
        if self._is_inside_block():
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

    def ping(self, seconds: float | None) -> bool:
        """One round trip with an empty query. False if dead or not answered in time."""
        return self._says(b"", seconds)

    def forget(self, seconds: float | None) -> bool:
        """A ping after which neither psycopg nor the server knows a statement that psycopg prepared."""
        return self._says(self._forgetting(), seconds)

    def _says(self, message: bytes, seconds: float | None) -> bool:
        try:
            return all_done(ask(self.handle, self.fd, message, deadline_in(seconds)))
        except psycopg.Error:
            return False

    def finish_reset(self, seconds: float | None) -> bool:
        """Read the answer to `start_reset`. False: not clean, or not in time; discard."""
        handle = self.handle
        try:
            handle.consume_input()
            if not all_done(answers(handle, self.fd, deadline_in(seconds))):
                return False
        except psycopg.Error:
            return False
        self._forget_notifications()
        return self._settle()

    def close(self) -> None:
        """End the session politely. Never raises, never blocks: the handle is non-blocking."""
        self._finish()


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


class Psycopg3Driver(PsycopgDriver):
    """psycopg 3, as penstock sees it."""

    kind = psycopg.Connection

    def open(self, recipe: Recipe, seconds: float | None) -> Psycopg3Link:
        """Connect within `seconds`, name look-up included; the link is lent.

        The connection is what ``connection_class.connect()`` would make of the same arguments. Where that
        is not psycopg's own function, or a tracer has replaced it, it is called.
        The resolver cannot be bounded: a dead one holds the caller for its own time-outs.

        Raises:
            psycopg.OperationalError: no connection; the text has the server's or libpq's words.
            psycopg.errors.ConnectionTimeout: not in time.
            psycopg.ProgrammingError: the connection string or an option is wrong.
            ConnectRaised: a `connect` that is not psycopg's raised what psycopg does not raise.
            NotAdopted: what it gave cannot be lent.
        """
        deadline = deadline_in(seconds)
        own = adoption.own_connect(recipe, psycopg.Connection)
        if own is not None:
            return self._opened_by(own, recipe, deadline)
        params = connecting.connection_params(recipe)
        handle = connecting.connect(params, deadline)
        try:
            return _linked(handle, recipe, deadline)
        except BaseException:
            handle.finish()
            raise

    def _opened_by(self, own: OwnConnect, recipe: Recipe, deadline: float) -> Psycopg3Link:
        """A link of what a function gives that is not psycopg's own. It waits as it likes."""
        conninfo, options, ports = adoption.arguments(recipe, deadline)
        with inflight.searching(ports):
            try:
                conn = called(own, (conninfo,), options, adoption.is_librarys)
            except psycopg.OperationalError as error:
                adoption.note_failure(error)
                raise
            adoption.note_socket(conn)
        try:
            return self.adopt(conn, recipe, adoption.seconds_left(deadline))
        except NotAdopted as error:
            if not error.taken:
                adoption.end(conn)
            raise error.of(own.name) from None

    def adopt(
        self, conn: psycopg.Connection[Any], recipe: Recipe, seconds: float | None
    ) -> Psycopg3Link:
        """Make a link of an open connection, or of a tracer's proxy of one; the link is lent.

        Its settings as they are now are those to go back to. What becomes of an error of the server's: the
        connection is closed.

        Raises:
            NotAdopted: it is closed, in the middle of something, or a pool's; it is left as it was.
            psycopg.OperationalError: the session did not answer; it is closed.
        """
        real = adoption.checked(conn, psycopg.Connection)
        handle, touched = adoption.watch(real, recipe, *_in_front(recipe, type(real)))
        try:
            link = Psycopg3Link(real, handle, touched, resets_session=recipe.reset == "session")
            link.conn = conn
            _set_up(link, recipe, deadline_in(seconds))
        except BaseException:
            handle.finish()
            raise
        return link

    def diagnose(self, error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
        """Tell why `open` raised `error`; may make one more attempt to learn the server's code.

        A certificate that fails verification, and a missing certificate file, cannot be told from
        a network error without reading text: they count as failures that heal.
        """
        return diagnose(error, recipe, seconds)


def _linked(handle: PGconn, recipe: Recipe, deadline: float) -> Psycopg3Link:
    """Build the connection as psycopg's `connect()` would, and set the session up."""
    in_front = _in_front(recipe, recipe.connection_class or psycopg.Connection)
    conn, touched = connection_over(handle, recipe, psycopg.Connection, *in_front)
    link = Psycopg3Link(conn, handle, touched, resets_session=recipe.reset == "session")
    _set_up(link, recipe, deadline)
    return link


def _in_front(recipe: Recipe, kind: type[Any]) -> tuple[type[Any], ...]:
    limits: tuple[type[Any], ...] = (LimitsStatements,) if recipe.statement_limit else ()
    return in_front_of(kind, *limits)


def _set_up(link: Psycopg3Link, recipe: Recipe, deadline: float) -> None:
    handle = link.handle
    query = check_interval_query(handle, recipe.server_check_interval)
    if query is not None:
        check_set_up(handle, ask(handle, link.fd, query, deadline))


driver: Final = Psycopg3Driver()
