"""A pool whose own lock is not free: whoever borrows waits for it no longer than for a connection.

A lock of ours is held for microseconds, but a signal handler, a finalizer or a debugger can run in the
middle of a move and wait there. Here another thread takes the pool's lock and keeps it.
"""

from __future__ import annotations

import contextlib
import pickle
import threading

import pytest

from penstock import ConnectionPool, PoolTimeout
from penstock._machine.locked import LockedMachine
from penstock._pool.sync import executor
from penstock.testing import FakeDriver
from tests.forks import until

#: Bounds a failure, in seconds.
PATIENCE = 15.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(executor, "LEAST_LOCK_SECONDS", 0.05)
    monkeypatch.setattr("penstock._pool.sync.borrowing.RETURN_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(executor, "RETURN_LOCK_SECONDS", 0.05)
    monkeypatch.setattr("penstock._machine.locked.BRIEFLY", 0.05)


@pytest.fixture(params=["global lock", "none"])
def pool(fake, request, monkeypatch):
    if request.param == "none":
        monkeypatch.setattr("penstock._pool.sync.pool._has_global_lock", lambda: False)
    with ConnectionPool(driver=FakeDriver(fake), max_size=1, name="shop", timeout=0.2) as made:
        made.execute("select 1")
        assert isinstance(made._machine, LockedMachine) == (request.param == "none")
        yield made


@contextlib.contextmanager
def stopped_in_a_move(pool):
    """Another thread has the lock and stays there."""
    taken, over = threading.Event(), threading.Event()

    def stay():
        with pool._lock:
            taken.set()
            over.wait(PATIENCE)

    thread = threading.Thread(target=stay, name="stopped")
    thread.start()
    assert taken.wait(PATIENCE)
    try:
        yield
    finally:
        over.set()
        thread.join()


def in_thread(call):
    """What `call` gives or raises, in a thread of its own: one that hangs is a failure, not a hang."""
    answers = []

    def run():
        try:
            answers.append(call())
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert answers, "it waits for the lock for ever"
    return answers[0]


def borrow(pool, **options):
    with pool.connection(**options):
        return "lent"


BORROWS = {
    "connection": borrow,
    "connection(timeout=)": lambda pool: borrow(pool, timeout=0.1),
    "connection(timeout=0)": lambda pool: borrow(pool, timeout=0),
    "connection(autocommit=)": lambda pool: borrow(pool, autocommit=True),
    "getconn": lambda pool: pool.getconn(),
    "execute": lambda pool: pool.execute("select 1"),
}


@pytest.mark.parametrize("door", BORROWS)
def test_a_borrower_waits_for_the_pools_lock_no_longer_than_its_timeout(pool, door):
    lent = pool.getconn()
    with stopped_in_a_move(pool):
        error = in_thread(lambda: BORROWS[door](pool))
    assert isinstance(error, PoolTimeout)
    assert error.locked_by is not None and error.locked_by.thread == "stopped"
    assert "the pool's own lock was not free: 0." in str(error)
    assert 'in thread "stopped" at ' in str(error)
    pool.putconn(lent)
    assert borrow(pool) == "lent"
    assert not pool.stats().waiting


def test_a_borrower_whose_time_is_up_leaves_the_queue_though_the_lock_is_not_free(pool):
    lent = pool.getconn()
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(in_thread(lambda: borrow(pool, timeout=0.3)))
    )
    thread.start()
    assert until(lambda: bool(pool._machine.waiters))
    with stopped_in_a_move(pool):
        thread.join(PATIENCE)
        assert isinstance(answers[0], PoolTimeout)
    assert until(lambda: pool.stats().waiting == 0, seconds=PATIENCE)
    pool.putconn(lent)
    assert borrow(pool) == "lent"


class Block:
    """A connection that is lent until `end`."""

    def __init__(self, pool, door):
        self._pool = pool
        self._lease = pool.connection() if door == "with" else None
        self.conn = pool.getconn() if self._lease is None else self._lease.__enter__()

    def end(self):
        lease, conn, self._lease, self.conn = self._lease, self.conn, None, None
        if lease is None:
            self._pool.putconn(conn)
        else:
            lease.__exit__(None, None, None)


@pytest.mark.parametrize("door", ["with", "putconn"])
@pytest.mark.parametrize("state", ["clean", "in a transaction"])
def test_a_return_does_not_wait_for_the_lock_for_ever_and_loses_nothing(pool, door, state):
    block = Block(pool, door)
    if state != "clean":
        block.conn.execute("insert")
    waiter = threading.Thread(target=lambda: in_thread(lambda: borrow(pool, timeout=PATIENCE)))
    waiter.start()
    assert until(lambda: bool(pool._machine.waiters))  # it is to be handed over, under the lock
    with stopped_in_a_move(pool):
        assert in_thread(block.end) is None
    waiter.join(PATIENCE)
    assert not waiter.is_alive()
    assert until(lambda: pool.stats().idle == 1)
    assert borrow(pool) == "lent"


MOVES = {
    "open": lambda pool: pool.open(),
    "close": lambda pool: pool.close(timeout=0.1),
    "drain": lambda pool: pool.drain(),
    "resize": lambda pool: pool.resize(0, 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_move_of_the_whole_pool_does_not_wait_for_the_lock_for_ever(fake, move):
    pool = ConnectionPool(driver=FakeDriver(fake), name="shop", timeout=0.2)
    if move != "open":
        pool.open(wait=True)
    with stopped_in_a_move(pool):
        assert isinstance(in_thread(lambda: MOVES[move](pool)), PoolTimeout)
    MOVES[move](pool)
    pool.close()


def test_a_pool_that_opens_at_its_first_borrow_waits_no_longer_for_the_lock_either(fake):
    pool = ConnectionPool(driver=FakeDriver(fake), name="shop", timeout=0.2)  # `with` would open it
    with stopped_in_a_move(pool):
        assert isinstance(in_thread(lambda: borrow(pool)), PoolTimeout)
    assert borrow(pool) == "lent"
    pool.close()


def test_reports_do_not_wait_for_the_lock_for_ever(pool):
    with stopped_in_a_move(pool):
        assert in_thread(pool.stats).max_size == 1
        assert in_thread(pool.health).live
        assert "shop" in in_thread(lambda: repr(pool))


def test_a_lock_whose_thread_was_ended_by_force_is_told(pool):
    error = pool._reporter.locked(1, 0.2, 0.5)  # no thread has this number
    assert "not running any more" in str(error)
    assert "restart this process" in str(error)


def test_the_error_survives_pickling(pool):
    lent = pool.getconn()
    with stopped_in_a_move(pool):
        error = in_thread(lambda: borrow(pool))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    pool.putconn(lent)
