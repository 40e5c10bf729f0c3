"""What a review found, and must not come back.

One job: each finding of the review as a promise, over a server that does as it is told. What races
is stepped through or struck at its window, never slept for.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
import weakref
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest

from penstock import ConnectionPool, PenstockError, ServerUnavailable
from penstock._machine.machine import Machine, Verdict, Waiter
from penstock._machine.orders import Open
from penstock._machine.policy import Limits
from penstock._pool.sync import borrowing, executor
from penstock._process import keeper, watch
from penstock._process.clock import clock
from penstock.testing import FakeDriver, FakeLink, FakeServer, Mode
from tests.contract.conftest import Borrower
from tests.contract.interrupting import end_keeper
from tests.contract.runtimes import PATIENCE
from tests.forks import Child, quiet_libc_fork
from tests.machine.interleaver import Interleaver, SimLock

SCHEDULES = range(200)


@pytest.fixture
def no_gc():
    """Only reference counting frees anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@contextlib.contextmanager
def simulated_locks(thing, sim):
    """A thread that the interleaver has stopped must not hold a lock that is real."""
    kinds = (type(threading.Lock()), type(threading.RLock()))
    real = {name: value for name, value in vars(thing).items() if isinstance(value, kinds)}
    vars(thing).update({name: SimLock(sim) for name in real})
    yield
    vars(thing).update(real)


# -- what an error keeps alive --------------------------------------------------------------------


def failing(kind, text):
    """Something that raises a new error each time: no frame of ours holds one."""

    def fail(*_args, **_kwargs):
        raise kind(text)

    return fail


def caught(act):
    """The error that `act` raises, with its traceback and nothing of pytest's around it."""
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def borrow_and_write(pool):
    with pool.connection() as conn:
        conn.execute("insert")


def drop_a_lease(pool):
    """Borrow, and never give back."""
    lease = pool.connection()
    lease.__enter__()


@pytest.mark.parametrize(
    ("kind", "keep"),
    [(ValueError, False), (ValueError, True), (KeyboardInterrupt, False)],
    ids=["error dropped", "error stored", "interrupt dropped"],
)
def test_a_lease_dropped_after_a_failed_commit_comes_home_though_the_error_may_be_stored(
    make_pool, until, no_gc, kind, keep
):
    pool = make_pool(min_size=0, max_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeLink, "commit", failing(kind, "commit"))
        error = caught(partial(borrow_and_write, pool))
    assert isinstance(error, kind)
    if not keep:
        del error
    orphaned = int(kind is KeyboardInterrupt)  # it strikes while the slot is in nobody's place
    until(lambda: pool.stats().orphaned == orphaned, pool)
    drop_a_lease(pool)
    until(lambda: pool.stats().orphaned == orphaned + 1, pool)
    with pool.connection() as conn:
        conn.execute("select 1")


@pytest.mark.parametrize("keep", [False, True], ids=["error dropped", "error stored"])
def test_a_lease_dropped_after_an_on_borrow_that_raised_comes_home_though_the_error_may_be_stored(
    make_pool, until, no_gc, keep
):
    faults = [ValueError("on_borrow")]

    def on_borrow(conn):
        if faults:
            raise faults.pop()

    pool = make_pool(min_size=0, max_size=1, on_borrow=on_borrow)
    error = caught(partial(borrow_and_write, pool))
    assert isinstance(error, ValueError)
    if not keep:
        del error
    drop_a_lease(pool)
    until(lambda: pool.stats().orphaned == 1, pool)
    with pool.connection() as conn:
        conn.execute("select 1")


@pytest.mark.parametrize("keep", [False, True], ids=["error dropped", "error stored"])
def test_a_lease_dropped_after_a_check_that_raised_comes_home_though_the_error_may_be_stored(
    make_pool, until, no_gc, keep
):
    refusing = [True]

    def check(conn):
        if refusing:
            raise ValueError("check")

    pool = make_pool(min_size=0, max_size=1, timeout=0.2, check=check)
    error = caught(partial(borrow_and_write, pool))
    assert isinstance(error, PenstockError)
    if not keep:
        del error
    refusing.clear()
    lease = pool.connection(PATIENCE)
    lease.__enter__()
    del lease
    until(lambda: pool.stats().orphaned == 1, pool)
    with pool.connection(PATIENCE) as conn:
        conn.execute("select 1")


def test_a_pool_that_could_not_connect_is_freed_by_reference_counting_alone(no_gc, until):
    with FakeServer() as fake:
        fake.mode = Mode.DOWN
        pool = ConnectionPool(driver=FakeDriver(fake), timeout=0.1)
        assert isinstance(caught(partial(pool.execute, "select 1")), ServerUnavailable)
        ref = weakref.ref(pool)
        del pool
        until(lambda: ref() is None)


# -- races, stepped through -----------------------------------------------------------------------


def note(told, token, fd):
    told.append(token)


def test_removing_an_old_number_from_the_watch_never_unwatches_its_new_owner():
    for seed in SCHEDULES:
        told: list[str] = []
        sim = Interleaver(seed, watch.__file__)
        watcher = watch.Watch(partial(note, told), threaded=False)
        old, old_peer = socket.socketpair()
        number = old.fileno()
        serial = watcher.add(number, "old")
        old.close()  # libpq closes a broken connection's socket by itself
        new, peer = sorted(socket.socketpair(), key=lambda each: each.fileno() != number)
        assert new.fileno() == number, "the number was not given again"
        with simulated_locks(watcher, sim):
            sim.spawn(partial(watcher.remove, number, serial), "who ends the old connection")
            sim.spawn(partial(watcher.add, number, "new"), "who opened the new one")
            sim.run()
        peer.close()
        watcher.collect()
        assert told == ["new"], f"seed {seed}"
        for each in (old_peer, new):
            each.close()
        watcher.close()


class Ticked:
    """All of a pool that a keeper needs."""

    def __init__(self):
        self.told = threading.Event()

    def _tick(self):
        self.told.set()

    def _bring_home(self, ref):
        raise AssertionError("there is nothing to bring home")


def test_of_two_times_set_by_two_threads_the_keeper_keeps_the_earlier(monkeypatch):
    for seed in SCHEDULES:
        sim = Interleaver(seed, keeper.__file__)
        kept, pool = keeper.Keeper(), Ticked()
        ref: weakref.ref[Any] = weakref.ref(pool)
        now = clock()
        with monkeypatch.context() as patch, simulated_locks(kept, sim):
            patch.setattr(kept, "ensure_running", lambda: None)
            sim.spawn(partial(kept.call_at, ref, now + 3600), "who wants it later")
            sim.spawn(partial(kept.call_at, ref, now), "who wants it now")
            sim.run()
        kept.ensure_running()
        came = pool.told.wait(PATIENCE)
        kept.park(PATIENCE)
        assert came, f"seed {seed}: the earlier time was lost"


def test_a_signal_handler_that_serves_the_first_waiter_does_not_upset_who_looks_for_him():
    """The handler runs after `next` has told whose turn it is, and looks through the queue itself."""
    machine = Machine(Limits(min_size=0, max_size=1), orphans=lambda ref: None, random=lambda: 0.5)
    machine.open(0.0)
    holder, waiter = Waiter(1, lambda: None), Waiter(2, lambda: None)
    [opening] = [each for each in machine.queue_up(holder, 0.0) if isinstance(each, Open)]
    machine.opened(opening.slot, object(), 0.0)
    slot, holder.slot = opening.slot, None
    machine.queue_up(waiter, 0.0)
    handlers = [lambda: machine.returned(slot, 0.0, Verdict.CLEAN)]

    class StruckQueue(OrderedDict[int, Any]):
        def __iter__(self):
            for ticket in list(super().__iter__()):
                while handlers:
                    handlers.pop()()
                yield ticket

    machine.waiters = StruckQueue(machine.waiters)
    machine.look_again(0.0)
    assert not handlers
    assert waiter.slot is slot
    assert not machine.waiters


# -- what changes while a connection is on its way to its borrower -------------------------------


def hang_up(pool, fake, conn):
    """The server ends this session, and the watcher is told at this very moment."""
    link = conn._link
    fake.hang_up(link.number)
    [slot] = [each for each in pool._machine.slots() if each.link is link]
    executor._told_of_end(slot.ref, link.fd)


def drain(pool, fake, conn):
    pool.drain()


disturbances = pytest.mark.parametrize("disturb", [hang_up, drain])


@disturbances
def test_what_was_given_and_is_condemned_before_it_is_received_is_not_lent(
    make_pool, fake, until, monkeypatch, disturb
):
    pool = make_pool(min_size=0, max_size=1)
    holder = Borrower(pool).wait()
    sleep_at, windows = borrowing._sleep_at, list[None]()

    def sleep_and_disturb(gate, seconds):
        sleep_at(gate, seconds)  # here the waiter has been given the holder's connection
        if not windows:
            windows.append(None)
            disturb(pool, fake, holder.conn)

    with monkeypatch.context() as patch:
        patch.setattr(borrowing, "_sleep_at", sleep_and_disturb)
        waiter = Borrower(pool)
        until(lambda: pool.stats().waiting == 1, pool)
        holder.end()
        waiter.wait()
    assert waiter.error is None
    assert windows
    assert waiter.conn is not holder.conn
    assert waiter.conn is not None and not waiter.conn.closed
    waiter.end()


# -- the user's code takes too long, or always says no --------------------------------------------


# -- a keeper that nothing holds up ---------------------------------------------------------------


def test_a_driver_whose_ends_raise_neither_keeps_the_keeper_busy_nor_loses_the_right(
    make_pool, fake, monkeypatch, caplog
):
    pool = make_pool(min_size=0, max_size=1)
    attempts: list[FakeLink] = []

    def end(link):
        attempts.append(link)
        raise RuntimeError("a driver's fault")

    with monkeypatch.context() as patch:
        patch.setattr(FakeLink, "close", end)
        patch.setattr(FakeLink, "discard", end)
        with pool.connection() as first:
            pass
        pool.drain()
        with pool.connection() as conn:
            assert conn is not first
        for _ in range(100):
            keeper_is_through()
    assert [link.conn for link in attempts] == [first]
    assert "a driver's fault" in caplog.text


def keeper_is_through():
    """The keeper has done all that it was told so far."""
    done = threading.Event()
    keeper.current().tell(done.set)
    assert done.wait(PATIENCE), "the keeper does not come to it"


HUGE = [1e11, 1e300]


def test_a_pool_that_goes_before_the_keeper_hears_of_its_timer_is_no_error(caplog):
    held, go_on = threading.Event(), threading.Event()

    def hold():
        held.set()
        go_on.wait(PATIENCE)

    keeper.current().tell(hold)
    assert held.wait(PATIENCE)
    pool = Ticked()
    keeper.current().call_at(weakref.ref(pool), clock() + 1000)
    del pool
    go_on.set()
    keeper_is_through()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("huge", HUGE)
def test_a_tick_in_a_huge_number_of_seconds_lets_the_keeper_sleep(make_pool, until, caplog, huge):
    end_keeper()  # another pool's timer would have a new one wake up sooner
    pool = make_pool(min_size=1, max_lifetime=huge, overdue_after=0.05, ping_after=0)
    pool.open(wait=True)
    # The look at what is overdue finds nothing, and the next tick is far away.
    until(lambda: pool._machine.armed > clock() + 3600)
    keeper_is_through()
    pool.execute("select 1")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("huge", HUGE)
def test_a_deadline_in_a_huge_number_of_seconds_lets_the_keeper_sleep(make_pool, caplog, huge):
    seen: list[object] = []
    end_keeper()
    pool = make_pool(min_size=0, timeout=huge, check=lambda conn: keeper_is_through())
    with pool.connection() as conn:
        seen.append(conn)
    keeper_is_through()
    assert seen
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class Borrowing(logging.Handler):
    """Writes each record to the database, as some handlers do."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.entered = threading.Event()
        self.left = threading.Event()

    def emit(self, record):
        if self.entered.is_set():
            return
        self.entered.set()
        try:
            self.pool.execute("insert")
        except PenstockError:
            pass
        finally:
            self.left.set()


@pytest.fixture
def handled():
    """Adds handlers to penstock's log, and takes them away."""
    log = logging.getLogger("penstock")
    added = []

    def add(handler):
        added.append(handler)
        log.addHandler(handler)
        return handler

    yield add
    for handler in added:
        log.removeHandler(handler)


def test_a_log_handler_that_borrows_from_the_full_pool_does_not_hold_the_keeper_up(
    make_pool, handled
):
    pool = make_pool(min_size=0, max_size=1, overdue_after=0.05)
    other = make_pool(min_size=0)
    handler = handled(Borrowing(pool))
    with pool.connection():
        assert handler.entered.wait(PATIENCE), "nothing was said of an overdue connection"
        other.execute("select 1")
        keeper_is_through()
        assert not handler.left.is_set(), "the keeper waited for the handler"
    assert handler.left.wait(PATIENCE)


# -- a child that is interrupted ------------------------------------------------------------------


def identity(fd):
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("fork", [os.fork, quiet_libc_fork])
@pytest.mark.parametrize("struck", [0, 1, 2])
def test_a_childs_side_that_is_interrupted_abandons_every_inherited_link_when_repeated(
    make_pool, until, monkeypatch, fork, struck
):
    pool = make_pool(min_size=3, max_size=3)
    pool.open(wait=True)
    until(lambda: pool.stats().idle == 3)
    links = [slot.link for slot in pool._machine.slots()]
    inherited = {link.number: (link.fd, identity(link.fd)) for link in links}
    abandon, calls = FakeLink.abandon, list[None]()

    def interrupted(link, *, busy):
        calls.append(None)
        if len(calls) == struck + 1:
            raise KeyboardInterrupt
        abandon(link, busy=busy)

    def child():
        # Where no hook ran, the interrupt is raised here; where one ran, Python has shown it.
        try:
            pool.execute("select 1")
        except KeyboardInterrupt:
            pool.execute("select 1")
        return [number for number, (fd, was) in inherited.items() if identity(fd) == was]

    monkeypatch.setattr(FakeLink, "abandon", interrupted)
    assert Child(child, fork=fork).answer() == []


def test_jobs_that_wait_for_a_silent_server_keep_no_other_pool_from_its_own():
    silent, served = threading.Event(), threading.Event()
    for _ in range(2 * keeper.CONNECT_CONCURRENCY + 1):
        keeper.current().submit(silent.wait)
    keeper.current().submit(served.set)
    try:
        assert served.wait(PATIENCE), "it waits until those give up that are not answered"
    finally:
        silent.set()
