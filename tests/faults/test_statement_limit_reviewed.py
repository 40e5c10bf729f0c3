"""`statement_timeout_client` where calls meet on one connection, and classes of users that ask by themselves.

One job: what somebody who used the option in earnest has found. What it promises in general is told by
`statement_scenes`. Threads here, real PostgreSQL.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import psycopg
import psycopg2
import psycopg2.extensions
import pytest
from tests.faults.proxy import FaultProxy

from penstock import ConnectionPool, StatementTimeout

#: Seconds: the option's value here, and a failure's price.
LIMIT, PATIENCE = 0.5, 20.0


@pytest.fixture
def make_pool(server):
    made = []

    def make(**options):
        options = {"max_size": 1, "statement_timeout_client": LIMIT} | options
        pool = ConnectionPool(options.pop("conninfo", server.conninfo(over="tcp")), **options)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.close()


def asking(conn, statement, ends):
    """A thread with this statement; how it ends is added to `ends`."""

    def ask():
        try:
            conn.cursor().execute(statement)
            ends.append("answered")
        except Exception as error:
            ends.append(type(error).__name__)

    return threading.Thread(target=ask, daemon=True)


def test_a_thread_that_waited_for_anothers_statement_has_the_limit_too(make_pool):
    pool = make_pool(driver="psycopg2")
    ends: list[str] = []
    with suppress(psycopg2.OperationalError), pool.connection() as conn:
        first = asking(conn, f"select pg_sleep({LIMIT * 0.7})", ends)
        second = asking(conn, "select pg_sleep(60)", ends)
        first.start()
        while conn.info.transaction_status != psycopg2.extensions.TRANSACTION_STATUS_ACTIVE:
            pass
        second.start()
        second.join(PATIENCE)
        first.join(PATIENCE)
        assert ends == ["answered", "StatementTimeout"]


def test_three_threads_on_one_connection_have_the_limit_each(make_pool):
    pool = make_pool(driver="psycopg2")
    ends: list[str] = []
    with pool.connection() as conn:
        statement = f"select pg_sleep({LIMIT * 0.6})"
        three = [asking(conn, statement, ends) for _ in range(3)]
        for each in three:
            each.start()
        for each in three:
            each.join(PATIENCE)
        assert ends == ["answered"] * 3


class Audited(psycopg2.extensions.cursor):
    """A cursor class whose `execute` asks something else first."""

    before = None

    def execute(self, query, vars=None):  # noqa: A002  psycopg2's name for it
        with self.connection.cursor(cursor_factory=psycopg2.extensions.cursor) as other:
            other.execute("select 'audit'")
        if self.before is not None:
            self.before()
        return super().execute(query, vars)


def test_an_execute_that_asks_something_else_and_is_slow_has_the_limit_for_its_own(
    make_pool, server
):
    def slow():
        time.sleep(LIMIT * 1.3)  # the program's own time: no look finds anything asked
        proxy.hold()

    with FaultProxy("127.0.0.1", server.port) as proxy:
        pool = make_pool(driver="psycopg2", conninfo=server.conninfo(port=proxy.port))
        ends: list[str] = []
        with suppress(psycopg2.OperationalError), pool.connection() as conn:
            cursor = conn.cursor(cursor_factory=Audited)
            cursor.before = slow

            def ask():
                try:
                    cursor.execute("select 1")
                except psycopg2.Error as error:
                    ends.append(type(error).__name__)

            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(PATIENCE / 4)
            proxy.release()
            thread.join(PATIENCE)
            assert ends == ["StatementTimeout"]
        assert pool.execute("select 1").fetchone() == (1,)
        pool.close()


class AsksAtOnce(psycopg.Connection):
    """Of the kind that has a look at its session before anybody else does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.answer = self.execute("select 42").fetchone()
        self.rollback()


def test_a_connection_class_may_ask_the_server_while_it_is_made(make_pool):
    pool = make_pool(connection_class=AsksAtOnce, timeout=PATIENCE / 4)
    with pool.connection() as conn:
        assert conn.answer == (42,)
    with pytest.raises(StatementTimeout):
        pool.execute("select pg_sleep(60)")


# -- what comes row by row --------------------------------------------------------------------------


def test_a_stream_is_bounded_step_by_step(make_pool):
    pool = make_pool()
    with pool.connection() as conn:
        rows = conn.cursor().stream("select generate_series(1, 3)")
        for _ in range(3):
            next(rows)
            time.sleep(LIMIT * 0.6)  # the program's own time does not count
        assert list(rows) == []
    with pytest.raises(StatementTimeout), pool.connection() as conn:
        for _ in conn.cursor().stream("select pg_sleep(60)"):
            pass
    assert pool.execute("select 1").fetchone() == (1,)


def test_a_pipeline_is_bounded(make_pool):
    pool = make_pool()
    with pytest.raises(StatementTimeout), pool.connection() as conn, conn.pipeline():
        conn.execute("select 1")
        conn.execute("select pg_sleep(60)").fetchone()
    assert pool.execute("select 1").fetchone() == (1,)
