"""What no other test noticed when it was planted (tests/planted), of pools of threads and their keeper."""

import os
import queue
import threading
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import ConnectionPool, MisuseError, ServerUnavailable
from penstock._machine.machine import Waiter
from penstock._machine.orders import Close
from penstock._machine.slot import Reason, SlotState
from penstock._pool.sync import executor
from penstock._pool.sync.dedicated import Opening
from penstock._process import fork, keeper, runtime, sockets
from penstock._process.watchdog import Alarm
from penstock.drivers import Activity
from penstock.testing import FakeDriver
from penstock.testing.fakes import FakeLink
from tests.forks import Child, until

PATIENCE = 10.0  # seconds: the price of a failure


@pytest.fixture
def pool(fake):
    """One connection, open and idle."""
    with ConnectionPool(driver=FakeDriver(fake), min_size=1, max_size=1, name="one") as made:
        made.execute("select 1")
        yield made


def test_what_comes_at_the_very_last_moment_is_his_who_waited_for_it(pool):
    conn = pool.getconn()
    waiter = Waiter(0, list)
    pool._queue_up(waiter, inf)
    pool.putconn(conn)
    slot = pool._time_out(waiter)
    assert slot is not None and slot.link.conn is conn
    assert pool.stats().timeouts == 0


def test_who_waits_for_what_another_thread_will_put_back_is_served(pool):
    conn = pool.getconn()

    def put_back():
        until(lambda: pool.stats().waiting == 1, seconds=PATIENCE)
        pool.putconn(conn)

    helper = threading.Thread(target=put_back)
    helper.start()
    assert pool.getconn(timeout=PATIENCE) is conn
    helper.join()
    pool.putconn(conn)


def test_a_dedicated_connection_that_nobody_waits_for_any_more_is_closed():
    closed = []
    link = SimpleNamespace(lend=None, close=lambda: closed.append(True))
    opener: Any = SimpleNamespace(open=lambda _seconds, progress: link)
    opening = Opening(opener, 0.0)
    reporter: Any = SimpleNamespace(not_opened=lambda _answer, _seconds: TimeoutError())
    with pytest.raises(TimeoutError):
        opening.wait(reporter)
    opening.run()
    assert closed


def test_who_closes_a_pool_does_not_wait_for_the_connection_that_he_holds(pool, caplog):
    with pool.connection():
        pool.close(timeout=0.2)
    assert "still lent" not in caplog.text


def test_whatever_strikes_the_keeper_it_does_what_it_was_told_before():
    kept, go_on, done = keeper.current(), threading.Event(), threading.Event()

    def strike():
        raise SystemExit

    kept.tell(lambda: go_on.wait(PATIENCE))
    kept.tell(strike)
    kept.tell(done.set)
    go_on.set()  # from here on nobody starts it again
    assert done.wait(PATIENCE)


def test_an_exit_in_a_callable_of_the_users_is_a_failed_connect(fake):
    def leave():
        raise SystemExit("no token")

    with (
        ConnectionPool(leave, driver=FakeDriver(fake), timeout=PATIENCE) as pool,
        pytest.raises(ServerUnavailable) as caught,
        pool.connection(),
    ):
        pass
    assert isinstance(caught.value.__cause__, SystemExit)


def test_a_worker_that_wants_to_leave_stays_for_a_job_that_has_come():
    kept = keeper.Keeper()
    assert not kept._stay()
    kept._jobs.put(print)
    assert kept._stay()


def test_after_a_fork_the_parents_keeper_works_at_once():
    kept = keeper.current()
    began = threading.Event()
    kept.tell(began.set)
    assert began.wait(PATIENCE)
    kept.park(PATIENCE)
    assert kept._thread is None, "its thread runs on in the fork"
    kept.unpark()
    done = threading.Event()
    kept.tell(done.set)
    assert done.wait(PATIENCE)


def test_an_alarm_that_comes_when_the_work_has_ended_harms_nobody():
    struck = []
    link = SimpleNamespace(discard=lambda: struck.append(True))
    with Alarm(link, PATIENCE) as alarm:
        pass
    alarm.ring()
    assert not alarm.rang and not struck


def test_the_end_of_another_number_condemns_nobody(pool):
    [slot] = pool._machine.slots()
    executor._told_of_end(slot.ref, slot.link.fd + 1)
    assert slot.condemned is None
    executor._told_of_end(slot.ref, slot.link.fd)
    assert slot.condemned is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_of_a_fork_in_the_middle_of_a_move_has_a_pool_that_works(pool):
    held: queue.SimpleQueue[None] = queue.SimpleQueue()
    leave = threading.Event()

    def move():
        with pool._lock:
            held.put(None)
            leave.wait(PATIENCE)

    other = threading.Thread(target=move)
    other.start()
    held.get()

    def stats_under_the_lock():
        pool.drain()
        return pool.stats().generation

    child = Child(stats_under_the_lock)
    leave.set()
    other.join()
    assert child.answer(PATIENCE) == 2  # by the fork, and by drain()


def test_a_keeper_that_replaces_another_keeps_its_timers(pool, monkeypatch):
    former = keeper.Keeper()
    former._timers[pool._machine.home] = 1e12
    monkeypatch.setattr(keeper, "_keepers", [former])
    keeper._replace(former)
    successor = keeper._keepers[0]
    assert successor is not former
    assert successor._timers == {pool._machine.home: 1e12}
    monkeypatch.setattr(keeper.Keeper, "_leave", lambda self: False)
    successor.inbox.put(keeper._stop)
    # Before the patch is undone: else it goes on, and later tests find a keeper too many.
    runner: Any = successor._thread
    runner.join(PATIENCE)
    assert not runner.is_alive()


def test_a_connection_whose_configure_raised_is_closed(fake):
    def configure(_conn):
        raise ZeroDivisionError

    with ConnectionPool(driver=FakeDriver(fake), configure=configure, timeout=PATIENCE) as pool:
        with pytest.raises(ServerUnavailable), pool.connection():
            pass
        until(lambda: not fake.sessions)


def test_a_block_that_is_left_twice_gives_back_once(make_pool):
    pool = make_pool(max_size=1)
    lease = pool.connection()
    with lease:
        pass
    with pytest.raises(MisuseError, match="left before"):
        lease.__exit__(None, None, None)
    assert len(pool._machine.idle) == 1


def test_what_an_interrupted_waiter_was_given_goes_on_as_it_is(pool, monkeypatch):
    conn = pool.getconn()

    def wait(waiter, _gate, _seconds, _began):
        pool.putconn(conn)
        assert waiter.slot is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_wait", wait)
    with pytest.raises(KeyboardInterrupt):
        pool.getconn()
    monkeypatch.undo()
    pool.execute("select 1")
    stats = pool.stats()
    assert (stats.orphaned, stats.opened) == (0, 1)


def test_a_ping_leaves_half_of_the_borrowers_time_for_another_connection(pool):
    given: list[float] = []
    link = SimpleNamespace(ping=given.append)
    pool._make_sure(link, 3.0, reset_pending=False)
    pool._make_sure(link, 60.0, reset_pending=False)
    pool._make_sure(link, 0.0, reset_pending=False)
    assert given == [1.5, 5.0, 0.1]


def test_each_lease_looks_whether_the_process_was_forked(make_pool, monkeypatch):
    pool = make_pool(max_size=1)
    pool.execute("select 1")
    noticed = []

    def notice():
        noticed.append(os.getpid())
        fork.page[0] = 1

    monkeypatch.setattr(fork, "noticed", notice)
    fork.page[0] = 0
    try:
        with pool.connection():
            assert noticed
    finally:
        fork.page[0] = 1


def test_a_move_that_was_cut_off_is_done_by_the_keeper(pool):
    conn = pool.getconn()
    waiter = Waiter(0, list)
    pool._queue_up(waiter, inf)
    [slot] = pool._machine.slots()
    link: Any = slot.link
    pool._getconns.clear()
    link.park()
    slot.state = SlotState.IDLE
    pool._machine.idle.append(slot)  # a return that was interrupted before it looked for waiters
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        pool._cut_short()
    until(lambda: waiter.slot is not None, seconds=PATIENCE)
    assert waiter.slot is slot
    waiter.slot = None
    pool._getconns[id(conn)] = slot
    link.lend()
    del slot
    pool.putconn(conn)


def test_an_error_that_is_stored_after_a_failed_commit_holds_no_slot(make_pool, monkeypatch):
    def refuse(_link):
        raise ValueError("no")

    pool = make_pool(max_size=1)
    pool.execute("select 1")
    monkeypatch.setattr(FakeLink, "commit", refuse)
    with pytest.raises(ValueError, match="no") as stored, pool.connection() as conn:
        conn.execute("insert")
    until(lambda: pool._machine.idle)
    ref = pool._machine.idle[0].ref
    pool._machine.idle.clear()
    assert ref() is None, stored.traceback
    until(lambda: pool.stats().idle + pool.stats().orphaned > 1)


def test_what_check_began_has_ended_before_the_borrower_has_it(fake):
    def check(conn):
        conn.execute("begin")

    with ConnectionPool(driver=FakeDriver(fake), min_size=0, check=check) as pool:
        with pool.connection() as conn:
            [slot] = pool._machine.slots()
            assert slot.link.activity() is Activity.IDLE
            assert conn
        del slot


def test_a_reset_that_leaves_a_transaction_costs_the_connection(fake):
    def reset(conn):
        conn.execute("begin")

    with ConnectionPool(driver=FakeDriver(fake), reset=reset) as pool:
        with pool.connection():
            pass
        until(lambda: pool.stats().closed.get("unclean"), seconds=PATIENCE)


def test_close_waits_as_long_as_it_is_told_and_no_longer(pool, monkeypatch):
    given: list[float] = []
    monkeypatch.setattr(pool, "_wait_until_empty", given.append)
    pool.close(timeout=0.5)
    pool.open()
    pool.close(timeout=None)
    assert given == [0.5, float("inf")]


def test_what_nobody_gave_back_ends_without_a_farewell_and_raises_at_its_next_use(pool):
    said: list[str] = []
    link = SimpleNamespace(
        fd=-1,
        park=lambda: said.append("park"),
        discard=lambda: said.append("discard"),
        close=lambda: said.append("close"),
    )
    [slot] = pool._machine.slots()
    ref, slot.ref = slot.ref, None
    executor._end_link(link, Close(slot, Reason.ORPHANED, discard=True))
    slot.ref = ref
    assert said == ["park", "discard"]


def test_the_frame_that_opened_a_slot_does_not_hold_it_while_others_are_told(fake):
    gone: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def take_and_drop():  # in the worker, which has told the machine and not returned yet
        ref = fresh._machine.idle.pop().ref
        gone.put(ref() is None)

    fresh: Any = ConnectionPool(driver=FakeDriver(fake), min_size=1, max_size=1)
    fresh._onlookers.append(take_and_drop)
    fresh.open()
    assert gone.get(timeout=PATIENCE)
    fresh._onlookers.remove(take_and_drop)
    fresh.close()


def test_an_alarm_that_rings_before_the_keeper_wakes_has_it_look_again(monkeypatch):
    kept = keeper.Keeper()
    monkeypatch.setattr(kept, "ensure_running", lambda: True)
    kept._sleeps_until = 100.0
    alarm = Alarm(None, PATIENCE)
    kept.ring_at(alarm, 200.0)
    with pytest.raises(queue.Empty):
        kept.inbox.get(block=False)
    kept.ring_at(alarm, 50.0)
    assert kept.inbox.get(block=False) is keeper._nudge


def test_a_child_forgets_what_the_parent_had_lent(pool):
    conn = pool.getconn()
    [slot] = pool._machine.slots()
    pool._dedicated[1] = SimpleNamespace(abandon=lambda busy: None)
    pool.after_fork_in_child()
    assert not pool._getconns and not pool._dedicated
    assert conn is slot.link.conn


def test_a_block_of_before_a_fork_commits_nothing(pool, monkeypatch):
    committed: list[None] = []
    conn = pool.getconn()
    conn.execute("insert")
    [slot] = pool._machine.slots()
    monkeypatch.setattr(FakeLink, "commit", lambda _link: committed.append(None))
    pool._machine.forked()
    pool._give_back(slot, None)
    assert not committed


def test_the_null_device_is_not_inherited_by_programs(pool):
    reader, writer = os.pipe()
    sockets.point_at_null(reader)
    assert not os.get_inheritable(reader)
    os.close(reader)
    os.close(writer)


def test_a_keeper_that_does_not_fit_any_more_is_replaced(monkeypatch):
    former = keeper.Keeper()
    monkeypatch.setattr(former, "fits", lambda: False)
    monkeypatch.setattr(keeper, "_keepers", [former])
    monkeypatch.setattr(keeper.Keeper, "ensure_running", lambda self: True)
    assert keeper.current() is not former


def test_where_waits_are_greenlets_a_gate_is_gevents(monkeypatch):
    monkeypatch.setattr(runtime, "has_green_waits", lambda: True)
    monkeypatch.setattr(runtime, "_greenlets", lambda: SimpleNamespace(Gate=lambda: "green"))
    gate: Any = runtime.gate()
    assert gate == "green"
