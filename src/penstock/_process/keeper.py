"""The keeper: one background runner per process, and connect workers on demand, for all pools.

One job: run what pools ask for away from borrowers. The keeper's runner closes connections, brings
orphaned slots home and calls pools when a tick is due; the workers open connections, several at a
time up to `CONNECT_CONCURRENCY` per process; those that take long wait for the network and count no
more, so that a server that says nothing keeps no other pool from its own. The keeper sleeps until
something is due: an idle process is never woken.

It must not know: what a pool decides, what a driver does, whether its runners are threads or
greenlets (`_process/runtime.py` does). A job is a callable; a pool is reached through a weak reference, so that
the keeper keeps none alive.

Started at first use *in this process*, never at import; daemon, so that it keeps no interpreter from
ending. Parked around a fork, so that penstock alone makes no process multi-threaded when it forks.
Where gevent patches after the keeper was made, the next to ask gets a new one; the old one's thread
goes on with what it was told before.

Locks: the inbox's `put` is one C call: it can be a weak reference's callback, run in a signal handler,
and neither be interrupted nor dead-lock. `_lock` guards the starting and counting of runners and is
never held while anything blocks.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import weakref
from _queue import SimpleQueue  # the native one: nobody sleeps at it
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from penstock._process import fork, runtime
from penstock._process.clock import clock

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Orphan(Protocol):
        """A weak reference to what was dropped without being given back."""

        home: Callable[[], Kept | None] | None

    class Kept(Protocol):
        """What a pool offers its keeper."""

        def _tick(self) -> None: ...
        def _bring_home(self, ref: Orphan) -> None: ...

    class Rings(Protocol):
        """Something that has a deadline."""

        def ring(self) -> object:
            """The time is up."""

    Job = Callable[[], object]

#: Connections being opened at the same time, per process. A connect costs the server a fork of a
#: process of its own and some milliseconds of CPU; more than 16 at a time do not come sooner. And four that
#: are tried beside 16 that are not answered.
CONNECT_CONCURRENCY: Final = 20

#: A job that takes longer than this, in seconds, costs no processor: it waits. How many such there are of one
#: pool is bounded by the machine.
SLOW_SECONDS: Final = 0.25

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
    """The runner, its inbox and its workers. Use `current()`; a forked child has its own."""

    def __init__(self) -> None:
        self._ways = runtime.ways()
        self.inbox = self._ways.inbox()
        self._jobs: queue.SimpleQueue[Job] = SimpleQueue()
        self._timers: dict[weakref.ref[Kept], float] = {}
        self._alarms: dict[Rings, float] = {}
        # Until when the keeper sleeps; infinite while it is awake, so that it is nudged in vain
        # rather than not at all.
        self._sleeps_until = float("inf")
        self._lock = runtime.Lock()
        self._thread: runtime.Runner | None = None
        self._workers: set[runtime.Runner] = set()
        # When each worker began with its job; its own to write.
        self._began: dict[object, float] = {}
        self._more = _MoreWorkers(self)
        # Workers that have nothing to do any more, and may not be gone yet.
        self._leaving: deque[runtime.Runner] = deque(maxlen=CONNECT_CONCURRENCY)
        # In a forked child: a greenlet of the parent's may be run again there, but must do nothing.
        self._abandoned = False
        # Until when no thread starts, around a fork; it expires, in case the end was interrupted.
        self._parked_until = 0.0

    # -- what pools ask for -----------------------------------------------------------------------

    def tell(self, job: Job) -> None:
        """Run `job` in the keeper's runner, soon. It must not block."""
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

    # -- its runners ------------------------------------------------------------------------------

    def fits(self) -> bool:
        """Whether the process still runs on what it ran on when this keeper was made."""
        return self._ways.fit()

    def take_over(self, other: Keeper) -> None:
        """Keep, from now on, what `other` was asked to keep, and can no more."""
        self._timers.update(other._timers)
        self._alarms.update(other._alarms)

    def abandon(self) -> None:
        """In a forked child: whatever of this keeper is run again there ends."""
        self._abandoned = True
        self._jobs = SimpleQueue()
        self._timers = {}
        self._alarms = {}

    def ensure_running(self) -> bool:
        """Start the keeper's runner unless it runs; cheap, and repeatable after an interrupt.

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
            self._thread = self._ways.runner(self._run, "penstock-keeper")
            _try_to_start(self._thread)
        return not _ending

    def _hand_to_worker(self, job: Job) -> None:
        self._jobs.put(job)
        self._ensure_worker()

    def _ensure_worker(self) -> None:
        with self._lock:
            self._workers = set(filter(_is_alive, self._workers))
            enough = self._quick(clock() - SLOW_SECONDS) >= CONNECT_CONCURRENCY
            started = enough or self._start_worker()
        if enough:
            self.ring_at(self._more, clock() + SLOW_SECONDS)
        if not started:  # the interpreter is ending: the keeper may still be there
            self.inbox.put(self._work)

    def _start_worker(self) -> bool:
        worker = self._ways.runner(self._work, "penstock-connect")
        self._workers.add(worker)
        return _try_to_start(worker)

    def _quick(self, since: float) -> int:
        """How many workers began their job after `since`, or have none yet."""
        return sum(self._began.get(worker, since) >= since for worker in self._workers)

    def _ensure_more(self) -> None:
        """Those who work may have become slow: others for what is still to be done."""
        for _ in range(self._jobs.qsize()):
            self._ensure_worker()

    def park(self, seconds: float) -> None:
        """Before a fork: end the threads for a moment.

        Workers have FINISH_SECONDS: enough to end after what was asked of them, as it is when open()
        has returned; one that waits for a server is not waited for.
        """
        if not self._ways.parks:
            return
        deadline = clock() + seconds
        thread, mine = self._thread, self._ways.current()
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
            if parked and self._thread is self._ways.current():
                self._thread = None
            return not parked

    # -- the keeper's runner ----------------------------------------------------------------------

    def _run(self) -> None:
        # A start that was interrupted may have succeeded, and another one been made: one goes on.
        while self._thread is self._ways.current() and self._lap():
            pass

    def _lap(self) -> bool:
        try:
            return self._step()
        except BaseException as error:  # noqa: BLE001  whatever strikes here, the keeper goes on
            if self._ways.ends(error):
                return False
            _log.exception("the keeper goes on after an error")
            return True

    def _step(self) -> bool:
        item = self._next()
        if self._abandoned:
            return False
        if item is _stop:
            return self._leave()
        if item is None:
            self._tick_due()
        elif isinstance(item, weakref.ref):  # of what is gone: that is why it is here
            _bring_home(cast("Orphan", item))
        else:
            cast("Job", item)()
        return True

    def _next(self) -> Orphan | Job | None:
        """What to do next; None when a timer is due."""
        self._sleeps_until = float("inf")
        due = [*self._timers.values(), *self._alarms.values()]
        when = min(due, default=None)
        if when is None:
            self._sleeps_until = float("inf")
            return self._received(None)
        self._sleeps_until = when
        try:
            # At most 1e6 s, since a lock takes no more; then it looks again.
            return self._received(min(max(0.0, when - clock()), 1e6))
        except queue.Empty:
            return None

    def _received(self, seconds: float | None) -> Orphan | Job | None:
        item: Orphan | Job | None = self.inbox.get(timeout=seconds)
        return item

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

    # -- the workers' runners ---------------------------------------------------------------------

    def _work(self) -> None:
        while self._work_once():
            pass
        self._began.pop(self._ways.current(), None)

    def _work_once(self) -> bool:
        try:
            job = self._jobs.get_nowait()
        except queue.Empty:
            return self._stay()
        self._began[self._ways.current()] = clock()
        try:
            job()
        except BaseException as error:  # noqa: BLE001  one job's error must not end the others
            if self._ways.ends(error):
                return False
            _log.exception("a connect worker goes on after an error")
        return True

    def _stay(self) -> bool:
        # Under the lock: whoever puts a job in looks under it whether a worker is there.
        with self._lock:
            if self._jobs.empty():
                worker: Any = self._ways.current()
                if worker in self._workers:  # else the keeper works, for want of a worker
                    self._leaving.append(worker)
                    self._workers.discard(worker)
                return False
            return True


class _MoreWorkers:
    """Rings when those who work may have become slow; it keeps no keeper alive."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = weakref.ref(keeper)

    def ring(self) -> None:
        """The time is up."""
        keeper = self._keeper()
        if keeper is not None:
            keeper._ensure_more()


def _is_alive(runner: runtime.Runner) -> bool:
    return runner.is_alive()


def _wait_gone(thread: runtime.Runner | None, deadline: float) -> None:
    # A start can have been interrupted.
    if isinstance(thread, threading.Thread) and thread.ident is not None:
        fork.wait_gone(thread, max(0.0, deadline - clock()))


#: Not empty once the interpreter has said that it starts no more threads.
_ending: list[bool] = []


def _try_to_start(runner: runtime.Runner) -> bool:
    try:
        runner.start()
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


def _bring_home(ref: Orphan) -> None:
    pool = None if ref.home is None else ref.home()
    if pool is not None:
        pool._bring_home(ref)
        return
    for let_go in _strays:
        let_go(ref)


_strays: list[Callable[[Any], object]] = []


def on_stray(let_go: Callable[[Any], object]) -> None:
    """Call `let_go` with each slot's reference whose pool was garbage before the slot was."""
    if let_go not in _strays:
        _strays.append(let_go)


# -- one per process ------------------------------------------------------------------------------

# The one to use first, or none; after it those of before gevent patched. A list, so that taking and
# giving are atomic.
_keepers: list[Keeper] = []


def current() -> Keeper:
    """This process's keeper; made at first use, its runner not started yet."""
    try:
        kept = _keepers[0]
    except IndexError:
        return _make()
    return kept if kept.fits() else _make()


_making = [runtime.Lock()]


def _make() -> Keeper:
    fork.on_before(_park)
    fork.on_after_in_parent(_unpark)
    fork.on_after_in_child(_forget)
    with _making[0]:
        if not _keepers:
            _keepers.append(Keeper())  # last: an interrupt before it leaves all of this to the next
        elif not _keepers[0].fits():
            _replace(_keepers[0])
    return _keepers[0]


def _replace(former: Keeper) -> None:
    """Make another: gevent has patched since, or its hub was destroyed."""
    kept = Keeper()
    kept.take_over(former)
    _keepers.insert(0, kept)
    kept.ensure_running()


def _park(seconds: float) -> None:
    for keeper in tuple(_keepers):
        keeper.park(seconds)


def _unpark() -> None:
    for keeper in tuple(_keepers):
        keeper.unpark()


def _forget() -> None:
    """In a forked child: the inherited keeper has no thread, and its lock may be held for ever."""
    _making[0] = runtime.Lock()
    for keeper in tuple(_keepers):
        keeper.abandon()
    _keepers.clear()
