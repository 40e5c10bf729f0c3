"""A server whose host is frozen: its kernel acknowledges, nobody answers.

What the pool runs for its user on a connection (`check`, `on_borrow`, `configure`, a reset of his
own) would block for ever; the borrower's timeout bounds it all the same.
"""

from __future__ import annotations

import time
from typing import Any

import psycopg
import pytest

from penstock import ConnectionPool, PenstockError

#: The user's deadline, and how much later the answer may come on a loaded machine.
TIMEOUT = 1.0
GENEROUS = 15.0


def ask(conn):
    conn.execute("select 1")
    conn.rollback()


@pytest.mark.parametrize("option", ["check", "on_borrow"])
def test_what_runs_at_a_borrow_ends_with_the_borrowers_timeout(fresh_server, option):
    options: Any = {option: ask}
    pool = ConnectionPool(
        fresh_server.conninfo(), max_size=2, timeout=TIMEOUT, name="frozen", **options
    )
    with pool.connection():
        pass
    fresh_server.pause()
    began = time.monotonic()
    try:
        with pytest.raises((PenstockError, psycopg.OperationalError)) as caught, pool.connection():
            pass
        waited = time.monotonic() - began
    finally:
        fresh_server.resume()
    print(f"{option}: {type(caught.value).__name__} after {waited:.2f} s")
    assert waited < GENEROUS
    with pool.connection(timeout=GENEROUS) as conn:
        assert conn.execute("select 1").fetchone() == (1,)
    pool.close()


def test_a_configure_that_gets_no_answer_is_a_failed_connect(fresh_server, monkeypatch):
    monkeypatch.setattr("penstock._pool.sync.executor.CONNECT_SECONDS", 1.0)
    monkeypatch.setattr("penstock._pool.opener.DIAGNOSE_SECONDS", 0.5)
    frozen: list[bool] = []

    def configure(conn):
        if not frozen:
            frozen.append(True)
            fresh_server.pause()
        ask(conn)

    pool = ConnectionPool(
        fresh_server.conninfo(), configure=configure, timeout=2 * TIMEOUT, name="frozen"
    )
    try:
        with pytest.raises(PenstockError):
            pool.getconn()
    finally:
        fresh_server.resume()
    assert pool.stats().open_failures >= 1
    with pool.connection(timeout=GENEROUS) as conn:
        assert conn.execute("select 1").fetchone() == (1,)
    pool.close()


def test_a_reset_that_gets_no_answer_costs_the_connection(fresh_server, monkeypatch):
    monkeypatch.setattr("penstock._pool.sync.borrowing.TIDY_SECONDS", 0.5)
    pool = ConnectionPool(fresh_server.conninfo(), max_size=2, reset=ask, name="frozen")
    try:
        with pool.connection():
            fresh_server.pause()
    finally:
        fresh_server.resume()
    with pool.connection(timeout=GENEROUS) as conn:
        assert conn.execute("select 1").fetchone() == (1,)
    pool.close()
    assert pool.stats().closed.get("unclean") == 1
