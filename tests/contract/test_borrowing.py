"""What every runtime promises its borrowers, over a server that does as it is told."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import threading

import pytest

from penstock import (
    ConfigError,
    ConnectionPool,
    MisuseError,
    PenstockError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    TooManyRequests,
)
from penstock.testing import FakeDriver, FakeOperationalError, Mode
from tests.contract.conftest import Borrower


def test_making_a_pool_opens_nothing(make_pool, server):
    pool = make_pool(min_size=3)
    assert server.connects == 0
    assert "new: 0 idle, 0 in use, 0 opening of 10" in repr(pool)


def test_the_first_borrow_opens_the_pool_up_to_min_size(make_pool, server, until):
    pool = make_pool(min_size=3)
    with pool.connection() as conn:
        conn.execute("select 1")
    until(lambda: pool.stats().idle == 3)
    assert server.connects == 3


def test_a_returned_connection_is_lent_again_the_last_one_first(make_pool):
    pool = make_pool(min_size=0)
    first, second = Borrower(pool).wait(), Borrower(pool).wait()
    first.end()
    second.end()
    with pool.connection() as conn:
        assert conn is second.conn


def test_in_fifo_order_the_longest_idle_connection_is_lent_first(make_pool):
    pool = make_pool(min_size=0, order="fifo")
    first, second = Borrower(pool).wait(), Borrower(pool).wait()
    first.end()
    second.end()
    with pool.connection() as conn:
        assert conn is first.conn


def test_what_was_begun_is_committed_at_the_end(make_pool, server):
    pool = make_pool()
    with pool.connection() as conn:
        conn.execute("insert")
    assert [text for _, text in server.statements] == ["insert", "COMMIT"]


def test_what_was_begun_is_rolled_back_on_an_exception(make_pool, server):
    pool = make_pool()
    with pytest.raises(ZeroDivisionError), pool.connection() as conn:
        conn.execute("insert")
        _ = 1 / 0
    assert [text for _, text in server.statements] == ["insert", "ROLLBACK"]
    assert pool.stats().idle == 1


def test_nothing_is_sent_when_nothing_was_begun(make_pool, server):
    pool = make_pool()
    with pool.connection():
        pass
    assert server.statements == []
    assert server.pings == 0


def test_execute_is_one_statement_and_no_transaction(make_pool, server):
    pool = make_pool()
    server.answers["select 7"] = [(7,)]
    result = pool.execute("select 7")
    assert result.fetchone() == (7,)
    assert result.fetchone() is None
    assert [text for _, text in server.statements] == ["select 7"]


def test_a_commit_that_fails_is_raised_and_the_connection_goes_back(make_pool, server):
    pool = make_pool(min_size=0)
    with pytest.raises(FakeOperationalError), pool.connection() as conn:
        conn.execute("insert")
        server.hang_up()
    assert pool.execute("select 1").fetchall() == [(1,)]
    assert pool.stats().in_use == 0


def test_autocommit_of_one_borrow_does_not_reach_the_next(make_pool):
    pool = make_pool(max_size=1)
    with pool.connection(autocommit=True) as conn:
        assert conn.autocommit is True
    with pool.connection() as conn:
        assert conn.autocommit is False
        conn.autocommit = True
    with pool.connection() as conn:
        assert conn.autocommit is False


def test_a_waiter_is_handed_the_connection_that_comes_back(make_pool, until):
    pool = make_pool(max_size=1)
    holder = Borrower(pool).wait()
    waiter = Borrower(pool)
    until(lambda: pool.stats().waiting == 1)
    holder.end()
    assert waiter.wait().conn is holder.conn
    waiter.end()


def test_waiters_are_served_in_the_order_they_came(make_pool, until):
    pool = make_pool(max_size=1)
    holder = Borrower(pool).wait()
    waiters = []
    for number in range(8):
        waiters.append(Borrower(pool))
        until(lambda wanted=number + 1: pool.stats().waiting == wanted)
    holder.end()
    for position, waiter in enumerate(waiters):
        waiter.wait()
        assert not any(later.has.is_set() for later in waiters[position + 1 :])
        waiter.end()


def test_a_pool_grows_to_max_size_and_no_further(make_pool, server, until):
    pool = make_pool(min_size=0, max_size=3)
    borrowers = [Borrower(pool) for _ in range(5)]
    until(lambda: pool.stats().in_use == 3 and pool.stats().waiting == 2)
    assert len(server.sessions) == 3
    for borrower in borrowers:
        borrower.may_end.set()
    for borrower in borrowers:
        borrower.end()
        assert borrower.error is None
    assert server.connects == 3


def test_a_full_pool_says_so_with_counts_and_who_holds_what(make_pool):
    pool = make_pool(max_size=1, name="shop")
    holder = Borrower(pool).wait()
    with pytest.raises(PoolTimeout) as caught:
        pool.getconn(timeout=0.01)
    text = str(caught.value)
    assert "no connection within 0.0 s from pool 'shop': 1 of 1 in use" in text
    assert "test_borrowing.py" in text or "conftest.py" in text
    assert caught.value.counts.in_use == 1
    assert pool.stats().waiting == 0
    holder.end()


def test_timeout_zero_takes_what_is_free_and_waits_for_nothing(make_pool):
    pool = make_pool(max_size=1)
    pool.open(wait=True)
    with pool.connection(timeout=0):
        holder = Borrower(pool, timeout=0).wait()
    assert isinstance(holder.error, PoolTimeout)


def test_a_server_that_is_down_is_told_from_a_full_pool(make_pool, server):
    pool = make_pool()
    server.mode = Mode.DOWN
    with pytest.raises(ServerUnavailable) as caught:
        pool.getconn(timeout=0.2)
    assert isinstance(caught.value, FakeOperationalError)
    assert isinstance(caught.value.__cause__, FakeOperationalError)
    assert "connection refused" in str(caught.value)


def test_a_wrong_password_is_told_at_once_after_one_attempt(make_pool, server):
    pool = make_pool(min_size=4)
    server.mode = Mode.WRONG_PASSWORD
    with pytest.raises(ServerUnavailable) as caught:
        pool.open(wait=True)
    assert caught.value.sqlstate == "28P01"
    assert server.connects == 1


def test_too_many_waiters_are_refused_at_once(make_pool, until):
    pool = make_pool(max_size=1, max_waiting=1)
    holder = Borrower(pool).wait()
    waiter = Borrower(pool)
    until(lambda: pool.stats().waiting == 1)
    with pytest.raises(TooManyRequests) as caught:
        pool.getconn()
    assert caught.value.max_waiting == 1
    holder.end()
    waiter.end()


def test_a_waiter_whose_time_is_up_is_not_counted_any_more(make_pool):
    pool = make_pool(max_size=1, max_waiting=1)
    holder = Borrower(pool).wait()
    for _ in range(3):
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0.001)
    assert pool.stats().timeouts == 3
    holder.end()


def test_a_borrower_that_would_wait_for_itself_is_told_at_once(make_pool):
    pool = make_pool(max_size=2)
    with pool.connection() as one, pool.connection() as two:
        with pytest.raises(MisuseError, match="wait for itself"):
            pool.getconn()
        assert one is not two
    with pool.connection():
        pass


def test_two_borrowers_that_would_wait_for_each_other_are_told(make_pool, until):
    pool = make_pool(max_size=2)
    other_has, both_have = threading.Event(), threading.Event()
    ended: list[object] = []

    def other():
        with pool.connection() as held:
            assert not held.closed
            other_has.set()
            both_have.wait(20)
            try:
                with pool.connection():
                    ended.append("served")
            except PenstockError as error:
                ended.append(error)

    thread = threading.Thread(target=other)
    with pool.connection() as mine:
        assert not mine.closed
        thread.start()
        assert other_has.wait(20)
        both_have.set()
        until(lambda: pool.stats().waiting == 1)
        with pytest.raises(MisuseError, match="wait for itself"):
            pool.getconn()
    thread.join(20)
    assert ended == ["served"]


def test_a_closed_pool_says_that_it_is_closed(make_pool):
    pool = make_pool()
    pool.open(wait=True)
    pool.close()
    with pytest.raises(PoolClosed, match="was closed"):
        pool.getconn()
    assert pool.closed


def test_closing_wakes_those_who_wait(make_pool, until):
    pool = make_pool(max_size=1)
    holder = Borrower(pool).wait()
    waiter = Borrower(pool)
    until(lambda: pool.stats().waiting == 1)
    closer = threading.Thread(target=pool.close)
    closer.start()
    assert isinstance(waiter.wait().error, PoolClosed)
    holder.end()
    closer.join(20)
    assert pool.stats().size == 0


def test_a_closed_pool_can_be_opened_again(make_pool):
    pool = make_pool()
    pool.open(wait=True)
    pool.close()
    pool.open()
    assert pool.execute("select 1").fetchall() == [(1,)]


def test_a_pool_that_must_be_opened_says_so(make_pool):
    pool = make_pool(open=False)
    with pytest.raises(PoolClosed, match="call open"):
        pool.getconn()
    pool.open()
    with pool.connection():
        pass


def test_an_idle_connection_that_the_server_ended_is_not_lent(make_pool, server, until):
    pool = make_pool(min_size=3, max_size=3)
    pool.open(wait=True)
    server.hang_up()
    until(lambda: pool.stats().closed.get("hung up") == 3)
    for _ in range(10):
        assert pool.execute("select 1").fetchall() == [(1,)]
    assert server.pings == 0


def test_a_session_that_ends_in_use_has_the_older_ones_pinged(make_pool, server, until):
    pool = make_pool(min_size=2, max_size=2)
    pool.open(wait=True)
    with pytest.raises(FakeOperationalError), pool.connection() as conn:
        raise FakeOperationalError("terminating connection", "57P01")
    with pool.connection():
        pass
    assert server.pings == 1
    until(lambda: conn.closed)


def test_a_connection_idle_for_longer_than_ping_after_is_pinged_once(make_pool, server):
    pool = make_pool(ping_after=0)
    pool.open(wait=True)
    before = server.pings
    pool.execute("select 1")
    assert server.pings == before + 1


def test_a_ping_without_an_answer_is_not_the_borrowers_trouble(make_pool, server, until):
    pool = make_pool(min_size=0, ping_after=0)
    pool.execute("select 1")
    session = next(iter(server.sessions.values()))
    session._server_hangs_up = lambda: None
    session.ping = lambda _seconds: False
    assert pool.execute("select 1").fetchall() == [(1,)]
    until(lambda: pool.stats().closed == {"ping unanswered": 1})


def test_a_lease_that_was_dropped_comes_home_and_its_connection_is_replaced(make_pool, until):
    pool = make_pool(min_size=0, max_size=1)
    lease = pool.connection()
    conn = lease.__enter__()
    del lease
    gc.collect()
    until(lambda: pool.stats().orphaned == 1 and pool.stats().size == 0)
    with pool.connection() as other:
        assert other is not conn


def test_a_connection_given_back_twice_is_refused(make_pool):
    pool = make_pool()
    conn = pool.getconn()
    pool.putconn(conn)
    with pytest.raises(MisuseError, match="not lent"):
        pool.putconn(conn)


def test_a_connection_of_another_pool_is_refused(make_pool):
    one, two = make_pool(), make_pool()
    conn = one.getconn()
    with pytest.raises(MisuseError):
        two.putconn(conn)
    one.putconn(conn)


def test_a_transaction_left_open_is_rolled_back_with_a_warning(make_pool, server, caplog):
    pool = make_pool(name="shop")
    conn = pool.getconn()
    conn.execute("insert")
    pool.putconn(conn)
    assert server.statements[-1][1] == "ROLLBACK"
    assert "given back idle in transaction: rolled back" in caplog.text


def test_draining_replaces_idle_connections_now_and_lent_ones_at_their_return(make_pool, until):
    pool = make_pool(min_size=2, max_size=2)
    pool.open(wait=True)
    holder = Borrower(pool).wait()
    pool.drain()
    until(lambda: pool.stats().closed.get("drained") == 1)
    holder.end()
    until(lambda: pool.stats().closed.get("drained") == 2 and pool.stats().idle == 2)
    assert pool.stats().generation == 1


def test_resizing_closes_what_is_too_much_and_opens_what_is_missing(make_pool, until):
    pool = make_pool(min_size=4, max_size=4)
    pool.open(wait=True)
    holder = Borrower(pool).wait()
    pool.resize(1, 2)
    until(lambda: pool.stats().size == 2)
    holder.end()
    pool.resize(3)
    until(lambda: pool.stats().idle == 3)
    assert pool.stats().max_size == 3
    with pytest.raises(ConfigError):
        pool.resize(5, 2)


def test_a_pool_travels_to_another_process_as_a_new_pool_with_its_options(server):
    pytest.importorskip(
        "psycopg", reason="only a driver by name travels, and each needs its library"
    )
    pool = ConnectionPool("host=db", min_size=2, max_size=7, name="shop")
    copy = pickle.loads(pickle.dumps(pool))
    assert repr(copy) == repr(pool)
    assert copy.stats().min_size == 2


def test_every_borrow_can_be_prepared_by_on_borrow_and_refused_by_check(make_pool, until):
    seen: list[object] = []
    refused: list[object] = []

    def check(conn):
        if not refused:
            refused.append(conn)
            raise FakeOperationalError("I do not like it")

    pool = make_pool(min_size=0, on_borrow=seen.append, check=check)
    with pool.connection() as conn:
        assert seen == [conn]
        assert conn is not refused[0]
    until(lambda: pool.stats().closed == {"unclean": 1})


def test_on_borrow_that_raises_is_raised_and_the_connection_goes_back(make_pool):
    def refuse(conn):
        raise ValueError("no")

    pool = make_pool(on_borrow=refuse)
    with pytest.raises(ValueError, match="no"):
        pool.getconn()
    assert pool.stats().in_use == 0


def test_a_session_reset_is_sent_at_the_return_and_read_by_the_next_borrower(make_pool, server):
    pool = make_pool(max_size=1, reset="session")
    for _ in range(3):
        with pool.connection() as conn:
            conn.execute("select 1")
    assert [text for _, text in server.statements].count("RESET") == 2


def test_a_reset_callable_cleans_every_returned_connection(make_pool):
    cleaned: list[object] = []
    pool = make_pool(max_size=1, reset=cleaned.append)
    with pool.connection() as conn:
        pass
    assert cleaned == [conn]


def test_a_reset_callable_that_raises_costs_the_connection(make_pool, caplog):
    def reset(conn):
        raise ValueError("cannot")

    pool = make_pool(min_size=0, reset=reset)
    with pool.connection():
        pass
    assert "reset= raised" in caplog.text
    with pool.connection():
        pass
    assert pool.stats().in_use == 0


def test_configure_runs_once_per_connection_and_its_failure_is_the_cause(make_pool, server):
    def configure(conn):
        raise ValueError("a bug in it")

    pool = make_pool(configure=configure)
    with pytest.raises(ServerUnavailable) as caught:
        pool.open(wait=True)
    assert isinstance(caught.value.__cause__, ValueError)
    assert not server.sessions


def test_configure_that_leaves_a_transaction_is_told(make_pool, server):
    pool = make_pool(configure=lambda conn: conn.execute("set x"))
    with pytest.raises(ServerUnavailable, match="idle in transaction"):
        pool.open(wait=True)
    assert not server.sessions


def test_a_dedicated_connection_does_not_count(make_pool, server):
    pool = make_pool(max_size=1)
    with pool.connection(), pool.dedicated() as conn:
        conn.execute("listen")
        assert pool.stats().size == 1
        assert len(server.sessions) == 2
    assert len(server.sessions) == 1


def test_health_tells_down_from_busy(make_pool, server):
    pool = make_pool(min_size=1, max_size=1)
    with pool.connection():
        health = pool.health()
        assert health.ready
        assert "1 of 1 in use" in health.why
    server.mode = Mode.DOWN
    with pytest.raises(PenstockError):
        Borrower(pool, timeout=0.2).wait().end()
        pool.getconn(timeout=0.2)
    health = pool.health()
    assert health.live
    assert not health.ready
    assert "connection refused" in health.why
    pool.close()
    assert not pool.health().live


def test_waiters_are_served_when_the_server_is_back(make_pool, server, until):
    pool = make_pool(max_size=2)
    server.mode = Mode.DOWN
    waiters = [Borrower(pool) for _ in range(5)]
    until(lambda: pool.stats().open_failures >= 2)
    server.mode = Mode.UP
    for waiter in waiters:
        waiter.may_end.set()
    for waiter in waiters:
        assert waiter.end().error is None


def test_a_borrower_leaving_early_does_not_cancel_the_opening_it_caused(make_pool, server, until):
    pool = make_pool(min_size=0)
    server.mode = Mode.SLOW
    with pytest.raises(PenstockError):
        pool.getconn(timeout=0.01)
    server.admit()
    until(lambda: pool.stats().idle == 1)


def test_a_lease_overdue_is_told_once_with_its_place(make_pool, caplog, until):
    pool = make_pool(overdue_after=0.01, name="shop")
    holder = Borrower(pool).wait()
    until(lambda: "has been lent for" in caplog.text)
    assert "conftest.py" in caplog.text
    holder.end()


def test_unused_connections_are_closed_down_to_min_size(make_pool, until):
    pool = make_pool(min_size=1, max_size=4, max_idle=0.01)
    for borrower in [Borrower(pool) for _ in range(4)]:
        borrower.wait().end()
    until(lambda: pool.stats().size == 1)
    assert pool.stats().closed.keys() <= {"shrunk"}


def test_old_connections_are_replaced_while_idle(make_pool, server, until):
    pool = make_pool(min_size=1, max_lifetime=0.01)
    pool.open(wait=True)
    until(lambda: pool.stats().closed.get("retired", 0) >= 2)


def test_a_dropped_pool_lets_go_of_its_connections(server):
    pool = ConnectionPool(driver=FakeDriver(server), min_size=1)
    pool.execute("select 1")
    link = next(iter(server.sessions.values()))
    server.sessions.clear()
    assert link.fd >= 0
    del pool
    gc.collect()


def test_a_closed_connections_number_used_again_does_not_cost_the_new_one_its_watch(server):
    """libpq closes a broken connection's socket by itself: another may have the number already."""
    from penstock import watch

    told = []
    watcher = watch.Watch(lambda token, _fd: told.append(token))
    one, two = server_socket_pairs()
    first = watcher.add(one[0].fileno(), "old")
    number = one[0].fileno()
    one[0].close()
    os.dup2(two[0].fileno(), number)
    second = watcher.add(number, "new")
    watcher.remove(number, first)
    two[1].close()
    watcher.sweep()
    assert second != first
    assert "new" in told
    watcher.close()
    os.close(number)
    two[0].close()
    one[1].close()


def server_socket_pairs():
    return socket.socketpair(), socket.socketpair()


def test_the_pool_unwatches_a_connection_by_its_serial(make_pool, monkeypatch, until):
    from penstock import watch

    removed = []
    remove = watch.Watch.remove

    def noting(self, fd, serial=0):
        removed.append(serial)
        return remove(self, fd, serial)

    monkeypatch.setattr(watch.Watch, "remove", noting)
    pool = make_pool(min_size=0)
    pool.execute("select 1")
    pool.drain()
    until(lambda: pool.stats().size == 0)
    assert len(removed) == 1
    assert removed[0] > 0


def test_where_nothing_watches_each_borrow_looks_at_the_socket(make_pool, server, monkeypatch):
    from penstock import watch

    monkeypatch.setattr(watch, "available", lambda: False)
    pool = make_pool(min_size=0, max_size=2)
    for borrower in [Borrower(pool), Borrower(pool)]:
        borrower.wait()
        borrower.end()
    monkeypatch.setattr(watch.Watch, "add", lambda _self, _fd, _token: 0)
    pool.drain()
    pool.execute("select 1")
    server.hang_up()
    assert pool.execute("select 1").fetchall() == [(1,)]
    assert server.pings == 0


def test_settings_are_for_one_transaction(make_pool, server):
    pool = make_pool()
    with pool.connection(settings={"app.user": "ann"}) as conn:
        conn.execute("select 1")
    assert [text for _, text in server.statements] == ["set app.user", "select 1", "COMMIT"]
    with pytest.raises(MisuseError, match="settings= was asked for with autocommit"):
        pool.connection(autocommit=True, settings={"app.user": "ann"}).__enter__()


def test_a_check_that_gets_no_answer_ends_at_the_borrowers_timeout(make_pool, server):
    def check(conn):
        server.mode = Mode.HANGING
        conn.execute("select 1")

    pool = make_pool(check=check)
    with pytest.raises(PenstockError):
        pool.getconn(timeout=0.3)
    server.mode = Mode.UP


def test_a_reset_that_gets_no_answer_costs_the_connection_and_not_the_borrower(
    make_pool, server, monkeypatch, until
):
    monkeypatch.setattr("penstock.borrowing.TIDY_SECONDS", 0.2)

    def reset(conn):
        server.mode = Mode.HANGING
        conn.execute("select 1")

    pool = make_pool(min_size=0, reset=reset)
    with pool.connection():
        pass
    server.mode = Mode.UP
    until(lambda: pool.stats().closed == {"unclean": 1})


def test_a_pool_that_nobody_has_tried_since_an_outage_is_ready(make_pool, server):
    pool = make_pool(min_size=0)
    server.mode = Mode.DOWN
    with pytest.raises(ServerUnavailable):
        pool.getconn(timeout=0.1)
    health = pool.health()
    assert health.ready
    assert "nobody has tried since" in health.why


def test_a_lease_that_another_thread_will_end_is_no_deadlock(make_pool, until):
    """Executors run the two halves of a dependency in different threads."""
    pool = make_pool(max_size=1)
    entered = threading.Event()
    served = []

    def enter(lease):
        lease.__enter__()
        entered.set()
        # The same thread asks again, for another request, while the first one is still on its way.
        with pool.connection() as conn:
            served.append(conn)

    lease = pool.connection()
    thread = threading.Thread(target=enter, args=(lease,))
    thread.start()
    assert entered.wait(20)
    until(lambda: pool.stats().waiting == 1)
    lease.__exit__(None, None, None)
    thread.join(20)
    assert len(served) == 1


def test_a_child_that_leaves_the_parents_block_ends_nothing(make_pool, server):
    pool = make_pool()
    with pool.connection() as conn:
        conn.execute("insert")
        pool.after_fork_in_child()  # as the hook does, in this very process
    assert [text for _, text in server.statements] == ["insert"]
    server.sessions.clear()


def test_a_bug_in_a_callable_is_told_from_a_server_that_is_down(make_pool):
    settings: dict[str, str] = {}
    pool = make_pool(conninfo=lambda: settings["dsn"])
    with pytest.raises(ServerUnavailable, match="look at the callable") as caught:
        pool.getconn()
    assert isinstance(caught.value.__cause__, KeyError)


def test_close_may_wait_as_long_as_it_takes(make_pool):
    pool = make_pool()
    pool.open(True)
    holder = Borrower(pool).wait()
    closer = threading.Thread(target=pool.close, args=(None,))
    closer.start()
    holder.end()
    closer.join(20)
    assert not closer.is_alive()


def test_a_borrower_that_would_wait_for_itself_is_told_without_a_variable_too(make_pool):
    pool = make_pool(max_size=1)
    with pytest.raises(MisuseError), pool.connection(), pool.connection():
        pass
    with pool.connection(), pytest.raises(MisuseError, match="wait for itself"):
        pool.getconn()
    with pool.connection():
        pass
