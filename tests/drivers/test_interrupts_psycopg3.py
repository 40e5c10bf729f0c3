"""A thousand Ctrl-C with psycopg on a real server: every connection answers, and its own question.

The moments are random: in the borrow, in psycopg, in libpq's wait for the answer, in the return. Points
that can be counted are met one by one in tests/contract/test_interrupts.py.
"""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading

import pytest
from tests.contract import interrupting
from tests.contract.interrupting import faults_of, until

from penstock import ConnectionPool

psycopg = pytest.importorskip("psycopg")

STORM = 1000
SIZE = 3
#: Whoever waits so long, in seconds, was forgotten.
PATIENCE = 5.0


@pytest.fixture
def often():
    """Threads change places all the time, so that an interrupt meets all of them anywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def alarms():
    """SIGALRM does what Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def silence():
    """Logging's handlers lose their lock to an interrupt, and stop everybody who logs after it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_connection_whose_lock_an_interrupt_left_held_is_not_lent_again(server, error):
    with ConnectionPool(server.conninfo(over="unix"), max_size=1) as pool:
        with pytest.raises(error), pool.connection() as conn:
            # As psycopg's own `with` does, before it is struck at its end: on gevent it can be.
            conn.lock.acquire()
            raise error
        answers = []

        def borrow():
            answers.append(pool.execute("select 1").fetchone())

        other = threading.Thread(target=borrow, daemon=True)
        other.start()
        other.join(PATIENCE)
        assert answers == [(1,)], "he waits for psycopg's lock"
        assert pool.stats().closed == {"unclean": 1}


@pytest.mark.parametrize("reset", ["rollback", "session"])
def test_putconn_does_not_lend_again_whose_lock_an_interrupt_left_held(server, reset):
    with ConnectionPool(server.conninfo(over="unix"), max_size=1, reset=reset) as pool:
        conn = pool.getconn()
        with pytest.raises(KeyboardInterrupt):
            try:
                conn.lock.acquire()  # as above, before anything was sent
                raise KeyboardInterrupt
            finally:
                pool.putconn(conn)
        answers = []

        def borrow():
            answers.append(pool.execute("select 1").fetchone())

        other = threading.Thread(target=borrow, daemon=True)
        other.start()
        other.join(PATIENCE)
        assert answers == [(1,)], "it waits for psycopg's lock"
        assert pool.stats().closed == {"unclean": 1}


def ask(conn, number):
    """One question, two of them in a transaction now and then; whose answer must be its own."""
    assert conn.execute("select %s::int", (number,)).fetchone() == (number,)


def borrow(pool, rng):
    number = rng.randrange(1 << 30)
    way = rng.random()
    if way < 0.1:
        assert pool.execute("select %s::int", (number,)).fetchone() == (number,)
    elif way < 0.2:
        with pool.connection(settings={"application_name": "other"}) as conn:
            ask(conn, number)
    else:
        with pool.connection() as conn:
            ask(conn, number)
            if way < 0.5:
                ask(conn, number + 1)


def borrow_for_ever(pool, rng):
    while True:
        borrow(pool, rng)


def borrow_until(pool, rng, over, faults):
    try:
        while not over.is_set():
            borrow(pool, rng)
    except BaseException as error:
        faults.append(repr(error))


def strike(pool, rng):
    """Borrow until the alarm goes off."""
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
        borrow_for_ever(pool, rng)
    except KeyboardInterrupt:
        return


def sessions(conninfo, name):
    with psycopg.connect(conninfo) as conn:
        found = conn.execute(
            "select count(*) from pg_stat_activity where application_name in (%s, 'other')", (name,)
        )
        return found.fetchone()[0]


# Python itself swallows an interrupt that strikes a weak reference's callback written in Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_thousand_signals_in_queries_lose_no_connection(server, rng, often, alarms, silence):
    conninfo = server.conninfo(over="unix")
    pool = ConnectionPool(
        f"{conninfo} application_name=interrupted", min_size=SIZE, max_size=SIZE, timeout=None
    )
    pool.open(wait=True)
    over = threading.Event()
    faults = []
    threads = [
        threading.Thread(
            target=borrow_until, args=(pool, random.Random(rng.random()), over, faults)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(STORM):
        strike(pool, rng)
    over.set()
    for thread in threads:
        thread.join(interrupting.PATIENCE)
    stats = pool.stats()
    print(
        f"{sys.version.split()[0]}: {STORM} interrupts, {stats.borrows} borrows, "
        f"{stats.orphaned} slots brought home, closed: {stats.closed}"
    )
    assert not any(thread.is_alive() for thread in threads), "a waiter was forgotten"
    assert not faults
    assert not faults_of(pool)
    conns = [pool.getconn() for _ in range(SIZE)]
    for number, conn in enumerate(conns):
        ask(conn, number)
        conn.commit()
        pool.putconn(conn)
    assert until(lambda: sessions(conninfo, "interrupted") == SIZE)
    pool.close()
