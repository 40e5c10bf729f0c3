"""Ctrl-C at every point of a borrow, a wait and a return: nothing is lost, lent twice or forgotten.

An act is run again and again, interrupted at its first instruction, its second, ... until it ends
without an interrupt; in two ways. *Real*: SIGINT is pulled, so KeyboardInterrupt comes where the
interpreter looks for signals, and every such place is met. *Hostile*: it is raised at the very
instruction, which no signal can do; then a lock may stay held, at the end of its `with`, and only there.

What is asked after each is in `interrupting.py`. Only the main thread gets signals, so acts run there;
other threads hold, wait and give back.
"""

from __future__ import annotations

import contextlib
import ctypes
import linecache
import random
import re
import signal
import sys
import threading
from collections import deque
from functools import partial
from queue import SimpleQueue
from typing import ClassVar

import pytest

from penstock import ConnectionPool, PoolClosed, PoolTimeout
from penstock._machine.slot import SlotState
from penstock._pool.sync import executor
from penstock._pool.sync.lease import PgconnLease
from penstock._process import keeper
from penstock._process.clock import clock
from tests.contract import interrupting
from tests.contract.interrupting import (
    NoTripwire,
    Tripwire,
    end_keeper,
    faults_of,
    unmonitor,
    until,
)
from tests.contract.sessions import Driver

STORM = 1000
ASYNC_STORM = 300


@pytest.fixture(scope="module")
def tripwire(tmp_path_factory):
    try:
        wire = Tripwire(tmp_path_factory.mktemp("tripwire"), __file__, threading.__file__)
    except NoTripwire as missing:
        pytest.skip(f"the tripwire needs {missing}")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield wire
    signal.signal(signal.SIGINT, before)
    unmonitor(__file__, threading.__file__)


def new_pool(size, *, shaped=True, kind=ConnectionPool, **options):
    """A pool with `size` open connections, and always that many; with a tick to come."""
    options = {"timeout": None, "max_lifetime": 3600, "ping_after": None} | options
    pool = kind(driver=Driver(shaped=shaped), min_size=size, max_size=size, **options)
    pool.open(wait=True)
    assert until(lambda: pool.stats().idle == size)
    return pool


class Others:
    """Threads that hold connections or wait for one while the main thread is interrupted."""

    def __init__(self, pool):
        self.pool = pool
        self.faults = []
        self._threads = []
        self._enough = threading.Event()

    def hold_all_until_somebody_waits(self):
        """Take every connection; give them back when somebody waits, or at `join`."""
        self._hold(lambda: self._enough.is_set() or bool(self.pool._machine.waiters))

    def hold_all(self):
        """Take every connection; give them back at `join`."""
        self._hold(self._enough.is_set)

    def wait(self, count, *, mind_closing=True):
        """So many threads queue up for a connection, use it and give it back."""
        for _ in range(count):
            self._start(self._borrow if mind_closing else self._borrow_unless_closed)
        assert until(lambda: self.pool.stats().waiting == count)

    def join(self):
        """Whoever waits is served now, or was forgotten: it must not be helped by a borrow of ours."""
        self._enough.set()
        for thread in self._threads:
            thread.join(interrupting.PATIENCE)
        if any(thread.is_alive() for thread in self._threads):
            self.faults.append("a waiter was forgotten")
            self.pool.close(0)  # so that the test ends
        for thread in self._threads:
            thread.join()
        return self.faults

    def _hold(self, enough):
        ready = SimpleQueue()

        def hold():
            leases = [self.pool.connection() for _ in range(self.pool.stats().max_size)]
            for lease in leases:
                lease.__enter__()
            ready.put(None)
            until(enough)
            while leases:
                leases.pop().__exit__(None, None, None)

        self._start(hold)
        ready.get()

    def _borrow(self):
        with self.pool.connection() as conn:
            claim = conn.claim()
            conn.query()
            conn.commit()
            conn.check(claim)

    def _borrow_unless_closed(self):
        with contextlib.suppress(PoolClosed):
            self._borrow()

    def _start(self, call):
        def run():
            try:
                call()
            except BaseException as error:
                self.faults.append(f"another thread got {error!r}")

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()


# -- acts -----------------------------------------------------------------------------------------


class Act:
    """What the main thread does with a pool while it is interrupted."""

    size = 2
    shapes = (True,)
    options: ClassVar = {}

    def set_up(self, pool):
        """What others do meanwhile."""
        self.others = Others(pool)

    def run(self, pool):
        raise NotImplementedError

    def clean_up(self, pool):
        """What a program that was interrupted there would do. Gives the pool if it is another."""

    def clean_up_after_the_impossible(self, pool):
        """What else is needed where the interrupt came at a place that no signal can reach."""


class Borrow(Act):
    shapes = (True, False)

    def run(self, pool):
        with pool.connection() as conn:
            conn.claim()


class BorrowAndCommit(Act):
    shapes = (True, False)

    def run(self, pool):
        with pool.connection() as conn:
            conn.query()


class BorrowAndFail(Act):
    def run(self, pool):
        try:
            with pool.connection() as conn:
                conn.query()
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass


class GetAndPut(Act):
    conn = None

    def run(self, pool):
        self.conn = pool.getconn()
        self.conn.query()
        self.conn.commit()
        pool.putconn(self.conn)
        self.conn = None

    def clean_up(self, pool):
        # An interrupted putconn() either gave it back or did not begin; a program can ask.
        conn, self.conn = self.conn, None
        if conn is not None and id(conn) in pool._getconns:
            pool.putconn(conn)

    def clean_up_after_the_impossible(self, pool):
        # Between getconn()'s table of lent connections and the program's variable no signal can come.
        for slot in list(pool._getconns.values()):
            pool.putconn(slot.link.conn)


class GetAndPutUnfinished(GetAndPut):
    def run(self, pool):
        self.conn = pool.getconn()
        self.conn.query()
        pool.putconn(self.conn)
        self.conn = None


class Execute(Act):
    def run(self, pool):
        assert pool.execute("select 1").fetchone()


class BorrowWithOptions(Act):
    def run(self, pool):
        with pool.connection(timeout=interrupting.PATIENCE, settings={"work_mem": "64MB"}) as conn:
            conn.query()
        with pool.connection(autocommit=True) as conn:
            conn.claim()


class BorrowFromAPoolWithHooks(BorrowAndCommit):
    shapes = (True,)
    options: ClassVar = {"on_borrow": lambda conn: conn.query(), "check": lambda conn: conn.claim()}


class BorrowAfterAReset(BorrowAndCommit):
    shapes = (True,)
    size = 1
    options: ClassVar = {"reset": "session"}


class BorrowWithAPing(Borrow):
    shapes = (True,)
    options: ClassVar = {"ping_after": 0}


class BorrowWithAPingThatFails(Borrow):
    shapes = (True,)
    size = 1
    options: ClassVar = {"ping_after": 0}

    def set_up(self, pool):
        super().set_up(pool)
        for slot in pool._machine.slots():
            slot.link.answers = False


class WaitAndGet(Act):
    shapes = (True, False)

    def set_up(self, pool):
        super().set_up(pool)
        self.others.hold_all_until_somebody_waits()

    def run(self, pool):
        with pool.connection() as conn:
            conn.claim()


class WaitAndGetWithOptions(WaitAndGet):
    shapes = (True,)

    def run(self, pool):
        with pool.connection(timeout=interrupting.PATIENCE) as conn:
            conn.claim()


class WaitInVain(Act):
    def set_up(self, pool):
        super().set_up(pool)
        self.others.hold_all()

    def run(self, pool):
        try:
            with pool.connection(timeout=0.0001):
                raise AssertionError("all were held")
        except PoolTimeout:
            pass


class GiveToOne(Act):
    shapes = (True, False)
    size = 1
    waiters = 1

    def set_up(self, pool):
        super().set_up(pool)
        self.leases = [pool.connection() for _ in range(self.size)]
        for lease in self.leases:
            lease.__enter__()
        self.others.wait(self.waiters)

    def run(self, pool):
        self.leases[0].__exit__(None, None, None)

    def clean_up(self, pool):
        self.leases.clear()  # the block is over, and so is its lease


class GiveToTwo(GiveToOne):
    """Both at once: another thread has appended its slot, and has not looked for waiters yet."""

    size = 2
    waiters = 2

    def set_up(self, pool):
        super().set_up(pool)
        slot = self.leases[1]._slot
        self.leases[1]._slot = None
        slot.link.park()
        slot.ref.borrows += 1
        slot.state = SlotState.IDLE
        pool._machine.idle.append(slot)


class GiveToOneAfterCommit(GiveToOne):
    shapes = (True,)

    def run(self, pool):
        self.leases[0]._slot.link.conn.query()
        self.leases[0].__exit__(None, None, None)


class GiveWhileOneComes(Act):
    """The waiter queues up between the two looks of a return: `put` has to look again."""

    size = 1
    shapes = (True, False)

    def set_up(self, pool):
        super().set_up(pool)
        self.lease = pool.connection()
        self.lease.__enter__()
        self.others.wait(1)
        machine = pool._machine
        machine.waiters, self.hidden = type(machine.waiters)(), machine.waiters
        machine.idle = Appended(machine, self.hidden)
        machine._pop = machine.idle.pop

    def run(self, pool):
        self.lease.__exit__(None, None, None)

    def clean_up(self, pool):
        self.lease = None
        machine = pool._machine
        if machine.waiters is not self.hidden:  # the return ended first: the waiter looks himself
            machine.waiters = self.hidden
            pool._look_again()


class FirstBorrow(Act):
    """In a process that has no keeper yet; also the pool is made there."""

    def set_up(self, pool):
        super().set_up(pool)
        end_keeper()
        self.pool = None

    def run(self, pool):
        self.pool = ConnectionPool(driver=pool._driver, min_size=2, max_size=2)
        with self.pool.connection() as conn:
            conn.claim()

    def clean_up(self, pool):
        return self.pool or new_pool(2)


class OpenAndWait(Act):
    """Opening a pool that was closed."""

    def set_up(self, pool):
        super().set_up(pool)
        pool.close()

    def run(self, pool):
        pool.open(wait=True)

    def clean_up(self, pool):
        if pool.closed:
            pool.open()


class Close(Act):
    """While one waits and one connection is lent."""

    def set_up(self, pool):
        super().set_up(pool)
        self.others.hold_all()
        self.others.wait(2, mind_closing=False)

    def run(self, pool):
        pool.close(timeout=0)

    def clean_up(self, pool):
        self.others.join()
        if pool.closed:
            pool.open()


class Drain(Act):
    def run(self, pool):
        pool.drain()


class DrainWhileOneWaits(Act):
    size = 1

    def set_up(self, pool):
        super().set_up(pool)
        self.lease = pool.connection()
        self.lease.__enter__()
        self.others.wait(1)

    def run(self, pool):
        pool.drain()
        self.lease.__exit__(None, None, None)

    def clean_up(self, pool):
        self.lease = None


class Resize(Act):
    def set_up(self, pool):
        super().set_up(pool)
        pool.resize(1, 1)

    def run(self, pool):
        pool.resize(2, 2)

    def clean_up(self, pool):
        if pool.stats().max_size == 1:
            pool.resize(2, 2)


class Appended(deque):
    """An idle deque that shows the hidden waiters as soon as a slot is appended."""

    def __init__(self, machine, hidden):
        super().__init__()
        self._machine = machine
        self._hidden = hidden

    def append(self, slot):
        super().append(slot)
        self._machine.waiters = self._hidden


ACTS = [
    Borrow,
    BorrowAndCommit,
    BorrowAndFail,
    GetAndPut,
    GetAndPutUnfinished,
    Execute,
    BorrowWithOptions,
    BorrowFromAPoolWithHooks,
    BorrowAfterAReset,
    BorrowWithAPing,
    BorrowWithAPingThatFails,
    WaitAndGet,
    WaitAndGetWithOptions,
    WaitInVain,
    GiveToOne,
    GiveToOneAfterCommit,
    GiveToTwo,
    GiveWhileOneComes,
    FirstBorrow,
    OpenAndWait,
    Close,
    Drain,
    DrainWhileOneWaits,
    Resize,
]
SHAPED_ACTS = [
    pytest.param(act, shaped, id=f"{act.__name__}-{'PgconnLease' if shaped else 'Lease'}")
    for act in ACTS
    for shaped in act.shapes
]


#: Borrowing, waiting and giving back. Not FirstBorrow: starting a thread is not penstock's code, and an
#: exception at any instruction of it is more than is claimed.
HOSTILE_ACTS = [
    param
    for param in SHAPED_ACTS
    if param.values[0] not in {FirstBorrow, OpenAndWait, Close, Drain, DrainWhileOneWaits, Resize}
    and (param.values[1] or param.values[0] in {Borrow, GiveToTwo})
]

#: Python itself swallows an interrupt that strikes a weak reference's callback written in Python
#: (threading has one per thread) or a generator that is being closed, and says so.
swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Report:
    """What interrupting an act at every instruction found."""

    def __init__(self):
        self.instructions = 0
        self.interrupts = 0
        self.places = set()
        self.faults = []
        self.locks_held = []

    def __str__(self):
        version = ".".join(map(str, sys.version_info[:3]))
        return (
            f"{version}: {self.interrupts} interrupts at {len(self.places)} places "
            f"of {self.instructions} instructions; {len(self.locks_held)} locks held"
        )


#: A signal waits for the next place where the interpreter looks for one, some 19 instructions on: every 8th
#: instruction is tried, and between two that were struck at different places all that may be another.
STRIDE = 8


def interrupt_everywhere(tripwire, act, *, hostile=False, stop_at=3, **options):
    """Interrupt the act wherever it can be; stops at the `stop_at`-th fault.

    An exception is raised at each of its instructions (`hostile`), a signal where it is looked for.
    """
    report = Report()
    strike = Strike(tripwire, act, report, hostile=hostile, options=act.options | options)
    stride = 1 if hostile else STRIDE
    k = 1
    while strike(k) and len(report.faults) < stop_at:
        k += stride
        strike_between(strike, k - stride, k, lambda: len(report.faults) < stop_at)
    print(report)
    return report


def strike_between(strike, low, high, goes_on):
    """Strike all that may be at another place than both ends: the place never goes back as k grows."""
    if high - low > 1 and goes_on() and strike(low) != strike(high):
        middle = (low + high) // 2
        strike_between(strike, low, middle, goes_on)
        strike_between(strike, middle, high, goes_on)


class Strike:
    """Runs an act, interrupted at its k-th instruction, and looks for what that left behind, once for each k."""

    def __init__(self, tripwire, act, report, *, hostile, options):
        self._tripwire, self._act, self._report = tripwire, act, report
        self._hostile, self._options = hostile, options
        self._pool = new_pool(act.size, **options)
        self._places = {}

    def __call__(self, k):
        """Where it was interrupted; None: it has fewer instructions."""
        if k not in self._places:
            self._places[k] = self._run(k)
        return self._places[k]

    def _run(self, k):
        report, act, pool = self._report, self._act, self._pool
        act.set_up(pool)
        place, count = self._tripwire.run(partial(act.run, pool), k, hostile=self._hostile)
        held = release_locks(pool) if self._hostile else 0
        if held:
            report.locks_held.append(place)
        left = act.clean_up(pool) or pool
        if self._hostile:
            act.clean_up_after_the_impossible(pool)
        faults = act.others.join() + faults_of(
            left, None if left is not pool else pool._driver.sessions
        )
        report.faults += [f"instruction {k}, {place}: {fault}" for fault in faults]
        if place is not None:
            report.interrupts += 1
            report.places.add(place)
        if faults:
            release_locks(pool)
            self._pool = new_pool(act.size, **self._options)
        if count < k:
            report.instructions = max(count, report.instructions)
            return None
        return place or "the act was over"


def release_locks(pool):
    """Release what the calling thread holds; how many locks that were."""
    held = 0
    for lock in (pool._lock, keeper.current()._lock, executor._watcher()._changing):
        while lock._is_owned():
            held += 1
            lock.release()
    return held


@swallowed
@pytest.mark.parametrize(("act", "shaped"), SHAPED_ACTS)
def test_a_signal_at_every_point_loses_nothing(tripwire, act, shaped):
    report = interrupt_everywhere(tripwire, act(), shaped=shaped)
    assert not report.faults, "\n".join(report.faults)
    assert report.interrupts > 10


@swallowed
@pytest.mark.parametrize(("act", "shaped"), HOSTILE_ACTS)
def test_an_exception_at_every_instruction_holds_at_most_a_lock_at_the_end_of_its_with(
    tripwire, act, shaped
):
    report = interrupt_everywhere(tripwire, act(), hostile=True, shaped=shaped)
    assert not report.faults, "\n".join(report.faults)
    assert report.interrupts > 10
    for place in report.locks_held:
        line = linecache.getline(place.file, place.line).strip()
        assert TAKES_OR_RELEASES.match(line), f"{place}: {line}"


#: Around the protected region, where no signal is looked for (test_lock.py holds that): the lock is taken and
#: not in it yet, or not in it any more and not released yet. (3.14 has no instruction for `try:`; where a branch
#: comes first in it, as in `_pinged`, that is the one.)
TAKES_OR_RELEASES = re.compile(
    r"""with\ self\._(lock|changing): | lock\ =\ self\._(take_lock\(|lock$) | if\ (not\ )?lock\.take\( | return\ lock\b
    | return\ self\.acquire\( | try:$ | if\ alive:$ | finally:$ | lock\.release\(\)$""",
    re.VERBOSE,
)


def test_whoever_opened_a_slot_does_not_hold_it_any_more():
    """Else a slot that is dropped by its borrower does not come home: it has another holder."""
    pool = ConnectionPool(driver=Driver(), min_size=1, max_size=1)
    dropped = SimpleQueue()

    def take_and_drop():  # in the worker, as soon as it has told the machine
        dropped.put(pool._machine._pop().ref)

    pool._onlookers.append(take_and_drop)
    orders = pool._machine.open(clock())
    pool._carry_out(orders)
    ref = dropped.get(timeout=interrupting.PATIENCE)
    pool._onlookers.remove(take_and_drop)
    assert ref() is None
    assert orders == []
    assert not faults_of(pool)


# -- faults planted, to see them found ------------------------------------------------------------


class PutsBack(PgconnLease):
    """A guard that puts the slot back when it cannot know whether it has gone back."""

    __slots__ = ()

    def __exit__(self, exc_type, error, traceback):
        slot = self._slot
        self._slot = None
        try:
            slot.link.park()
            self._pool._machine.put(slot)
        except BaseException:
            self._pool._machine.idle.append(slot)
            raise


class PoolWithAGuardThatPutsBack(ConnectionPool):
    def _set_up(self, config):
        super()._set_up(config)
        self._lease = PutsBack


class PoolThatTakesItsLockBeforeTheTry(ConnectionPool):
    def _return(self, slot, verdict, *, suspect=False):
        self._lock.acquire()
        try:
            orders = self._machine.returned(slot, clock(), verdict, suspect=suspect)
        finally:
            self._lock.release()
        self._carry_out(orders)


class PoolThatLooksOnlyOnce(ConnectionPool):
    def _cut_short(self):
        """No guard has the move completed."""


class PoolThatForgetsOrphans(ConnectionPool):
    def _new_machine(self, config):
        machine = super()._new_machine(config)
        machine.orphans = deque(maxlen=1).append
        return machine


@pytest.mark.parametrize(
    ("kind", "act", "fault"),
    [
        (PoolWithAGuardThatPutsBack, Borrow, "lent twice"),
        (PoolThatTakesItsLockBeforeTheTry, BorrowAndFail, "the pool's lock is held"),
        (PoolThatLooksOnlyOnce, GiveToOne, "a waiter was forgotten"),
        (PoolThatForgetsOrphans, Borrow, "not everything came home"),
    ],
)
def test_a_planted_fault_is_found(tripwire, monkeypatch, kind, act, fault):
    monkeypatch.setattr(interrupting, "PATIENCE", 0.5)
    report = interrupt_everywhere(tripwire, act(), kind=kind, stop_at=1)
    assert fault in "\n".join(report.faults)


# -- storms ---------------------------------------------------------------------------------------


class Borrower:
    """Borrows, uses and gives back, for ever, in all of a pool's ways; `struck` by what is thrown."""

    def __init__(self, pool, rng, struck, strikes):
        self.pool = pool
        self.rng = rng
        self.struck = struck
        self.strikes = strikes
        self.survived = 0
        self.rounds = 0
        self.faults = []
        self._conn = None

    def run(self, ready):
        """Until it was struck often enough. `ready` is called when it can be struck, once each time."""
        while self.survived < self.strikes and not self.faults:
            try:
                ready()
                self._work()
            except self.struck:
                self.survived += 1
            except Exception as error:
                self.faults.append(repr(error))
            self._put_back()

    def work_until(self, enough):
        """Never struck."""
        try:
            while not enough():
                self.use()
        except Exception as error:
            self.faults.append(repr(error))

    def _work(self):
        while True:
            self.use()

    def use(self):
        self.rounds += 1
        way = self.rng.random()
        if way < 0.1:
            self.pool.execute("select 1")
        elif way < 0.2:
            self._conn = self.pool.getconn()
            self._query(self._conn)
            # Else putconn() warns, and logging's handlers lose their lock to an interrupt (they call
            # acquire() before the try), which then stops everybody who logs.
            self._conn.commit()
            self.pool.putconn(self._conn)
            self._conn = None
        elif way < 0.3:
            with self.pool.connection(timeout=interrupting.PATIENCE, autocommit=True) as conn:
                self._query(conn)
        else:
            with self.pool.connection() as conn:
                self._query(conn)

    def _query(self, conn):
        claim = conn.claim()
        for _ in range(self.rng.randrange(20)):
            conn.query()
        if self.rng.random() < 0.5:
            conn.commit()
        conn.check(claim)

    def _put_back(self):
        conn, self._conn = self._conn, None
        if conn is not None and self.pool._getconns.get(id(conn)) is not None:
            self._put_if_ours(conn)

    def _put_if_ours(self, conn):
        slot = self.pool._getconns.get(id(conn))
        if slot is not None and slot.link.conn is conn:
            self.pool.putconn(conn)


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


@swallowed
@pytest.mark.parametrize("shaped", [True, False])
def test_a_thousand_signals_at_random_moments_lose_nothing(shaped, rng, often, alarms):
    pool = new_pool(3, shaped=shaped)
    workers = [Borrower(pool, random.Random(rng.random()), (), 0) for _ in range(4)]
    over = threading.Event()
    threads = [
        threading.Thread(target=worker.work_until, args=(over.is_set,)) for worker in workers
    ]
    for thread in threads:
        thread.start()
    main = Borrower(pool, rng, KeyboardInterrupt, STORM)
    main.run(lambda: signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3)))
    over.set()
    for thread in threads:
        thread.join(interrupting.PATIENCE)
    report_storm(pool, main, *workers)
    assert not any(thread.is_alive() for thread in threads), "a waiter was forgotten"
    assert main.survived == STORM
    assert not [fault for one in (main, *workers) for fault in one.faults]
    assert not faults_of(pool, pool._driver.sessions)


class Struck(BaseException):
    """Thrown into a thread."""


@swallowed
def test_exceptions_thrown_into_threads_at_random_moments_lose_nothing(rng, often):
    pool = new_pool(3)
    ready = SimpleQueue()
    share = ASYNC_STORM // 4
    workers = [Borrower(pool, random.Random(rng.random()), Struck, share) for _ in range(4)]
    threads = [
        threading.Thread(target=worker.run, args=(lambda: ready.put(threading.get_ident()),))
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    never = threading.Event()
    for _ in range(share * len(workers)):
        ident = ready.get(timeout=interrupting.PATIENCE)
        never.wait(rng.uniform(0, 1e-3))
        throw(ident, Struck)
    for thread in threads:
        thread.join(interrupting.PATIENCE)
    report_storm(pool, *workers)
    assert not any(thread.is_alive() for thread in threads), "a waiter was forgotten"
    assert not [fault for worker in workers for fault in worker.faults]
    assert not faults_of(pool, pool._driver.sessions)


def throw(ident, error):
    set_async = ctypes.pythonapi.PyThreadState_SetAsyncExc
    assert set_async(ctypes.c_ulong(ident), ctypes.py_object(error)) == 1


def report_storm(pool, *borrowers):
    stats = pool.stats()
    print(
        f"{sys.version.split()[0]}: {sum(one.survived for one in borrowers)} strikes, "
        f"{sum(one.rounds for one in borrowers)} borrows begun, {stats.orphaned} slots brought home, "
        f"longest wait {stats.longest_wait * 1e3:.1f} ms"
    )
