"""ConnectionPool as its users write it, with psycopg on a real PostgreSQL."""

import contextlib
import gc
import logging
import os
import pickle
import queue
import socket
import threading
import time
from typing import Any, ClassVar

import psycopg
import pytest
from psycopg.rows import dict_row
from tests.forks import PATIENCE, until

from penstock import (
    ConfigError,
    ConnectionPool,
    MisuseError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    TooManyRequests,
)


@pytest.fixture
def pool_of(server):
    made: list[ConnectionPool] = []

    def make(conninfo=None, **options):
        conninfo = conninfo or server.conninfo(over="unix")
        made.append(ConnectionPool(conninfo, **{"name": f"api-{len(made)}", **options}))
        return made[-1]

    yield make
    for pool in made:
        pool.close(timeout=0)


@pytest.fixture
def borrowers():
    """Threads that are joined at the end, and whose errors are the test's."""
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []

    def start(call, *arguments):
        def run():
            try:
                call(*arguments)
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return threads[-1]

    yield start
    Holder.let_all_go()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


class Holder:
    """Somebody in another thread who has a connection until told."""

    all: ClassVar[list[Any]] = []

    def __init__(self, pool, start):
        self.holds, self.may_go = threading.Event(), threading.Event()
        self.pool = pool
        self.all.append(self)
        self.thread = start(self._run)
        assert self.holds.wait(PATIENCE)

    def _run(self):
        with self.pool.connection(timeout=PATIENCE) as conn:
            conn.execute("select 1")
            self.holds.set()
            assert self.may_go.wait(PATIENCE)

    @classmethod
    def let_all_go(cls):
        while cls.all:
            cls.all.pop().may_go.set()

    def let_go(self):
        self.may_go.set()
        self.thread.join(PATIENCE)


def sessions(server, pool):
    rows = server.execute(
        f"select pid from pg_stat_activity where application_name like '%/{pool.name}/%'"
    )
    return {int(pid) for (pid,) in rows}


# -- borrowing --------------------------------------------------------------------------------------


def test_a_block_commits_and_one_that_raises_rolls_back(pool_of):
    pool = pool_of(max_size=1)
    pool.execute("create temp table kept (n int)")  # temporary: the pool has one session
    with pool.connection() as conn:
        conn.execute("insert into kept values (1)")
    with pytest.raises(KeyError), pool.connection() as conn:
        conn.execute("insert into kept values (2)")
        raise KeyError
    with pool.connection() as conn, conn.transaction():
        conn.execute("insert into kept values (3)")
    with pool.connection() as conn, conn:  # psycopg's own block: commits, does not close
        conn.execute("insert into kept values (4)")
    assert pool.execute("select n from kept order by n").fetchall() == [(1,), (3,), (4,)]
    assert pool.stats().opened == 1


def test_a_commit_that_fails_reaches_the_borrower_and_the_connection_goes_back(pool_of):
    pool = pool_of(max_size=1)
    pool.execute("create temp table once (n int, unique (n) deferrable initially deferred)")
    with pytest.raises(psycopg.errors.UniqueViolation), pool.connection() as conn:
        conn.execute("insert into once values (1), (1)")
    assert pool.execute("select count(*) from once").fetchone() == (0,)
    assert (pool.stats().idle, pool.stats().opened) == (1, 1)


def test_getconn_and_putconn(pool_of, caplog):
    pool = pool_of(max_size=1)
    conn = pool.getconn()
    assert conn.execute("select 1").fetchone() == (1,)
    assert pool.stats().in_use == 1
    pool.putconn(conn)
    assert "idle in transaction: rolled back" in caplog.text
    conn = pool.getconn(timeout=1)
    conn.execute("select 1")
    conn.commit()
    caplog.clear()
    pool.putconn(conn)
    assert caplog.text == ""
    assert (pool.stats().idle, pool.stats().borrows) == (1, 2)


def test_a_connection_may_be_given_back_by_another_thread(pool_of, borrowers):
    pool = pool_of(max_size=1)
    conn = pool.getconn()
    borrowers(pool.putconn, conn).join(PATIENCE)
    assert pool.execute("select 1", timeout=0).fetchone() == (1,)


def test_a_result_of_execute_is_detached(pool_of):
    pool = pool_of(max_size=1)
    result = pool.execute("select n, n * 2 from generate_series(1, 3) n")
    assert pool.stats().idle == 1
    assert result.fetchone() == (1, 2)
    assert result.fetchmany(1) == [(2, 4)]
    assert list(result) == [(3, 6)]
    assert (result.rowcount, result.statusmessage) == (3, "SELECT 3")
    assert [column.name for column in result.description] == ["n", "?column?"]
    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.execute("select 1 / 0")
    assert pool.execute("select %s::int", [7]).fetchone() == (7,)
    assert pool.stats().opened == 1


def test_execute_may_run_what_no_transaction_may(pool_of, server):
    pool_of().execute("create database elsewhere")
    pool_of().execute("drop database elsewhere")


def test_a_connection_closed_by_its_borrower_is_replaced(pool_of):
    pool = pool_of(max_size=1)
    with pool.connection() as conn:
        backend = conn.info.backend_pid
        conn.close()
    assert pool.execute("select pg_backend_pid()", timeout=PATIENCE).fetchone() != (backend,)
    assert pool.stats().closed == {"broken": 1}


def test_dedicated_is_outside_the_pools_size(pool_of, server):
    pool = pool_of(max_size=1, configure=lambda conn: setattr(conn, "row_factory", dict_row))
    with pool.connection(), pool.dedicated() as first, pool.dedicated(autocommit=True) as second:
        assert first.execute("select 1 as n").fetchone() == {"n": 1}
        assert (first.autocommit, second.autocommit) == (False, True)
        assert len(sessions(server, pool)) == 3
    assert pool.stats().size == 1
    until(lambda: len(sessions(server, pool)) == 1, "the dedicated ones are closed")
    with pytest.raises(KeyError), pool.dedicated() as conn:
        conn.execute("create table unwanted (n int)")
        raise KeyError
    assert pool.execute("select to_regclass('unwanted')").fetchone() == {"to_regclass": None}
    pool.close()
    with pytest.raises(PoolClosed), pool.dedicated():
        pass


# -- its life -----------------------------------------------------------------------------------------


def test_making_a_pool_opens_nothing_and_the_first_borrow_does(pool_of, server):
    pool = pool_of(min_size=2, max_size=2)
    assert pool.stats().state == "new"
    assert not sessions(server, pool)
    assert repr(pool) == "<ConnectionPool 'api-0' new: 0 idle, 0 in use, 0 opening of 2>"
    pool.execute("select 1")
    until(lambda: pool.stats().idle == 2, "min_size are open")
    assert repr(pool) == "<ConnectionPool 'api-0' open: 2 idle, 0 in use, 0 opening of 2>"


def test_a_pool_that_does_not_open_by_itself_says_so(pool_of):
    pool = pool_of(open=False)
    with pytest.raises(PoolClosed, match="is not open"):
        pool.execute("select 1")
    pool.open()
    assert pool.execute("select 1").fetchone() == (1,)


def test_open_wait_returns_when_min_size_are_open_and_close_ends_their_sessions(pool_of, server):
    pool = pool_of(min_size=3, max_size=5)
    pool.open(wait=True, timeout=PATIENCE)
    assert pool.stats().idle == 3
    assert len(sessions(server, pool)) == 3
    pool.close()
    assert (pool.closed, pool.stats().size, pool.health().live) == (True, 0, False)
    until(lambda: not sessions(server, pool), "no session is left")
    with pytest.raises(PoolClosed):
        pool.execute("select 1")
    pool.close()  # once more is nothing
    pool.open(wait=True)
    assert pool.execute("select 1").fetchone() == (1,)
    assert not pool.closed


def test_close_waits_for_borrowers_inside(pool_of, borrowers):
    pool = pool_of(max_size=1)
    holder = Holder(pool, borrowers)
    closing = borrowers(pool.close, PATIENCE)
    until(lambda: pool.closed, "it refuses")
    with pytest.raises(PoolClosed):
        pool.execute("select 1")
    assert closing.is_alive()
    holder.let_go()
    closing.join(PATIENCE)
    assert pool.stats().size == 0
    assert pool.stats().closed == {"pool closed": 1}


def test_close_gives_up_on_borrowers_after_its_timeout_and_names_them(pool_of, borrowers, caplog):
    pool = pool_of(max_size=1)
    holder = Holder(pool, borrowers)
    pool.close(timeout=0.1)
    assert "closed with 1 connections still lent" in caplog.text
    assert "test_pool.py" in caplog.text
    assert pool.stats().in_use == 1
    holder.let_go()
    until(lambda: pool.stats().size == 0, "closed when given back")


def test_close_wakes_those_who_wait(pool_of, borrowers):
    pool = pool_of(max_size=1)
    holder = Holder(pool, borrowers)
    told: queue.SimpleQueue[PoolClosed] = queue.SimpleQueue()

    def wait():
        with pytest.raises(PoolClosed) as caught:
            pool.execute("select 1", timeout=PATIENCE)
        told.put(caught.value)

    borrowers(wait)
    until(lambda: pool.stats().waiting == 1, "one waits")
    pool.close(timeout=0)
    told.get(timeout=PATIENCE)
    holder.let_go()


def test_drain_replaces_idle_ones_now_and_lent_ones_at_their_return(pool_of, server):
    pool = pool_of(min_size=3, max_size=3)
    pool.open(wait=True)
    before = sessions(server, pool)
    with pool.connection() as conn:
        pool.drain()
        assert conn.execute("select 1").fetchone() == (1,)
    until(lambda: pool.stats().idle == 3 and pool.stats().closed == {"drained": 3}, "replaced")
    until(lambda: len(sessions(server, pool)) == 3, "three sessions")
    assert sessions(server, pool).isdisjoint(before)
    assert pool.stats().generation == 1


def test_resize_grows_and_shrinks(pool_of, server):
    pool = pool_of(min_size=1, max_size=1)
    pool.open(wait=True)
    pool.resize(4)
    until(lambda: pool.stats().idle == 4, "four")
    with pool.connection(), pool.connection():
        pool.resize(0, 1)
        until(lambda: pool.stats().size == 2, "the idle ones are closed")
        assert pool.stats().in_use == 2
    until(lambda: pool.stats().size == 1, "one")
    assert (pool.stats().min_size, pool.stats().max_size) == (0, 1)
    with pytest.raises(ConfigError, match="min_size"):
        pool.resize(3, 2)


def test_min_size_grows_after_one_connection_has_been_seen_to_work(server, proxy, pool_of):
    proxy.freeze()
    pool = pool_of(server.conninfo(port=proxy.port), min_size=5, max_size=5)
    pool.open()
    with proxy.counting() as count:
        until(lambda: pool.stats().opening == 1, "one is being opened")
    proxy.thaw()
    with proxy.counting() as later:
        until(lambda: pool.stats().idle == 5, "all five")
    assert count.opened <= 1
    assert count.opened + later.opened <= 5
    assert pool.stats().opened == 5


def test_min_size_is_kept_when_connections_are_lost(pool_of, server):
    pool = pool_of(min_size=3, max_size=4)
    pool.open(wait=True)
    for backend in sessions(server, pool):
        server.execute(f"select pg_terminate_backend({backend})")
    until(lambda: pool.stats().closed.get("hung up") == 3, "three hang-ups heard")
    until(lambda: pool.stats().idle == 3, "three again")


def test_connections_are_retired_at_max_lifetime_and_replaced(pool_of):
    pool = pool_of(min_size=2, max_size=2, max_lifetime=0.2)
    pool.open(wait=True)
    until(lambda: pool.stats().closed.get("retired", 0) >= 4, "two lives of both")
    until(lambda: pool.stats().idle == 2, "and two are there")
    assert set(pool.stats().closed) == {"retired"}
    assert pool.execute("select 1").fetchone() == (1,)


def test_what_is_above_min_size_is_closed_after_max_idle(pool_of, server):
    pool = pool_of(min_size=1, max_size=4, max_idle=0.2)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(pool.connection())
    assert pool.stats().size == 4
    until(lambda: pool.stats().closed == {"shrunk": 3}, "three are closed")
    until(lambda: len(sessions(server, pool)) == 1, "one session is left")
    assert pool.stats().idle == 1


def test_a_pool_that_is_garbage_closes_its_sessions(server):
    pool = ConnectionPool(server.conninfo(over="unix"), min_size=3, max_size=3, name="garbage")
    pool.open(wait=True)
    name = pool.name
    del pool
    gc.collect()
    until(
        lambda: (
            not server.execute(
                f"select 1 from pg_stat_activity where application_name like '%/{name}/%'"
            )
        ),
        "its sessions are closed",
        seconds=20,
    )


def test_a_pool_that_is_dropped_while_it_is_lent_closes_when_the_connection_goes(server):
    def session():
        return server.execute(
            "select 1 from pg_stat_activity where application_name like '%/dropped/%'"
        )

    lease = ConnectionPool(server.conninfo(over="unix"), name="dropped").connection()
    conn = lease.__enter__()
    gc.collect()
    assert conn.execute("select 1").fetchone() == (1,)
    lease.__exit__(None, None, None)
    del lease, conn
    gc.collect()
    until(lambda: not session(), "its session is closed", seconds=20)


def test_a_number_that_a_closed_connection_left_to_another_stays_watched(pool_of, server):
    """The first pool lets go of a descriptor whose number the second one's connection has by then."""
    first, second = pool_of(max_size=1), pool_of(max_size=1)
    with first.connection() as conn:
        number = conn.fileno()
        conn.close()
        second.open(wait=True)
        with second.connection() as other:
            backend = other.info.backend_pid
            assert other.fileno() == number, "the system gave another number: nothing is shown"
    until(lambda: first.stats().closed == {"broken": 1}, "the first let go")
    server.execute(f"select pg_terminate_backend({backend})")
    until(lambda: second.stats().closed == {"hung up": 1}, "it was heard", seconds=20)


# -- waiting ------------------------------------------------------------------------------------------


def test_waiters_are_served_in_order(pool_of, borrowers):
    pool = pool_of(max_size=1, timeout=PATIENCE)
    holder = Holder(pool, borrowers)
    order = []

    def wait(number):
        with pool.connection():
            order.append(number)

    for number in range(6):
        borrowers(wait, number)
        until(lambda: pool.stats().waiting == number + 1, "it waits")  # noqa: B023
    assert f"{6} waiting, longest" in repr(pool)
    holder.let_go()
    until(lambda: len(order) == 6, "all served")
    assert order == sorted(order)
    assert pool.stats().queued >= 6


def test_max_waiting_refuses_at_once(pool_of, borrowers):
    pool = pool_of(max_size=1, max_waiting=2)
    holder = Holder(pool, borrowers)
    for number in range(2):
        borrowers(lambda: pool.execute("select 1", timeout=PATIENCE))
        until(lambda: pool.stats().waiting == number + 1, "it waits")  # noqa: B023
    with pytest.raises(TooManyRequests):
        pool.execute("select 1", timeout=PATIENCE)
    assert pool.stats().refused == 1
    holder.let_go()


def test_a_borrower_that_timed_out_leaves_the_queue(pool_of, borrowers):
    pool = pool_of(max_size=1)
    holder = Holder(pool, borrowers)
    with pytest.raises(PoolTimeout) as caught:
        pool.execute("select 1", timeout=0.2)
    assert (caught.value.timeout, pool.stats().waiting, pool.stats().timeouts) == (0.2, 0, 1)
    assert caught.value.waited >= 0.2
    holder.let_go()
    assert pool.execute("select 1", timeout=0).fetchone() == (1,)


def test_the_connection_that_an_impatient_borrower_caused_serves_the_next(pool_of, server, proxy):
    proxy.freeze()
    pool = pool_of(server.conninfo(port=proxy.port), max_size=4)
    with proxy.counting() as count:
        with pytest.raises((PoolTimeout, ServerUnavailable)):
            pool.execute("select 1", timeout=0.2)
        proxy.thaw()
        until(lambda: pool.stats().idle == 1, "it is there, though nobody waits")
        assert pool.execute("select 1", timeout=0).fetchone() == (1,)
    assert count.opened == pool.stats().opened == 1


@pytest.mark.parametrize("wrong", ["soon", True, [1]])
def test_a_timeout_that_is_no_number_is_refused(wrong, pool_of):
    with pytest.raises(ConfigError, match="timeout"):
        pool_of().connection(timeout=wrong).__enter__()


# -- one deadline over all --------------------------------------------------------------------------


def took(call):
    began = time.monotonic()
    with pytest.raises((PoolTimeout, ServerUnavailable)) as caught:
        call()
    seconds = time.monotonic() - began
    print(f"{seconds:.2f} s: {caught.value}")
    assert 0.4 < seconds < 5, "not at its timeout of 0.5 s"
    return caught.value


def test_a_deaf_port_takes_no_more_than_the_borrowers_time(pool_of):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts in the kernel, never answers
        pool = pool_of(f"host=127.0.0.1 port={deaf.getsockname()[1]} user=x dbname=x")
        took(lambda: pool.execute("select 1", timeout=0.5))
        took(lambda: pool.open(wait=True, timeout=0.5))
        took(lambda: pool.dedicated(timeout=0.5).__enter__())
        assert pool.stats().opening <= 2, "one, and a second beside it once it was silent for 1 s"


def test_a_slow_name_look_up_takes_no_more_than_the_borrowers_time(pool_of, monkeypatch):
    go_on = threading.Event()

    def slowly(*arguments, **options):
        go_on.wait(PATIENCE)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    pool = pool_of("host=slow.example user=x dbname=x")
    try:
        took(lambda: pool.execute("select 1", timeout=0.5))
        took(lambda: pool.dedicated(timeout=0.5).__enter__())
    finally:
        go_on.set()
    until(lambda: pool.stats().opening == 0 or pool.stats().open_failures, "the look-up ended")
    with pytest.raises(ServerUnavailable, match="could not resolve"):
        pool.execute("select 1", timeout=1)


# -- what a pool is made from -----------------------------------------------------------------------


def test_conninfo_and_kwargs_are_called_for_each_connect(pool_of, server):
    calls = []

    def conninfo():
        calls.append("conninfo")
        return server.conninfo(over="unix")

    def kwargs():
        calls.append("kwargs")
        return {"options": f"-c app.call={calls.count('kwargs')}"}

    pool = pool_of(conninfo, kwargs=kwargs, max_size=3)
    with pool.connection() as one, pool.connection() as two:
        shown = [c.execute("show app.call").fetchone()[0] for c in (one, two)]
    assert sorted(shown) == ["1", "2"]
    assert sorted(calls) == ["conninfo", "conninfo", "kwargs", "kwargs"]
    with pool.dedicated() as conn:
        assert conn.execute("show app.call").fetchone() == ("3",)


def test_a_token_that_changed_is_used_for_the_next_connect(pool_of, server):
    server.execute("create role t1 login; create role t2 login")
    user = ["t1"]
    pool = pool_of(lambda: server.conninfo(user=user[0], over="unix"), max_size=1)
    assert pool.execute("select session_user::text").fetchone() == ("t1",)
    user[0] = "t2"
    pool.drain()
    assert pool.execute("select session_user::text").fetchone() == ("t2",)
    pool.close()
    until(lambda: not sessions(server, pool))
    server.execute("drop role t1; drop role t2")


class MyConnection(psycopg.Connection):
    def greet(self):
        return self.execute("select 'hello'").fetchone()


def test_a_connection_class_and_options_of_the_driver_are_used(pool_of):
    pool = pool_of(
        connection_class=MyConnection,
        kwargs={"row_factory": dict_row, "prepare_threshold": None, "autocommit": True},
    )
    with pool.connection() as conn:
        assert isinstance(conn, MyConnection)
        assert conn.greet() == {"?column?": "hello"}
        assert (conn.autocommit, conn.prepare_threshold) == (True, None)
    assert pool.execute("select 1 as n").fetchone() == {"n": 1}


def test_client_side_settings_do_not_reach_the_next_borrower(pool_of):
    pool = pool_of(max_size=1, kwargs={"row_factory": dict_row})
    with pool.connection() as conn:
        conn.row_factory = psycopg.rows.tuple_row
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        conn.prepare_threshold = 1
        assert conn.execute("select 1 as n").fetchone() == (1,)
    with pool.connection() as conn:
        assert conn.execute("select 1 as n").fetchone() == {"n": 1}
        assert (conn.isolation_level, conn.prepare_threshold) == (None, 5)


def test_the_server_shows_program_pool_and_process(pool_of, server):
    pool = pool_of(name="who am I")
    (name,) = pool.execute("show application_name").fetchone()
    assert name.endswith(f"/who am I/{os.getpid()}")
    named = pool_of(server.conninfo(over="unix", application_name="mine"))
    assert named.execute("show application_name").fetchone() == ("mine",)


def test_a_pickled_pool_is_a_fresh_one_with_the_same_options(server):
    pool = ConnectionPool(server.conninfo(over="unix"), min_size=2, max_size=3, name="pickled")
    with pool:
        pool.execute("select 1")
        copy = pickle.loads(pickle.dumps(pool))
        assert repr(copy) == "<ConnectionPool 'pickled' new: 0 idle, 0 in use, 0 opening of 3>"
        with copy:
            assert copy.execute("select 1").fetchone() == (1,)
            until(lambda: (copy.stats().idle, pool.stats().idle) == (2, 2), "two each")


def test_a_wrong_option_is_told_when_the_pool_is_made():
    with pytest.raises(ConfigError, match="did you mean 'max_size'"):
        ConnectionPool("", maxsize=3)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="min_size"):
        ConnectionPool("", min_size=3, max_size=2)


# -- what can be read ---------------------------------------------------------------------------------


def test_stats_count_what_happened(pool_of):
    pool = pool_of(max_size=2)
    pool.open(wait=True)
    before = pool.stats().borrows
    for _ in range(10):
        with pool.connection():
            pass
    with pool.connection(), pool.connection():
        stats = pool.stats()
        assert (stats.in_use, stats.idle, stats.size) == (2, 0, 2)
    stats = pool.stats()
    assert stats.borrows - before == 12
    assert (stats.opened, stats.open_failures, stats.timeouts, stats.orphaned) == (2, 0, 0, 0)
    assert stats.opening_time > 0
    assert stats.name == pool.name


def test_health_tells_from_state_alone(pool_of):
    pool = pool_of(max_size=1)
    assert pool.health()
    assert "not opened yet" in pool.health().why
    with pool.connection():
        health = pool.health()
        assert (health.live, health.ready) == (True, True)
        assert health.why == "1 of 1 in use, 0 waiting"
    pool.close()
    assert (pool.health().live, pool.health().why) == (False, "closed")


def test_misuse_leaves_the_pool_as_it_was(pool_of, caplog):
    caplog.set_level(logging.ERROR)
    pool = pool_of(max_size=1)
    pool.open(wait=True)
    with pytest.raises(MisuseError):
        pool.putconn(object())
    assert pool.stats().idle == 1
    assert caplog.text == ""
