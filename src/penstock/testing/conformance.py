"""What every driver of penstock must do, as tests: on a real server, for your driver as for ours.

Make a subclass in a file of tests, and say how to reach a server::

    class TestMyDriver(DriverConformance):
        driver = MyDriver()

        @pytest.fixture
        def conninfo(self):
            return "postgresql://..."

The role needs no special rights but to end its own sessions (`pg_terminate_backend`). Nothing is left
in the database. An asyncio driver is tested in the same way: the tests run its coroutines.

One job: these tests. It must not know: pools, any library. It takes no lock.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from contextlib import contextmanager
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from penstock.conninfo import parse, to_conninfo
from penstock.drivers import Activity, NotAdopted, Recipe, StatementLimit

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How long anything here may take, in seconds: a failure's price, never a pass mark.
PATIENCE: Final = 20.0

_TERMINATE = "select pg_catalog.pg_terminate_backend({})"


class GivenUp(Exception):  # noqa: N818  it says what happened
    """What a statement raises here that had no answer in time."""


class DriverConformance:
    """Subclass it, set `driver`, and give a fixture `conninfo`.

    Attributes:
        driver: the driver under test, a `Driver` or an `AsyncDriver`.
    """

    driver: Any = None

    # -- what a subclass may have to say ----------------------------------------------------------

    def run(self, conn: Any, query: str) -> Any:
        """Run a statement on the library's own connection, as its users do; what it gives is ignored.

        The default is DB-API's cursor (PEP 249). A coroutine is awaited.
        """
        return conn.cursor().execute(query)

    #: What using a connection that was given back must raise; None: the driver's `interface_error`.
    given_back_error: type[Exception] | None = None

    def connected(self, conninfo: str) -> Any:
        """A connection of the library's own making, for a driver that has `adopt`; or a coroutine of one."""
        raise NotImplementedError("a driver with adopt() says here how its library connects")

    # -- opening ----------------------------------------------------------------------------------

    def test_a_new_link_is_idle_and_clean(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            assert link.activity() is Activity.IDLE
            assert link.park() is True
            assert link.activity() is Activity.IDLE, "also while parked"

    def test_its_descriptor_is_the_sessions_socket(self, conninfo: str) -> None:
        with self._link(conninfo) as link, socket.socket(fileno=os.dup(link.fd)) as same:
            assert same.family in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}

    def test_the_application_name_is_the_recipes(self, conninfo: str) -> None:
        with self._link(conninfo, application_name="conformance/1") as link:
            assert self._value(link, "show application_name") == "conformance/1"

    def test_the_users_application_name_wins(self, conninfo: str) -> None:
        own = to_conninfo({**parse(conninfo), "application_name": "own"})
        with self._link(own, application_name="conformance/2") as link:
            assert self._value(link, "show application_name") == "own"

    def test_a_url_is_understood_as_well_as_a_conninfo_string(self, conninfo: str) -> None:
        settings = parse(conninfo)
        pairs = "&".join(f"{key}={quote(value, safe='')}" for key, value in settings.items())
        with self._link(f"postgresql://?{pairs}") as link:
            assert self._value(link, "select 1") == 1

    def test_a_server_that_is_not_there_raises_and_may_heal(self, conninfo: str) -> None:
        recipe = self._recipe(_elsewhere(conninfo))
        error = self._refused(recipe)
        diagnosis = self._do(self.driver.diagnose(error, recipe, PATIENCE))
        assert diagnosis.heals is True
        assert diagnosis.text
        assert "\n" not in diagnosis.text

    def test_a_database_that_does_not_exist_raises_and_names_it(self, conninfo: str) -> None:
        recipe = self._recipe(to_conninfo({**parse(conninfo), "dbname": "no_such_database"}))
        error = self._refused(recipe)
        diagnosis = self._do(self.driver.diagnose(error, recipe, PATIENCE))
        assert "no_such_database" in diagnosis.text
        # 3D000 cannot heal by itself; a library that hides the server's code may think that it does.
        assert diagnosis.heals is (diagnosis.sqlstate is None)

    def test_no_error_shows_the_password(self, conninfo: str) -> None:
        secret = "s3cr3t'word"  # noqa: S105  the point
        for wrong in (
            to_conninfo({**parse(_elsewhere(conninfo)), "password": secret}),
            f"postgresql://app:{quote(secret)}@[::1/no-such-syntax",
        ):
            recipe = self._recipe(wrong)
            error = self._refused(recipe)
            text = self._do(self.driver.diagnose(error, recipe, PATIENCE)).text
            assert secret not in f"{error} {error!r} {text} {recipe!r}"

    def test_a_server_that_says_nothing_is_given_up_in_time(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            # Some libraries count whole seconds, from 2 on.
            recipe = self._recipe(f"host=127.0.0.1 port={port} user=app dbname=app")
            began = time.monotonic()
            self._refused(recipe, seconds=2.0)
            assert time.monotonic() - began < PATIENCE

    # -- lending and parking ----------------------------------------------------------------------

    def test_a_parked_connection_raises_and_works_when_it_is_lent_again(
        self, conninfo: str
    ) -> None:
        with self._link(conninfo) as link:
            conn = link.conn
            assert link.park()
            wanted = self.given_back_error or self.driver.interface_error
            try:
                self._run(link, "select 1")
            except wanted as error:
                assert "given back" in str(error)
            else:
                raise AssertionError("a connection that was given back could be used")
            assert link.park(), "the attempt has not made it unclean"
            link.lend()
            assert link.conn is conn
            self._run(link, "select 1")

    def test_a_held_connection_is_renewed_where_the_driver_says_that_it_can(
        self, conninfo: str
    ) -> None:
        if not getattr(self.driver, "renews", False):
            return
        with self._link(conninfo) as link:
            assert link.park()
            assert link.renew(), "what was never lent is nobody's"
            link.lend()
            held, pid = link.conn, self._pid(link)
            assert link.park()
            if link.renew():
                link.lend()
                assert link.conn is not held
                assert type(link.conn) is type(held)
                assert self._pid(link) == pid
            else:
                assert link.activity() is Activity.BROKEN
            try:
                self._do(self.run(held, "select 1"))
            except self.driver.interface_error:
                return
            raise AssertionError("the object that was held could be used")

    def test_an_open_connection_is_adopted_where_the_driver_says_that_it_can(
        self, conninfo: str
    ) -> None:
        if not hasattr(self.driver, "adopt"):
            return
        conn = self._do(self.connected(conninfo))
        link = self._do(self.driver.adopt(conn, Recipe(), PATIENCE))
        try:
            assert link.conn is conn
            assert self._value(link, "select 1") == 1
            self._not_adopted(conn, "it is another link's")
            self._do(link.prepare())
            assert link.park() is True
            self._not_adopted(conn, "it is nobody's just now")
            link.lend()
            self._run(link, "select 1")
        finally:
            self._do(link.close())
        self._not_adopted(conn, "it is closed")
        self._not_adopted(object(), "it is no connection")

    def test_a_connection_in_a_transaction_is_not_adopted_and_stays_as_it_is(
        self, conninfo: str
    ) -> None:
        if not hasattr(self.driver, "adopt"):
            return
        conn = self._do(self.connected(conninfo))
        self._do(self.run(conn, "begin"))
        self._not_adopted(conn, "it is in a transaction")
        self._do(conn.rollback() if hasattr(conn, "rollback") else self.run(conn, "rollback"))
        link = self._do(self.driver.adopt(conn, Recipe(), PATIENCE))
        self._do(link.close())

    def _not_adopted(self, conn: Any, because: str) -> None:
        try:
            self._do(self.driver.adopt(conn, Recipe(), PATIENCE))
        except NotAdopted as error:
            assert str(error)
            assert error.next_step
            return
        raise AssertionError(f"it was adopted, though {because}")

    def test_a_transaction_left_open_is_not_clean_and_is_rolled_back(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            self._begin(link)
            self._run(link, "create temporary table left_open (n int)")
            assert link.activity() is Activity.IN_TRANSACTION
            assert link.park() is False
            assert self._do(link.tidy(PATIENCE)) is True
            assert link.park() is True
            link.lend()
            assert self._value(link, "select to_regclass('left_open')::text") is None

    def test_a_failed_transaction_is_rolled_back(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            self._begin(link)
            self._fails(link, "select 1/0")
            # Not every library can tell one that failed.
            open_still = {Activity.IN_FAILED_TRANSACTION, Activity.IN_TRANSACTION}
            assert link.activity() in open_still
            assert link.park() is False
            assert self._do(link.tidy(PATIENCE)) is True
            link.lend()
            assert self._value(link, "select 1") == 1

    def test_commit_commits_what_was_begun_and_is_harmless_otherwise(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            self._do(link.commit())
            self._begin(link)
            self._run(link, "create temporary table kept (n int)")
            self._do(link.commit())
            assert link.activity() is Activity.IDLE
            assert link.park() is True
            link.lend()
            assert self._value(link, "select to_regclass('kept')::text") == "kept"

    def test_autocommit_is_for_one_borrower(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            link.set_autocommit(True)
            self._run(link, "select 1")
            assert link.activity() is Activity.IDLE
            assert link.park() or self._do(link.tidy(PATIENCE))
            link.lend()
            self._begin(link)
            self._run(link, "select 1")
            assert link.activity() is Activity.IN_TRANSACTION

    # -- statements of the pool's own -------------------------------------------------------------

    def test_execute_gives_rows_and_leaves_no_transaction(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            reply = self._do(link.execute("select n, n * n as square from generate_series(1, 3) n"))
            assert [tuple(row) for row in reply.rows] == [(1, 1), (2, 4), (3, 9)]
            assert reply.rowcount == 3
            assert reply.description is not None
            assert reply.statusmessage in {"SELECT 3", None}
            assert link.activity() is Activity.IDLE

    def test_execute_of_a_statement_without_rows_gives_none(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            reply = self._do(link.execute("create temporary table t (n int)"))
            assert reply.rows is None
            reply = self._do(link.execute("insert into t values (1), (2)"))
            assert (reply.rows, reply.rowcount) == (None, 2)

    def test_what_execute_raises_leaves_the_link_clean(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            try:
                self._do(link.execute("select 1/0"))
            except Exception as error:  # noqa: BLE001  the library's own class
                assert not self.driver.ends_session(error, read_write=True)
            else:
                raise AssertionError("a division by zero passed")
            assert link.park() is True

    def test_settings_end_with_the_transaction(self, conninfo: str) -> None:
        with self._link(conninfo) as link:
            if _is_async(link):
                self._do(link.begin())
            self._do(link.apply_settings({"app.user": "o'brien", "statement_timeout": "7s"}))
            query = "select current_setting('app.user', true)"
            # Raises unless it is set: what a library gives for a statement is not known here.
            self._run(link, "select 1 / (current_setting('app.user') = 'o''brien')::int")
            assert link.activity() is Activity.IN_TRANSACTION
            self._do(link.commit())
            assert self._value(link, query) in {None, ""}
            assert self._value(link, "show statement_timeout") == "0"

    def test_a_reset_forgets_what_a_session_holds(self, conninfo: str) -> None:
        with self._link(conninfo, reset="session") as link:
            link.set_autocommit(True)
            for statement in (
                "set statement_timeout = '8s'",
                "create temporary table held (n int)",
                "select pg_advisory_lock(4711)",
                "listen somebody",
            ):
                self._run(link, statement)
            assert link.park() or self._do(link.tidy(PATIENCE))
            assert link.start_reset() is True
            assert self._do(link.finish_reset(PATIENCE)) is True
            link.lend()
            assert self._value(link, "show statement_timeout") == "0"
            assert self._value(link, "select to_regclass('held')::text") is None
            held = "select count(*)::int from pg_locks where locktype = 'advisory' and objid = 4711"
            assert self._value(link, held) == 0
            assert self._value(link, "select count(*)::int from pg_listening_channels()") == 0

    def test_what_was_configured_survives_a_reset(self, conninfo: str) -> None:
        with self._link(conninfo, reset="session") as link:
            link.set_autocommit(True)
            self._run(link, "set search_path = pg_catalog")
            assert link.park() or self._do(link.tidy(PATIENCE))
            link.lend()
            self._do(link.prepare())
            self._run(link, "set statement_timeout = '8s'")
            assert link.park() or self._do(link.tidy(PATIENCE))
            assert link.start_reset()
            assert self._do(link.finish_reset(PATIENCE))
            link.lend()
            assert self._value(link, "show search_path") == "pg_catalog"

    # -- the end ----------------------------------------------------------------------------------

    def test_a_ping_tells_whether_the_session_lives(self, conninfo: str) -> None:
        with self._link(conninfo) as link, self._link(conninfo) as other:
            pid = self._pid(link)
            assert link.park()
            assert self._do(link.ping(PATIENCE)) is True
            assert link.park(), "a ping leaves nothing"
            self._terminate(other, pid)
            assert self._do(link.ping(PATIENCE)) is False

    def test_a_session_that_was_ended_is_noticed_without_a_round_trip(self, conninfo: str) -> None:
        with self._link(conninfo) as link, self._link(conninfo) as other:
            assert link.hung_up() is False
            self._terminate(other, self._pid(link))
            # The server's goodbye has to arrive, and an event loop has to hear of it.
            self._until(link.hung_up)

    def test_an_error_that_ends_the_session_is_told_from_others(self, conninfo: str) -> None:
        with self._link(conninfo) as link, self._link(conninfo) as other:
            self._terminate(other, self._pid(link))
            error = self._fails(link, "select 1")
            # Or the library had heard of it before, and only says that it is closed.
            assert self.driver.ends_session(error, read_write=False) or link.hung_up()
            self._until(lambda: link.activity() is Activity.BROKEN)

    def test_close_and_discard_end_the_session_and_can_be_repeated(self, conninfo: str) -> None:
        with self._link(conninfo) as other:
            for way in ("close", "discard"):
                link = self._opened(self._recipe(conninfo))
                pid = self._pid(link)
                for _ in range(2):
                    self._do(getattr(link, way)())
                gone = f"select count(*)::int from pg_stat_activity where pid = {pid}"
                self._until(lambda gone=gone: self._value(other, gone) == 0)

    def test_discard_wakes_whoever_waits_for_the_server(self, conninfo: str) -> None:
        with self._link(conninfo) as link, self._link(conninfo) as other:
            if _is_async(link):
                self._discards_under_a_task(link)
            else:
                self._discards_under_a_thread(link, other)

    def _discards_under_a_thread(self, link: Any, other: Any) -> None:
        pid = self._pid(link)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self._run(link, "select pg_sleep(60)")
            except Exception as error:  # noqa: BLE001  the library's own class
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        sleeping = (
            "select count(*)::int from pg_stat_activity where wait_event = 'PgSleep' "
            f"and pid = {pid}"
        )
        self._until(lambda: self._value(other, sleeping) == 1)
        link.discard()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert errors

    def _discards_under_a_task(self, link: Any) -> None:
        async def scenario() -> None:
            task = asyncio.ensure_future(self.run(link.conn, "select pg_sleep(60)"))
            await asyncio.sleep(0.05)  # it is sent, or is about to be: either has to end
            link.discard()
            done, _ = await asyncio.wait({task}, timeout=PATIENCE)
            assert done
            assert task.exception() is not None

        self._do(scenario())

    def test_a_statement_is_given_up_where_the_driver_says_that_it_can(self, conninfo: str) -> None:
        if not getattr(self.driver, "limits_statements", False):
            return
        limit = StatementLimit(seconds=0.2, given_up=lambda: GivenUp("no answer"))
        with self._link(conninfo, statement_limit=limit) as link, self._link(conninfo) as other:
            pid = self._pid(link)
            time.sleep(0.3)  # the borrower's own time does not count
            assert isinstance(self._fails(link, "select pg_sleep(60)"), GivenUp)
            assert link.activity() is Activity.BROKEN
            link.discard()
            gone = f"select count(*)::int from pg_stat_activity where pid = {pid}"
            self._until(lambda: self._value(other, gone) == 0)
            self._run(other, "select pg_sleep(0.3)")  # it has no limit

    def test_a_forked_child_lets_go_and_the_session_lives_on(self, conninfo: str) -> None:
        if not hasattr(os, "fork"):
            return
        with self._link(conninfo) as link:
            pid = self._pid(link)
            assert link.park()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    link.abandon(busy=False)
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            link.lend()
            assert self._pid(link) == pid

    # -- what the tests are made of ---------------------------------------------------------------

    def _do(self, answer: Any) -> Any:
        """The answer of a driver's method; a coroutine is run on the tests' own loop."""
        return self._loop().run_until_complete(_whole(answer)) if isawaitable(answer) else answer

    def _loop(self) -> asyncio.AbstractEventLoop:
        loops: list[asyncio.AbstractEventLoop] = vars(self).setdefault("_loops", [])
        if not loops:
            loops.append(asyncio.new_event_loop())
        return loops[0]

    def teardown_method(self) -> None:
        """Close the loop that the asyncio tests ran on (pytest calls this)."""
        for loop in vars(self).pop("_loops", []):
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _recipe(self, conninfo: str, **options: Any) -> Recipe:
        return Recipe(conninfo=conninfo, **options)

    def _opened(self, recipe: Recipe) -> Any:
        return self._do(self.driver.open(recipe, PATIENCE))

    @contextmanager
    def _link(self, conninfo: str, **options: Any) -> Iterator[Any]:
        """A lent link as a pool makes it: opened, prepared."""
        link = self._opened(self._recipe(conninfo, **options))
        try:
            self._do(link.prepare())
            link.park()
            link.lend()
            yield link
        finally:
            self._do(link.close())

    def _refused(self, recipe: Recipe, seconds: float = PATIENCE) -> Exception:
        try:
            link = self._do(self.driver.open(recipe, seconds))
        except Exception as error:  # noqa: BLE001  the library's own class
            return error
        self._do(link.close())
        raise AssertionError("it was opened")

    def _begin(self, link: Any) -> None:
        if _is_async(link):
            self._do(link.begin())

    def _run(self, link: Any, query: str) -> None:
        self._do(self.run(link.conn, query))

    def _fails(self, link: Any, query: str) -> Exception:
        try:
            self._run(link, query)
        except Exception as error:  # noqa: BLE001  the library's own class
            return error
        raise AssertionError(f"{query} passed")

    def _value(self, link: Any, query: str) -> Any:
        return self._do(link.execute(query)).rows[0][0]

    def _pid(self, link: Any) -> int:
        return int(self._value(link, "select pg_backend_pid()"))

    def _terminate(self, other: Any, pid: int) -> None:
        self._do(other.execute(_TERMINATE.format(pid)))
        gone = f"select count(*)::int from pg_stat_activity where pid = {pid}"
        self._until(lambda: self._value(other, gone) == 0)

    def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            self._do(asyncio.sleep(0.002))  # lets an event loop hear of what has happened


def _is_async(link: Any) -> bool:
    return hasattr(link, "begin")


def _elsewhere(conninfo: str) -> str:
    """The same settings, at a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return to_conninfo({**parse(conninfo), "host": "127.0.0.1", "port": str(port)})


async def _whole(answer: Any) -> Any:
    return await answer
