"""The lock behind every lock of penstock's: no signal's exception leaves it held, wherever it strikes.

*At every instruction*: the tripwire of `interrupting.py` strikes in the lock's own code and in the code
that takes it, once, twice at each distance, and without end. *At random*: real timers, while other
threads take the lock, in code that nothing watches. Only the main thread gets signals.
"""

from __future__ import annotations

import signal
import sys
import threading
from _thread import RLock
from contextlib import suppress
from functools import partial

import pytest

from penstock._process import lock as locks
from penstock._process import runtime
from penstock._process.lock import Lock
from penstock.integrations._unit import loans
from tests.contract.interrupting import NoTripwire, Tripwire, unmonitor

#: Far beyond what anything here takes.
PATIENCE = 15.0

#: A second signal so many instructions after the first is past all that a first one makes happen.
FARTHEST = 40

STORM = 1000


@pytest.fixture(scope="module")
def tripwire(tmp_path_factory):
    try:
        wire = Tripwire(tmp_path_factory.mktemp("tripwire"), __file__, sources=(locks.__file__,))
    except NoTripwire as missing:
        pytest.skip(f"the tripwire needs {missing}")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield wire
    signal.signal(signal.SIGINT, before)
    unmonitor(__file__)


# -- ways to take it ------------------------------------------------------------------------------


def with_it(lock):
    with lock:
        sorted(())


def in_time(lock):
    if not lock.take(PATIENCE):
        raise AssertionError("it is free")
    try:
        sorted(())
    finally:
        lock.release()


def with_it_and_fails(lock):
    with suppress(ZeroDivisionError), lock:
        sorted(())
        raise ZeroDivisionError


def with_it_twice(lock):
    with lock:
        sorted(())
        with lock:
            sorted(())
        sorted(())


def with_it_and_in_time(lock):
    with lock:
        in_time(lock)
    in_time(lock)


def in_a_call_that_returns(lock):
    return with_it_and_returns(lock) + 1


def with_it_and_returns(lock):
    with lock:
        return len(sorted(()))


def before_the_try(lock):
    """A planted fault: what everybody writes."""
    lock.acquire()
    try:
        sorted(())
    finally:
        lock.release()


WAYS = [
    with_it,
    in_time,
    with_it_and_fails,
    with_it_twice,
    with_it_and_in_time,
    in_a_call_that_returns,
]


def strike_everywhere(tripwire, way, again, depth, *, hostile=False):
    """How often it was struck, and after which strikes the lock was not held `depth` times."""
    strikes, faults, k = 0, [], 0
    while True:
        k += 1
        lock = Lock()
        for _ in range(depth):
            lock.acquire()
        place, count = tripwire.run(partial(way, lock), k, again=again, hostile=hostile)
        strikes += place is not None
        held = lock._recursion_count()
        if held < depth or (held > depth and not hostile):
            faults.append(f"instruction {k}, {place}: held {held} times, not {depth}")
        if count < k:
            return strikes, faults


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_signal_at_every_instruction_leaves_it_as_it_was(tripwire, way, depth):
    strikes, faults = strike_everywhere(tripwire, way, 0, depth)
    assert not faults, "\n".join(faults)
    assert strikes > 3


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_second_signal_while_the_first_is_handled_leaves_it_as_it_was(tripwire, way, depth):
    faults = [
        f"second {again} later: {fault}"
        for again in (-1, *range(1, FARTHEST))
        for fault in strike_everywhere(tripwire, way, again, depth)[1]
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("way", [with_it, in_time])
def test_an_exception_at_any_instruction_releases_nothing_that_the_caller_had(tripwire, way, depth):
    strikes, faults = strike_everywhere(tripwire, way, 0, depth, hostile=True)
    assert not faults, "\n".join(faults)
    assert strikes > 3


def test_a_lock_that_is_taken_before_the_try_is_found_held(tripwire):
    assert strike_everywhere(tripwire, before_the_try, 0, 0)[1]


# -- at random ------------------------------------------------------------------------------------


class Strike(BaseException):
    """What the signal handler raises."""


@pytest.fixture
def strike():
    """Signals without end, one every 0.2 ms; those that come while nothing is struck are ignored."""
    armed = [False]

    def handler(*_):
        if armed[0]:
            armed[0] = False
            raise Strike

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    yield armed
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def for_ever(way, lock):
    while True:
        way(lock)


@pytest.mark.parametrize("contended", [False, True], ids=["alone", "contended"])
@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_signals_at_random_moments_leave_it_free(strike, way, contended):
    lock, over = Lock(), threading.Event()

    def take_until_over():
        while not over.is_set():
            with lock:
                over.wait(1e-5)

    others = [threading.Thread(target=take_until_over) for _ in range(2 * contended)]
    for thread in others:
        thread.start()
    held = 0
    for _ in range(STORM if not contended else STORM // 4):
        with suppress(Strike):
            strike[0] = True
            for_ever(way, lock)
        held += lock._is_owned()
        while lock._is_owned():
            lock.release()
    over.set()
    for thread in others:
        thread.join(PATIENCE)
    assert not held
    assert lock.take(PATIENCE)


# -- what else it does ----------------------------------------------------------------------------


def test_a_lock_that_another_thread_holds_is_waited_for_as_long_as_was_said():
    lock = Lock()
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    assert lock.take(0) is False
    assert lock.take(0.001) is False


def test_a_lock_is_taken_again_by_the_thread_that_has_it():
    lock = Lock()
    with lock:
        assert lock.take(0) is True
        lock.release()
        assert lock._recursion_count() == 1
    assert not lock._is_owned()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="there it is Python's, so that it is safe")
def test_taking_it_costs_no_call_where_the_interpreter_protects_a_with():
    assert Lock.__enter__ is RLock.__enter__


def test_releasing_it_is_one_call_of_c_which_no_signal_divides():
    assert Lock.__exit__ is RLock.__exit__
    assert Lock.release is RLock.release


# -- the threads of ours, which threading's locks start --------------------------------------------


def test_a_thread_is_started_where_no_signal_strikes():
    """From 3.14 on `Thread.start` can be struck with a lock of threading's held; before it cannot."""
    started_in = []
    runtime.start_aside(lambda: started_in.append(threading.get_ident()))
    assert (started_in != [threading.get_ident()]) == (sys.version_info >= (3, 14))


def test_a_thread_that_cannot_be_started_is_told():
    def start():
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start"):
        runtime.start_aside(start)


def test_a_thread_of_ours_runs_when_its_start_returns():
    over = threading.Event()
    runner = runtime.Threads().runner(over.wait, "penstock-test")
    runner.start()
    assert runner.is_alive()
    over.set()


def test_a_unit_of_work_has_such_a_lock_too():
    assert type(loans.Loans("GET /")._lock) is Lock
