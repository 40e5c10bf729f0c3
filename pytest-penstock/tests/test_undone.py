"""`pytest_penstock.undone` on a real server: what is done is seen by all, and nothing stays."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import dict_row

from penstock import ConnectionPool, MisuseError, ServerUnavailable
from penstock.testing import FakeDriver, FakeServer
from pytest_penstock import undone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_penstock.postgres import Server

    Pool = ConnectionPool[Any]

PATIENCE = 60.0  # seconds until a test gives up; never a pass mark

SCHEMA = """
    create table items (id int primary key, word text);
    create table parents (id int primary key);
    create table children (
        id int primary key,
        parent int references parents deferrable initially deferred,
        place int unique deferrable initially immediate);
"""


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    server.execute("create database undone")
    for statement in filter(str.strip, SCHEMA.split(";")):
        server.execute(statement, dbname="undone")
    yield server.conninfo(over="unix", dbname="undone")
    server.execute("drop database undone with (force)")


@pytest.fixture
def pool_of(database: str) -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(**options: Any) -> Pool:
        made.append(ConnectionPool(database, **{"name": f"app-{len(made)}", **options}))
        return made[-1]

    yield make
    for pool in made:
        pool.close(timeout=0)


@pytest.fixture
def real(database: str) -> Iterator[Callable[[str], list[Any]]]:
    """What somebody outside sees."""
    with psycopg.connect(database, autocommit=True) as conn:
        yield lambda sql: conn.execute(sql.encode()).fetchall()


@pytest.fixture(autouse=True)
def nothing_stays(database: str) -> Iterator[None]:
    yield
    with psycopg.connect(database) as conn:
        for table in ("items", "parents", "children"):
            assert conn.execute(f"select * from {table}".encode()).fetchall() == []


@pytest.fixture
def pool(pool_of: Callable[..., Pool]) -> Iterator[Pool]:
    """The application's own pool, undone."""
    pool = pool_of(timeout=1.0)
    with undone(pool):
        yield pool


def words(pool: Pool) -> list[str]:
    return [word for (word,) in pool.execute("select word from items order by id").fetchall()]


def add(conn: Any, number: int, word: str = "word") -> None:
    conn.execute("insert into items values (%s, %s)", (number, word))


def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call, *arguments).result(PATIENCE)


# -- what is done is seen, and undone ----------------------------------------------------------------


def test_a_commit_is_seen_by_the_next_borrow_and_by_nobody_outside(pool, real):
    with pool.connection() as conn:
        add(conn, 1, "kept")
    assert words(pool) == ["kept"]
    assert in_thread(words, pool) == ["kept"]
    assert real("select * from items") == []


def test_after_the_block_the_pool_is_as_it_was_and_nothing_stays(pool_of):
    pool = pool_of(max_size=2)
    with pool.connection() as conn:
        before, host = conn.info.backend_pid, conn.info.host
    with undone(pool):
        with pool.connection() as conn:
            add(conn, 1)
            assert conn.info.backend_pid != before
        assert pool.stats().in_use == 0
    with pool.connection() as conn:
        assert conn.execute("select count(*) from items").fetchone() == (0,)
        assert conn.info.host == host
    assert repr(pool) == "<ConnectionPool 'app-0' open: 1 idle, 0 in use, 0 opening of 2>"
    assert pool.health().ready


def test_a_test_that_fails_is_undone_as_well(pool_of):
    pool = pool_of()
    with pytest.raises(ZeroDivisionError), undone(pool), pool.connection() as conn:
        add(conn, 1)
        conn.commit()
        raise ZeroDivisionError
    assert words(pool) == []


def test_a_block_that_raises_rolls_back_its_own_work_only(pool):
    pool.execute("insert into items values (1, 'before')")
    with pytest.raises(errors.UniqueViolation), pool.connection() as conn:
        add(conn, 2)
        add(conn, 1)
    assert words(pool) == ["before"]


def test_commit_and_rollback_in_a_block_end_what_was_begun_since(pool):
    with pool.connection() as conn:
        add(conn, 1, "committed")
        conn.commit()
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        add(conn, 2, "rolled back")
        conn.rollback()
        add(conn, 3, "at the end")
    assert words(pool) == ["committed", "at the end"]


def test_an_error_fails_the_transaction_as_in_production(pool):
    with pool.connection() as conn:
        add(conn, 1)
        with pytest.raises(errors.DivisionByZero):
            conn.execute("select 1 / 0")
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INERROR
        with pytest.raises(errors.InFailedSqlTransaction):
            conn.execute("select 1")
        conn.commit()  # of a failed transaction: a server answers ROLLBACK
    assert words(pool) == []


def test_transaction_blocks_nest(pool):
    with pool.connection() as conn:
        with conn.transaction():
            add(conn, 1, "outer")
            with pytest.raises(errors.UniqueViolation), conn.transaction():
                add(conn, 2, "inner")
                add(conn, 1)
            with conn.transaction(force_rollback=True):
                add(conn, 3, "forced")
            add(conn, 4, "after")
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert words(pool) == ["outer", "after"]


def test_savepoints_of_ones_own_work(pool):
    with pool.connection() as conn:
        add(conn, 1, "one")
        conn.execute("savepoint a")
        add(conn, 2)
        conn.execute("savepoint a")
        with pytest.raises(errors.UniqueViolation):
            add(conn, 1)
        conn.execute("rollback to a")
        conn.execute("release savepoint a")
        conn.execute("rollback to a")
        add(conn, 3, "three")
    assert words(pool) == ["one", "three"]


def test_in_autocommit_an_error_undoes_its_own_statement_only(pool):
    with pool.connection(autocommit=True) as conn:
        add(conn, 1, "one")
        with pytest.raises(errors.UniqueViolation):
            add(conn, 1)
        add(conn, 2, "two")
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        with pytest.raises(errors.UniqueViolation):
            conn.execute("insert into items values (3, ''); insert into items values (1, '')")
    assert words(pool) == ["one", "two"]


def test_transactions_by_sql_text_are_noticed(pool, real):
    with pool.connection(autocommit=True) as conn:
        conn.execute("/* a */ begin; insert into items values (1, 'a;b'); COMMIT;")
        conn.execute("START TRANSACTION")
        add(conn, 2)
        conn.execute("abort")
        conn.execute("begin isolation level serializable")
        add(conn, 3, "c")
        assert conn.execute("end").statusmessage == "COMMIT"
        conn.execute("begin")
        add(conn, 4)
        conn.execute("commit", prepare=True)
        conn.execute("begin")
        conn.execute("commit and chain")
        conn.execute("rollback and no chain")
    assert words(pool) == ["a;b", "c", "word"]
    assert real("select * from items") == []


def test_what_putconn_brings_back_open_is_rolled_back_with_the_same_warning(pool, caplog):
    conn = pool.getconn()
    add(conn, 1)
    pool.putconn(conn)
    assert words(pool) == []
    assert "given back idle in transaction: rolled back" in caplog.text


def test_a_returned_connection_cannot_be_used(pool):
    with pool.connection() as conn:
        cursor = conn.execute("select 1")
    with pytest.raises(psycopg.InterfaceError, match="given back"):
        conn.execute("select 1")
    with pytest.raises(psycopg.InterfaceError, match="given back"):
        cursor.execute("select 1")


def test_a_read_only_transaction_is_one_and_no_longer(pool):
    pool.execute("insert into items values (1, 'one')")
    with pool.connection() as conn:
        conn.read_only = True
        assert conn.execute("select count(*) from items").fetchone() == (1,)
        with pytest.raises(errors.ReadOnlySqlTransaction):
            add(conn, 2)
        conn.rollback()
        conn.execute("select 1")
        conn.commit()
        conn.read_only = None
        add(conn, 3, "three")
    assert words(pool) == ["one", "three"]


# -- what a commit checks, and what it ends ---------------------------------------------------------


def test_a_deferred_constraint_fails_the_commit_as_in_production(pool):
    with pool.connection() as conn:
        conn.execute("insert into children values (1, 7, 1)")
        with pytest.raises(errors.ForeignKeyViolation):
            conn.commit()
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        conn.execute("insert into children values (1, 7, 1)")  # deferred again
        conn.execute("insert into parents values (7)")
        conn.commit()
        with pytest.raises(errors.UniqueViolation):  # and this one is immediate, as it was declared
            conn.execute("insert into children values (2, 7, 1)")
        conn.rollback()
    with pytest.raises(errors.ForeignKeyViolation):
        pool.execute("insert into children values (2, 8, 2)")
    assert pool.execute("select id from children").fetchall() == [(1,)]


def test_settings_of_one_transaction_end_with_it(pool):
    ask = "select current_setting('app.tenant', true)"
    with pool.connection(settings={"app.tenant": "ann"}) as conn:
        assert conn.execute(ask).fetchone() == ("ann",)
    assert pool.execute(ask).fetchone() == ("",)
    with pool.connection() as conn:
        conn.execute("set local app.tenant = 'bob'")
        conn.execute("select set_config('statement_timeout', '7s', true)")
        assert conn.execute("show statement_timeout").fetchone() == ("7s",)
    assert pool.execute(ask).fetchone() == ("",)
    assert pool.execute("show statement_timeout").fetchone() == ("0",)


def test_cursors_end_with_their_transaction(pool):
    with pool.connection() as conn:
        for _ in range(2):
            conn.execute("declare c cursor for select 1")
            assert conn.execute("fetch from c").fetchone() == (1,)
            conn.commit()
        with conn.cursor("named") as cursor:
            cursor.execute("select * from generate_series(1, 250)")
            for (number,) in cursor:  # fetches by hundreds, while another one commits
                if number % 100 == 0:
                    pool.execute("insert into items values (%s, '')", (number,))
    assert len(words(pool)) == 2


# -- every way to send statements -------------------------------------------------------------------


def test_copy_works_both_ways_and_its_errors_are_undone(pool):
    with pool.connection() as conn:
        with conn.cursor().copy("copy items from stdin") as copy:
            for number in range(1000):
                copy.write_row((number, "x" * 100))
        with conn.cursor().copy("copy items to stdout") as copy:
            assert len(list(copy.rows())) == 1000
        conn.commit()
        with (
            pytest.raises(errors.UniqueViolation),
            conn.cursor().copy("copy items from stdin") as copy,
        ):
            copy.write_row((1001, ""))
            copy.write_row((1, ""))
        conn.rollback()
        with pytest.raises(ZeroDivisionError), conn.cursor().copy("copy items from stdin") as copy:
            copy.write_row((1001, ""))
            raise ZeroDivisionError
        conn.rollback()
    assert len(words(pool)) == 1000


@pytest.mark.parametrize("autocommit", [True, False])
def test_pipelines_work(pool, autocommit):
    with pool.connection(autocommit=autocommit) as conn:
        with conn.pipeline():
            for number in range(20):
                add(conn, number)
            assert conn.execute("select count(*) from items").fetchone() == (20,)
            with conn.transaction():
                add(conn, 20)
        with pytest.raises(errors.UniqueViolation), conn.pipeline():
            add(conn, 30)
            add(conn, 1)
        conn.rollback()
        conn.cursor().executemany("insert into items values (%s, '')", [(n,) for n in (40, 41)])
    assert pool.execute("select max(id) from items").fetchone() == (41,)
    assert len(words(pool)) == (23 if autocommit else 2)


def test_prepared_statements_of_several_connections_do_not_meet(pool):
    with pool.connection() as one, pool.connection() as two:
        for conn in (one, two):
            conn.execute("select %s::int", (1,), prepare=True)
        assert one.execute("select %s::text", ("a",), prepare=True).fetchone() == ("a",)
        assert two.execute("select %s::int + 1", (1,), prepare=True).fetchone() == (2,)
        one.rollback()  # psycopg sends DEALLOCATE ALL, which means its own
        assert two.execute("select %s::int + 1", (2,), prepare=True).fetchone() == (3,)
        assert one.execute("select %s::int", (5,), prepare=True).fetchone() == (5,)
        one.prepared_max = 1
        for number in range(4):
            one.execute(f"select {number}", prepare=True)
        two.execute("prepare mine as select 1")
        two.execute("deallocate mine")


def test_streams_binary_results_and_big_rows_work(pool):
    with pool.connection() as conn:
        stream = conn.cursor().stream("select * from generate_series(1, 1000)")
        assert next(stream) == (1,)
        # As in production, another connection is free meanwhile.
        assert pool.execute("select 1").fetchone() == (1,)
        assert sum(1 for _ in stream) == 999
        assert len(conn.execute("select repeat('x', 10000000)", binary=True).fetchone()[0]) == 10**7


def test_notices_reach_the_connection_that_asked(pool):
    heard: list[str] = []
    with pool.connection() as conn:
        conn.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        conn.execute("do $$begin raise notice 'hello'; end$$")
    assert heard == ["hello"]


def test_a_changed_setting_is_told_to_every_connection(pool):
    with pool.connection(autocommit=True) as one, pool.connection(autocommit=True) as two:
        two.execute("select 1")
        one.execute("set timezone = 'Asia/Tokyo'")
        two.execute("select 1")
        assert two.info.parameter_status("TimeZone") == "Asia/Tokyo"


@pytest.mark.parametrize("how", ["cancel", "cancel_safe"])
def test_a_statement_can_be_cancelled(pool, how):
    with pool.connection() as conn:
        timer = threading.Timer(0.1, getattr(conn, how))
        timer.start()
        with pytest.raises(errors.QueryCanceled):
            conn.execute("select pg_sleep(60)")
        timer.join()


# -- the pool's options -----------------------------------------------------------------------------


class Special(psycopg.Connection[Any]):
    pass


def test_connections_are_what_the_pool_makes_of_them(pool_of):
    asked: list[str] = []

    def configure(conn: Any) -> None:
        conn.row_factory = dict_row
        conn.execute("set search_path = pg_catalog, public")
        conn.commit()
        asked.append("configure")

    pool = pool_of(
        connection_class=Special,
        configure=configure,
        check=lambda conn: asked.append("check"),
        on_borrow=lambda conn: asked.append("on_borrow"),
        autocommit=True,
    )
    with undone(pool), pool.connection() as conn:
        assert isinstance(conn, Special)
        assert conn.autocommit
        assert conn.execute("show search_path").fetchone() == {"search_path": "pg_catalog, public"}
        assert asked == ["configure", "check", "on_borrow"]
        assert conn.info.dbname == "undone"
        shown = conn.execute("select pg_backend_pid() pid").fetchone()
        assert shown == {"pid": conn.info.backend_pid}


def test_a_pool_grows_while_a_transaction_is_open(pool_of, elsewhere):
    """What `configure` asks of the server is nobody's transaction: it goes between."""

    def configure(conn: Any) -> None:
        conn.execute("select 1")
        conn.commit()

    pool = pool_of(configure=configure, reset="session", timeout=PATIENCE)
    with undone(pool):
        with pool.connection() as outer:
            add(outer, 1, "outer")
            with pool.connection() as inner:
                add(inner, 2, "inner")
        with pool.connection() as outer:
            add(outer, 3, "third")
            elsewhere.start(lambda: words(pool))
            with pool.connection(), pool.connection():
                pass
        assert elsewhere.answer() == ["outer", "inner", "third"]


@pytest.mark.parametrize("reset", ["session", None, lambda conn: conn.rollback()])
def test_every_reset_works(pool_of, reset):
    pool = pool_of(reset=reset)
    with undone(pool):
        for number in range(3):
            with pool.connection() as conn:
                add(conn, number)
        assert len(words(pool)) == 3


def test_two_pools_on_one_database_see_each_other_and_others_do_not(pool_of, database):
    one, two = pool_of(), pool_of()
    elsewhere = pool_of(kwargs={"options": "-c search_path=pg_catalog"})
    with undone(one, two, elsewhere) as both:
        one.execute("insert into items values (1, 'seen')")
        assert words(two) == ["seen"]
        assert elsewhere.execute("select count(*) from public.items").fetchone() == (0,)
        assert both.conninfo == both.conninfo_of(two) != both.conninfo_of(elsewhere)


def test_an_object_with_pools_will_do(pool_of):
    pool = pool_of()
    extension = SimpleNamespace(pools={"main": pool})
    with undone(SimpleNamespace(pools=[extension, pool]), {"again": pool}):
        pool.execute("insert into items values (1, '')")
    assert words(pool) == []


def test_others_may_join_by_the_address(pool_of):
    pool = pool_of()
    with undone(pool) as session:
        pool.execute("insert into items values (1, 'one')")
        with psycopg.connect(session.conninfo) as conn:
            assert conn.execute("select word from items").fetchall() == [("one",)]
            add(conn, 2, "two")
        assert words(pool) == ["one", "two"]


def test_a_dedicated_connection_is_in_the_same_session(pool):
    pool.execute("insert into items values (1, 'one')")
    with pool.dedicated(autocommit=True) as conn:
        assert conn.execute("select word from items").fetchall() == [("one",)]
        with pytest.raises(errors.FeatureNotSupported, match="would hear nothing"):
            conn.execute("listen news")


def test_blocks_nest(pool_of):
    pool = pool_of()
    with undone(pool):
        pool.execute("insert into items values (1, 'outer')")
        with undone(pool):
            pool.execute("insert into items values (2, 'inner')")
            assert words(pool) == ["outer", "inner"]
        assert words(pool) == ["outer"]


def test_blocks_that_overlap_are_told_and_nothing_stays(pool_of):
    pool = pool_of()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(undone(pool))
    second.enter_context(undone(pool))
    with pytest.raises(MisuseError, match="began later"):
        first.close()
    with contextlib.suppress(Exception):  # its session went with the first one's
        pool.execute("insert into items values (1, 'overlapped')")
    second.close()
    assert words(pool) == []
    pool.execute("select 1")


def test_a_forked_child_joins_and_does_not_disturb(pool_of):
    pool = pool_of()
    with undone(pool):
        pool.execute("insert into items values (1, 'parent')")
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                pool.execute("insert into items values (2, 'child')")
                code = 0 if words(pool) == ["parent", "child"] else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert words(pool) == ["parent", "child"]


# -- threads ----------------------------------------------------------------------------------------


class Elsewhere:
    """Another thread that does what it is told, one after the other."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="elsewhere")
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._answers.put((job(), None))
            except BaseException as error:
                self._answers.put((None, error))

    def start(self, job: Callable[[], Any]) -> None:
        self._jobs.put(job)

    def answer(self) -> Any:
        answer, error = self._answers.get(timeout=PATIENCE)
        if error is not None:
            raise error
        return answer

    def __call__(self, job: Callable[[], Any]) -> Any:
        self.start(job)
        return self.answer()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(PATIENCE)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    thread = Elsewhere()
    yield thread
    thread.close()


def test_an_idle_borrowed_connection_is_no_obstacle(pool, elsewhere):
    with pool.connection() as conn:
        elsewhere(lambda: pool.execute("insert into items values (1, 'theirs')"))
        add(conn, 2, "mine")
        conn.commit()
        assert elsewhere(lambda: words(pool)) == ["theirs", "mine"]


def test_a_transaction_of_another_thread_waits_for_the_end_of_the_open_one(pool_of, elsewhere):
    pool = pool_of(timeout=PATIENCE)
    with undone(pool):
        with pool.connection() as conn:
            add(conn, 1, "first")
            elsewhere.start(lambda: pool.execute("select word from items").fetchall())
            add(conn, 2, "second")
        assert elsewhere.answer() == [("first",), ("second",)]


def test_a_wait_that_is_too_long_names_both_and_says_what_to_do(pool, elsewhere):
    with pool.connection() as conn:
        add(conn, 1)
        with pytest.raises(errors.LockNotAvailable) as caught:
            elsewhere(lambda: pool.execute("select 2"))
        text = str(caught.value)
        assert "waited 1 s for the one session of this test" in text
        assert "another borrower has a transaction open" in text
        assert 'thread "MainThread"' in text
        assert 'thread "elsewhere"' in text
        assert "test_undone.py" in text
        assert "its last statement: 'insert into items values ($1, $2)'" in text
        assert "commit or roll back there before another thread needs the database" in text
    assert elsewhere(lambda: words(pool)) == ["word"]


def test_transactions_of_one_thread_are_stacked(pool):
    with pool.connection() as outer:
        add(outer, 1, "outer")
        with pool.connection() as inner:
            add(inner, 2, "inner")
        with pytest.raises(ZeroDivisionError), pool.connection() as inner:
            add(inner, 3, "gone")
            raise ZeroDivisionError
    assert words(pool) == ["outer", "inner"]


def test_an_outer_transaction_that_failed_does_not_stop_an_inner_one(pool):
    with pool.connection() as outer:
        add(outer, 1, "lost")
        with pytest.raises(errors.DivisionByZero):
            outer.execute("select 1 / 0")
        pool.execute("insert into items values (2, 'log')")
        with pytest.raises(errors.InFailedSqlTransaction):
            outer.execute("select 1")
    # The outer one's rollback takes the inner one along; in production it would stay.
    assert words(pool) == []


def test_transactions_may_end_in_the_order_in_which_they_began(pool):
    with pool.connection() as two:
        with pool.connection() as one:
            add(one, 1, "one")
            add(two, 2, "two")
            add(one, 3, "three")
        add(two, 4, "four")
    assert words(pool) == ["one", "two", "three", "four"]


def test_one_that_only_looked_takes_nobodys_work_along(pool):
    with pool.connection() as writer, pool.connection() as reader:
        add(writer, 1, "before")
        reader.execute("select 1")
        add(writer, 2, "meanwhile")
        reader.rollback()
        add(writer, 3, "after")
    assert words(pool) == ["before", "meanwhile", "after"]


def test_a_rollback_that_undoes_a_commit_inside_it_says_so(pool, caplog):
    with pool.connection() as outer:
        add(outer, 1)
        pool.execute("insert into items values (2, 'audit')")
        with pool.connection() as inner:
            add(inner, 3)
        outer.rollback()
    assert words(pool) == []
    assert "undone 1 transaction(s) that other connections of the same thread" in caplog.text


def test_who_loses_his_work_to_the_rollback_of_another_is_told(pool):
    with pool.connection() as lower, pool.connection() as upper:
        add(lower, 1)
        add(upper, 2)
        lower.rollback()
        with pytest.raises(errors.InFailedSqlTransaction, match="ROLLBACK on another connection"):
            add(upper, 3)
        with pytest.raises(errors.TransactionRollback, match="undone already"):
            upper.commit()
        add(upper, 4, "anew")
    with pool.connection() as lower, pool.connection() as upper:
        add(lower, 5)
        add(upper, 6)
        add(lower, 7)
        upper.rollback()  # takes 7 along
        with pytest.raises(errors.TransactionRollback):
            lower.commit()
    assert words(pool) == ["anew"]


def test_eight_threads_commit_and_roll_back_as_they_like(pool_of, rng):
    """What was committed is there, what was rolled back is not: whatever the order."""
    pool = pool_of(max_size=8, timeout=PATIENCE)
    seeds = [rng.random() for _ in range(8)]

    def work(thread: int) -> set[int]:
        chance = type(rng)(seeds[thread])
        kept: set[int] = set()
        for turn in range(25):
            numbers = [thread * 10_000 + turn * 10 + each for each in range(3)]
            fate = chance.choice(["commit", "raise", "autocommit", "execute", "inner", "error"])
            if fate == "autocommit":
                with pool.connection(autocommit=True) as conn:
                    for number in numbers:
                        add(conn, number)
                kept.update(numbers)
            elif fate == "execute":
                pool.execute("insert into items values (%s, '')", (numbers[0],))
                kept.add(numbers[0])
            else:
                with contextlib.suppress(ZeroDivisionError, errors.UniqueViolation):
                    with pool.connection() as conn:
                        add(conn, numbers[0])
                        if fate == "inner":
                            with contextlib.suppress(ZeroDivisionError), conn.transaction():
                                add(conn, numbers[1])
                                raise ZeroDivisionError
                        add(conn, numbers[2])
                        if fate == "raise":
                            raise ZeroDivisionError
                        if fate == "error":
                            add(conn, numbers[0])
                    kept.update((numbers[0], numbers[2]))
        return kept

    with undone(pool):
        with ThreadPoolExecutor(8) as executor:
            kept = set().union(*executor.map(work, range(8)))
        found = {number for (number,) in pool.execute("select id from items").fetchall()}
        assert found == kept
        assert pool.stats().in_use == 0
        assert pool.stats().open_failures == 0
    assert words(pool) == []


# -- what cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    ["vacuum items", "create database more", "set transaction isolation level serializable"],
)
def test_what_cannot_run_in_a_transaction_fails_with_a_hint(pool, statement):
    with pool.connection(autocommit=True) as conn:
        with pytest.raises(errors.ActiveSqlTransaction) as caught:
            conn.execute(statement)
        assert "pytest_penstock.undone()" in str(caught.value.diag.message_hint)
        add(conn, 1)
    assert words(pool) == ["word"]


@pytest.mark.parametrize(
    "statement", ["listen news", "prepare transaction 'x'", "commit prepared 'x'"]
)
def test_what_would_never_happen_fails(pool, statement):
    with pool.connection(autocommit=True) as conn, pytest.raises(errors.FeatureNotSupported):
        conn.execute(statement)


def test_a_fake_pool_is_refused():
    with FakeServer() as fake, ConnectionPool(driver=FakeDriver(fake)) as pool:
        with pytest.raises(TypeError, match="psycopg 3 only"), undone(pool):
            pass
        with pytest.raises(TypeError, match="takes pools"), undone("postgresql://"):
            pass


def test_a_connection_that_is_lent_already_is_refused(pool_of):
    pool = pool_of()
    with pool.connection() as conn:
        with pytest.raises(MisuseError, match="give them back before"), undone(pool):
            pass
        assert conn.execute("select 1").fetchone() == (1,)
    assert words(pool) == []


def test_one_that_another_thread_gives_back_is_waited_for(pool_of, elsewhere):
    pool = pool_of(timeout=PATIENCE)
    held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.connection() as conn:
            conn.execute("select 1")
            held.set()
            may_go.wait(PATIENCE)

    elsewhere.start(hold)
    assert held.wait(PATIENCE)
    threading.Timer(0.05, may_go.set).start()
    with undone(pool):
        elsewhere.answer()
        pool.execute("insert into items values (1, '')")


def test_what_is_still_lent_at_the_end_is_cut_off_and_told(pool_of, caplog):
    pool = pool_of(timeout=0.2)
    with caplog.at_level(logging.WARNING, logger="penstock"), undone(pool):
        conn = pool.getconn()
        add(conn, 1)
    assert "connections that are still lent" in caplog.text
    with pytest.raises(psycopg.OperationalError):
        conn.execute("select 1")
    pool.putconn(conn)
    assert words(pool) == []


def test_a_server_that_ends_the_session_is_told_as_it_is(pool_of, real):
    pool = pool_of(timeout=1.0)
    with undone(pool):
        pid = pool.execute("select pg_backend_pid()").fetchone()[0]
        with pytest.raises(psycopg.OperationalError), pool.connection() as conn:
            real(f"select pg_terminate_backend({pid}, 60000)")  # returns when it has gone
            with pytest.raises(
                errors.AdminShutdown, match="the server ended the test's session: term"
            ):
                conn.execute("select 1")
        with pytest.raises((psycopg.OperationalError, ServerUnavailable)):
            pool.execute("select 1")
    assert words(pool) == []


def test_a_connection_that_was_given_back_raises_though_its_session_is_lent_again(
    pool_of: Callable[..., Pool],
) -> None:
    pool = pool_of(max_size=1)
    with undone(pool):
        with pool.connection() as kept:
            kept.execute("insert into items values (1, 'one')")
        with pool.connection() as conn:
            with pytest.raises(MisuseError):
                kept.execute("select 1")
            assert conn.execute("select count(*) from items").fetchone() == (1,)
    with pool.connection() as kept:
        pass
    with pool.connection():
        kept.execute("select 1")  # as it was before: the pool was made without guard=True
