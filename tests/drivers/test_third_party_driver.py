"""A pool over a driver that penstock does not bring: examples/pg8000_driver, on a real server."""

from __future__ import annotations

import pg8000.dbapi
import pytest
from examples.pg8000_driver.pg8000_driver import Pg8000Driver
from tests.forks import Child, until

from penstock import ConnectionPool, MisuseError, ServerUnavailable


@pytest.fixture
def pool(unix_dsn):
    with ConnectionPool(unix_dsn, driver=Pg8000Driver(), max_size=2) as pool:
        yield pool


def value(conn, query, *params):
    cursor = conn.cursor()
    cursor.execute(query, params)
    return cursor.fetchone()[0]


def test_a_block_commits_and_an_error_rolls_back(pool):
    with pool.connection() as conn:
        conn.cursor().execute("create table third_party (n int)")
    try:
        with pytest.raises(ZeroDivisionError), pool.connection() as conn:
            conn.cursor().execute("insert into third_party values (1)")
            raise ZeroDivisionError
        assert pool.execute("select count(*) from third_party").fetchone() == [0]
    finally:
        pool.execute("drop table third_party")


def test_a_session_that_ended_while_idle_is_never_lent(pool, server):
    with pool.connection() as conn:
        pid = value(conn, "select pg_backend_pid()")
    server.execute(f"select pg_terminate_backend({pid})")
    until(lambda: pool.stats().closed.get("hung up") == 1, pool)
    with pool.connection() as conn:
        assert value(conn, "select pg_backend_pid()") != pid


def test_errors_are_the_drivers_too(pool, unix_dsn):
    wrong = f"{unix_dsn} dbname=no_such_database"
    with ConnectionPool(wrong, driver=Pg8000Driver()) as other:
        with pytest.raises(pg8000.dbapi.OperationalError) as caught:
            other.execute("select 1")
        assert isinstance(caught.value, ServerUnavailable)
        assert caught.value.sqlstate == "3D000"
    conn = pool.getconn()
    pool.putconn(conn)
    with pytest.raises(pg8000.exceptions.InterfaceError) as misuse:
        pool.putconn(conn)
    assert isinstance(misuse.value, MisuseError)
    with pytest.raises(pg8000.exceptions.InterfaceError, match="given back"):
        conn.cursor().execute("select 1")


def test_a_fork_shares_nothing(pool):
    with pool.connection() as conn:
        mine = value(conn, "select pg_backend_pid()")

    def child():
        with pool.connection() as conn:
            return value(conn, "select pg_backend_pid()")

    assert Child(child).answer() != mine
    with pool.connection() as conn:
        assert value(conn, "select pg_backend_pid()") == mine


def test_a_session_reset_leaks_nothing(unix_dsn):
    with ConnectionPool(unix_dsn, driver=Pg8000Driver(), max_size=1, reset="session") as pool:
        with pool.connection() as conn:
            conn.cursor().execute("set application_name = 'leaked'")
        assert pool.execute("show application_name").fetchone() != ["leaked"]
