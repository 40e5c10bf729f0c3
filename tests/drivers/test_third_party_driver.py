"""A pool over a driver that penstock does not bring: examples/pg8000_driver, on a real server."""

from __future__ import annotations

import pg8000.core
import pg8000.dbapi
import pytest
from examples.pg8000_driver.pg8000_driver import Pg8000Driver
from tests.forks import Child, until

from penstock import ConnectionPool, MisuseError, ServerUnavailable
from penstock.drivers import Recipe


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


class Gone:
    """A stream to a server that has refused and left: it can be read, and not be written to any more."""

    def write(self, data):
        pass

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def test_what_the_server_said_is_found_behind_what_the_goodbye_met(unix_dsn):
    """pg8000's own race: its close() may meet the end of the connection, and raises that instead."""
    said = {"S": "FATAL", "C": "3D000", "M": 'database "no_such_database" does not exist'}
    with pytest.raises(pg8000.exceptions.InterfaceError) as caught:
        try:
            raise pg8000.exceptions.DatabaseError(said)
        except BaseException:
            pg8000.core._flush(Gone())
            raise
    told = Pg8000Driver().diagnose(caught.value, Recipe(conninfo=unix_dsn), 1.0)
    assert (told.sqlstate, told.heals, told.text) == ("3D000", False, said["M"])


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
