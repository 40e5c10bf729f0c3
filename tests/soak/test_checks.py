"""The checks on a real server notice what is planted, with threads and psycopg 3; without it they are content."""

from __future__ import annotations

import sys
import threading

import pytest

from tests.conftest import SEED
from tests.faults.stage import Stage
from tests.soak import checks, work, world
from tests.soak.ledger import ALONE, DONE


@pytest.fixture(scope="module")
def made():
    """One world for all of them; what is planted is taken back."""
    stage = Stage("threads-psycopg", seed=f"{SEED} checks")
    kept = sys.unraisablehook, threading.excepthook
    try:
        with stage._closing:
            yield world.World(stage, str(SEED), 60)
    finally:
        sys.unraisablehook, threading.excepthook = kept


@pytest.fixture
def w(made, monkeypatch):
    monkeypatch.setattr(world, "PATIENCE", 0.5)  # what is planted does not go away
    made.findings.clear()
    made.server.execute("truncate ledger; update account set balance = 0")
    made.begin_step(1)
    made.new_pool(1)
    made.options["reset"] = "rollback"
    run(made, made.pool.open())
    yield made
    run(made, made.pool.close())


def run(w, coro):
    return w.runtime.run(coro)


def worked(w, times=3):
    borrower = w.borrower()
    for _ in range(times):
        run(w, work.pay(w, borrower))
        run(w, work.transfer(w, borrower))
        run(w, work.ask(w, borrower))
    counted = world.Borrower("")
    counted.add(borrower)
    return counted


def after_step(w, counted):
    run(w, checks.after_step(w, checks.Levels(), counted))
    return "\n".join(w.findings)


def test_nothing_is_found_where_nothing_is_wrong(w):
    assert after_step(w, worked(w)) == ""


def test_an_acknowledged_row_that_is_gone(w):
    counted = worked(w)
    w.server.execute("delete from ledger where part = 'alone'")
    assert "lost" in after_step(w, counted)


def test_a_row_that_is_there_twice(w):
    counted = worked(w)
    w.server.execute("insert into ledger select * from ledger limit 1")
    assert "twice" in after_step(w, counted)


def test_half_a_transaction(w):
    counted = worked(w)
    w.server.execute("delete from ledger where part = 'credit'")
    assert "torn" in after_step(w, counted)


def test_money_from_nowhere(w):
    counted = worked(w)
    w.server.execute("update account set balance = balance + 1 where id = 1")
    assert "off by 1" in after_step(w, counted)


def test_a_session_that_is_not_the_pools(w):
    counted = worked(w)
    other = world.ROLE
    stranger = w.stage.runtime.pool(w.server.conninfo(user=other, password=w.password)).sync
    with stranger, stranger.connection():
        found = after_step(w, counted)
    assert "not at rest" in found


def test_a_borrow_that_is_not_counted(w):
    counted = worked(w)
    counted.sure += 50
    counted.attempts += 50
    assert "borrows were made" in after_step(w, counted)


def test_a_wrong_answer(w, monkeypatch):
    async def wrong(_conn, _query):
        return [("somebody else's", 1)]

    monkeypatch.setattr(w.stage, "ask", wrong)
    run(w, work.ask(w, w.borrower()))
    assert "a wrong answer" in "\n".join(w.findings)


def test_a_transaction_that_the_last_borrower_left_open(w):
    with w.pool.sync.connection() as conn:
        conn.execute("select 1")
        work.look_at(w, conn)
    assert "what its last borrower left" in "\n".join(w.findings)


@pytest.mark.parametrize("error", [AssertionError("a bug"), KeyError("k"), ValueError("v")])
def test_an_error_that_is_nobodys(w, error):
    w.heard(error, w.borrower())
    assert "an error that nobody may get" in "\n".join(w.findings)


def test_one_connection_that_two_use(w):
    import psycopg

    w.heard(psycopg.OperationalError("another command is already in progress"), w.borrower())
    assert "an error that nobody may get" in "\n".join(w.findings)


def test_a_key_that_only_a_child_has_asked_for_is_known(w):
    counted = worked(w)
    w.server.execute("insert into ledger values ('child.1', 'alone')")
    w.journal.heard_of(["child.1"], DONE)
    assert w.journal.entries["child.1"].parts == ALONE
    assert after_step(w, counted) == ""
