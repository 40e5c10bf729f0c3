"""The keeper: one background thread per process, and connect workers on demand, for all pools.

One job: run what pools ask for away from borrowers. The keeper's thread closes connections, brings
orphaned slots home and calls pools when a tick is due; the workers open connections, several at a
time up to `CONNECT_CONCURRENCY` per process. It sleeps until something is due: an idle process is
never woken.

It must not know: what a pool decides, what a driver does. A job is a callable; a pool is reached
through a weak reference, so that the keeper keeps none alive.

Started at first use *in this process*, never at import; daemon, so that it keeps no interpreter from
ending. Parked around a fork, so that penstock alone makes no process multi-threaded when it forks.

Locks: the inbox and the job queue are `SimpleQueue`s, whose `put` is one C call: it can be a weak
reference's callback, run in a signal handler, and neither be interrupted nor dead-lock. `_lock`
guards the starting and counting of threads and is never held while anything blocks.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from penstock import fork
from penstock._machine.slot import SlotRef
from penstock.clock import clock

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable
    from typing import Protocol

    class Kept(Protocol):
        """What a pool offers its keeper."""

        def _tick(self) -> None: ...
        def _bring_home(self, ref: SlotRef) -> None: ...

    class Rings(Protocol):
        """Something that has a deadline."""

        def ring(self) -> object:
            """The time is up."""

    Job = Callable[[], object]

#: Connections being opened at the same time, per process. A connect costs the server a fork of a
#: process of its own and some milliseconds of CPU; more at a time do not come sooner.
CONNECT_CONCURRENCY: Final = 16

#: How long a fork waits for connect workers, in seconds: to end takes one a tenth of a millisecond.
FINISH_SECONDS: Final = 0.005

#: A fork takes milliseconds; after this long, in seconds, its end was not heard of.
PARKED_SECONDS: Final = 1.0

_log = logging.getLogger("penstock")


def _stop() -> None:
    """Told to the keeper, it ends it."""


def _nudge() -> None:
    """Told to the keeper, it makes it look at its timers again."""


class Keeper:
    """The thread, its inbox and its workers. Use `current()`; a forked child has its own."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[SlotRef | Job] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._timers: dict[weakref.ref[Kept], float] = {}
        self._alarms: dict[Rings, float] = {}
        # Until when the keeper sleeps; infinite while it is awake, so that it is nudged in vain
        # rather than not at all.
        self._sleeps_until = float("inf")
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._workers: set[threading.Thread] = set()
        # Workers that have nothing to do any more, and may not be gone yet.
        self._leaving: deque[threading.Thread] = deque(maxlen=CONNECT_CONCURRENCY)
        # Until when no thread starts, around a fork; it expires, in case the end was interrupted.
        self._parked_until = 0.0

    # -- what pools ask for -----------------------------------------------------------------------

    def tell(self, job: Job) -> None:
        """Run `job` in the keeper's thread, soon. It must not block."""
        self.inbox.put(job)  # first, so that an interrupt cannot lose it
        self.ensure_running()

    def submit(self, job: Job) -> None:
        """Run `job` in a worker. It may block."""
        # The keeper starts the workers: no signal can strike it between the job and the start.
        self.tell(partial(self._hand_to_worker, job))

    def call_at(self, pool: weakref.ref[Kept], when: float) -> None:
        """Have the pool ticked at `when`, or earlier."""
        # The keeper alone writes the timers: of two who compare and store, one would be lost.
        self.tell(partial(self._set_timer, pool, when))

    def _set_timer(self, pool: weakref.ref[Kept], when: float) -> None:
        alive = pool()  # a dead reference has no hash, and nothing to tick
        if alive is not None:
            self._timers[pool] = min(when, self._timers.get(pool, when))

    def ring_at(self, alarm: Rings, when: float) -> None:
        """Call ``alarm.ring()`` at `when`, unless it is forgotten before."""
        self._alarms[alarm] = when
        if when < self._sleeps_until:
            self.inbox.put(_nudge)
        self.ensure_running()

    def forget_alarm(self, alarm: Rings) -> None:
        """Do not ring; unknown ones are ignored."""
        self._alarms.pop(alarm, None)

    # -- its threads ------------------------------------------------------------------------------

    def ensure_running(self) -> bool:
        """Start the keeper's thread unless it runs; cheap, and repeatable after an interrupt.

        Returns:
            False when none will ever be started any more: the interpreter is ending.
        """
        thread = self._thread
        return (thread is not None and thread.is_alive()) or self._start()

    def _start(self) -> bool:
        if sys.is_finalizing():
            # Whatever is started now never runs, and a lock may be held by a thread that is gone.
            return False
        with self._lock:
            if clock() < self._parked_until or (
                self._thread is not None and self._thread.is_alive()
            ):
                return True
            self._thread = threading.Thread(target=self._run, name="penstock-keeper", daemon=True)
            _try_to_start(self._thread)
        return not _ending

    def _hand_to_worker(self, job: Job) -> None:
        self._jobs.put(job)
        self._ensure_worker()

    def _ensure_worker(self) -> None:
        with self._lock:
            self._workers = set(filter(threading.Thread.is_alive, self._workers))
            if len(self._workers) >= CONNECT_CONCURRENCY:
                return
            worker = threading.Thread(target=self._work, name="penstock-connect", daemon=True)
            self._workers.add(worker)
            started = _try_to_start(worker)
        if not started:  # the interpreter is ending: the keeper may still be there
            self.inbox.put(self._work)

    def park(self, seconds: float) -> None:
        """Before a fork: end the threads for a moment.

        Workers have FINISH_SECONDS: enough to end after what was asked of them, as it is when open()
        has returned; one that waits for a server is not waited for.
        """
        deadline = clock() + seconds
        thread, mine = self._thread, threading.current_thread()
        workers = [*self._workers, *self._leaving]
        if thread is mine or mine in workers or (thread is None and not workers):
            return
        self._parked_until = clock() + PARKED_SECONDS
        self.inbox.put(_stop)
        _wait_gone(thread, deadline)
        finish = min(deadline, clock() + FINISH_SECONDS)
        # Once more: it may have started one, before it was told to stop.
        for worker in [*self._workers, *self._leaving]:
            _wait_gone(worker, finish)
        self._leaving.clear()

    def unpark(self) -> None:
        """After the fork, in the parent: go on, with the same thread if it had no time to end."""
        with self._lock:
            was_parked, self._parked_until = self._parked_until > 0, 0.0
        if was_parked:
            self.ensure_running()

    def _leave(self) -> bool:
        """Told to stop: whether to go on all the same. Under the lock, so that unpark() knows."""
        with self._lock:
            parked = clock() < self._parked_until
            if parked and self._thread is threading.current_thread():
                self._thread = None
            return not parked

    # -- the keeper's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        # A start that was interrupted may have succeeded, and another one been made: one goes on.
        while self._thread is threading.current_thread() and self._lap():
            pass

    def _lap(self) -> bool:
        try:
            return self._step()
        except BaseException:  # noqa: BLE001  whatever strikes here, the keeper goes on
            _log.exception("the keeper goes on after an error")
            return True

    def _step(self) -> bool:
        item = self._next()
        if item is _stop:
            return self._leave()
        if item is None:
            self._tick_due()
        elif isinstance(item, SlotRef):
            _bring_home(item)
        else:
            item()
        return True

    def _next(self) -> SlotRef | Job | None:
        """What to do next; None when a timer is due."""
        self._sleeps_until = float("inf")
        due = [*self._timers.values(), *self._alarms.values()]
        when = min(due, default=None)
        if when is None:
            self._sleeps_until = float("inf")
            return self.inbox.get()
        self._sleeps_until = when
        try:
            # At most 1e6 s, since a lock takes no more; then it looks again.
            return self.inbox.get(timeout=min(max(0.0, when - clock()), 1e6))
        except queue.Empty:
            return None

    def _tick_due(self) -> None:
        now = clock()
        for ref, when in list(self._timers.items()):
            pool = ref()
            if pool is None or when <= now:
                self._timers.pop(ref, None)
            if pool is not None and when <= now:
                _tick(pool)
        for alarm, when in list(self._alarms.items()):
            if when <= now:
                self._alarms.pop(alarm, None)
                alarm.ring()

    # -- the workers' threads ---------------------------------------------------------------------

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        try:
            job = self._jobs.get_nowait()
        except queue.Empty:
            return self._stay()
        try:
            job()
        except BaseException:  # noqa: BLE001  one job's error must not end the others
            _log.exception("a connect worker goes on after an error")
        return True

    def _stay(self) -> bool:
        # Under the lock: whoever puts a job in looks under it whether a worker is there.
        with self._lock:
            if self._jobs.empty():
                self._leaving.append(threading.current_thread())
                self._workers.discard(threading.current_thread())
                return False
            return True


def _wait_gone(thread: threading.Thread | None, deadline: float) -> None:
    if thread is not None and thread.ident is not None:  # a start can have been interrupted
        fork.wait_gone(thread, max(0.0, deadline - clock()))


#: Not empty once the interpreter has said that it starts no more threads.
_ending: list[bool] = []


def _try_to_start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError as error:  # the interpreter is ending, or the system has no thread left
        if "shutdown" in str(error):  # CPython's word, from 3.12 on; before, nothing is said
            _ending.append(True)
        _log.debug("a thread cannot be started", exc_info=True)
        return False
    return True


def _tick(pool: Kept) -> None:
    try:
        pool._tick()
    except Exception:  # noqa: BLE001  one pool's error must not keep others from being ticked
        _log.exception("a pool's tick failed")


def _bring_home(ref: SlotRef) -> None:
    pool = None if ref.home is None else ref.home()
    if pool is not None:
        pool._bring_home(ref)
        return
    for let_go in _strays:
        let_go(ref)


_strays: list[Callable[[SlotRef], object]] = []


def on_stray(let_go: Callable[[SlotRef], object]) -> None:
    """Call `let_go` with each slot's reference whose pool was garbage before the slot was."""
    if let_go not in _strays:
        _strays.append(let_go)


# -- one per process ------------------------------------------------------------------------------

_keepers: list[Keeper] = []  # one or none; a list, so that taking and giving are atomic


def current() -> Keeper:
    """This process's keeper; made at first use, its thread not started yet."""
    try:
        return _keepers[0]
    except IndexError:
        return _make()


_making = [threading.RLock()]


def _make() -> Keeper:
    fork.on_before(_park)
    fork.on_after_in_parent(_unpark)
    fork.on_after_in_child(_forget)
    with _making[0]:
        if not _keepers:
            _keepers.append(Keeper())  # last: an interrupt before it leaves all of this to the next
    return _keepers[0]


def _park(seconds: float) -> None:
    for keeper in tuple(_keepers):
        keeper.park(seconds)


def _unpark() -> None:
    for keeper in tuple(_keepers):
        keeper.unpark()


def _forget() -> None:
    """In a forked child: the inherited keeper has no thread, and its lock may be held for ever."""
    _making[0] = threading.RLock()
    _keepers.clear()
