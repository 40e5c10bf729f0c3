"""A deadline for psycopg2's blocking calls: when it has passed, the connection's socket is shut down.

psycopg2 waits inside libpq, which waits as long as the server likes; no option and no time-out of
the socket bounds that. But whoever is blocked on a socket that another thread shuts down fails a
millisecond later. So one thread per process, started when first needed, waits for the earliest
deadline. It sleeps until then: of calls that end in time it learns when it wakes anyway, so that
they cost two microseconds and no change of threads.

Around a fork it ends for a moment, as the keeper's does, so that penstock makes no process multi-threaded
when it forks; what it waits for is kept. Under gevent the thread is a greenlet that keeps no hub from
ending, and the call waits in psycopg2's wait callback: the same holds.

It must not know: what is being done. The lock of a `Bound` decides who is first, the end of the call or
the deadline: once the block is left, the socket is not touched any more. It is held for one shutdown.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol, Self

from penstock._process import fork, runtime

if TYPE_CHECKING:
    from types import TracebackType

    class Rings(Protocol):
        """What the bell watches."""

        deadline: float

        @property
        def is_over(self) -> bool:
            """Whether it is to be forgotten."""

        def ring(self) -> None:
            """The deadline has passed, as it was when the bell looked."""

    class Discards(Protocol):
        """What can be shut down: a link."""

        def discard(self) -> None:
            """Shut the socket down."""


class Bound:
    """``with Bound(link, deadline):`` discards the link if the block lasts longer.

    In a forked child nothing rings: a shutdown would act on the parent's session.

    Attributes:
        deadline: an instant of the monotonic clock.
        rang: the deadline came first.
    """

    __slots__ = ("_link", "_lock", "deadline", "rang")

    def __init__(self, link: Discards, deadline: float) -> None:
        self._link: Discards | None = link
        self._lock = runtime.Lock()
        self.deadline = deadline
        self.rang = False

    def __enter__(self) -> Self:
        if self.deadline != inf:
            current_bell().watch(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._link = None

    @property
    def is_over(self) -> bool:
        """Whether the block was left."""
        return self._link is None

    def ring(self) -> None:
        """The deadline has passed, unless the block has ended."""
        with self._lock:
            if self._link is not None:
                self.rang = True
                self._link.discard()


class Bell:
    """The thread that waits for deadlines. Use `current_bell()`; a forked child has its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._ways = runtime.ways()
        self._lock = runtime.Lock()
        self._new: deque[Rings] = deque()
        self._waiting: list[Rings] = []  # the thread's own; here, so that the next one finds them
        self._wake = self._ways.inbox()
        # Until when it sleeps. Whoever adds a deadline publishes it, then looks here; the thread
        # writes this, then looks for new ones. Whichever comes second sees the other.
        self._sleeps_until = inf
        self._thread: runtime.Runner | None = None
        # Until when no thread starts, around a fork; it expires, in case the end was interrupted.
        self._parked_until = 0.0

    def fits(self) -> bool:
        """Whether it is this process's, and the process runs on what it ran on then."""
        return self.pid == os.getpid() and self._ways.fit()

    def watch(self, bound: Rings) -> None:
        """Ring it at its deadline."""
        self._new.append(bound)
        if not self._runs():
            self._start()
        self._wake_by(bound.deadline)

    def look_by(self, deadline: float) -> None:
        """One that it watches has another deadline."""
        if not self._runs():
            self._start()
        self._wake_by(deadline)

    def _wake_by(self, deadline: float) -> None:
        if deadline < self._sleeps_until:
            self._wake.put(None)

    def _runs(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    def park(self, seconds: float) -> None:
        """Before a fork: end the thread for a moment."""
        thread = self._thread
        if thread is self._ways.current() or not isinstance(thread, threading.Thread):
            return
        self._parked_until = monotonic() + PARKED_SECONDS
        self._wake.put(None)
        if thread.ident is not None:  # a start can have been interrupted
            fork.wait_gone(thread, seconds)

    def unpark(self) -> None:
        """After the fork, in the parent: go on if there is something to wait for."""
        with self._lock:
            self._parked_until = 0.0
        if (self._waiting or self._new) and not self._runs():
            self._start()

    def _leaves(self) -> bool:
        """Whether the thread is to end. Under the lock, so that unpark() knows."""
        with self._lock:
            parked = monotonic() < self._parked_until
            if parked and self._thread is self._ways.current():
                self._thread = None
            return parked

    def _start(self) -> None:
        if sys.is_finalizing():  # whatever is started now never runs
            return
        with self._lock:
            if monotonic() >= self._parked_until and not self._runs():
                thread = self._ways.runner(self._run, "penstock-psycopg2")
                with suppress(RuntimeError):  # the interpreter is ending; then there is no bound
                    thread.start()
                self._thread = thread

    def _run(self) -> None:
        # In a forked child gevent runs the parent's greenlets on: this one must ring nothing there.
        while self.pid == os.getpid() and not self._leaves():
            self._sleeps_until = inf  # while it looks: woken in vain rather than not at all
            self._waiting = waiting = self._rung(self._waiting)
            self._sleeps_until = min((each.deadline for each in waiting), default=inf)
            if not self._new:
                self._sleep()

    def _rung(self, waiting: list[Rings]) -> list[Rings]:
        """Ring those that are due, forget those that are over, take in the new ones."""
        while self._new:
            waiting.append(self._new.popleft())
        now = monotonic()
        for each in waiting:
            if each.deadline <= now:
                each.ring()
        return [each for each in waiting if not each.is_over and each.deadline > now]

    def _sleep(self) -> None:
        left = min(self._sleeps_until - monotonic(), _LONGEST)
        with suppress(queue.Empty):
            self._wake.get(timeout=None if left == _LONGEST else max(0.0, left))


#: The longest sleep in seconds: longer times overflow a lock's.
_LONGEST: Final = 1e6

#: A fork takes milliseconds; after this long, in seconds, its end was not heard of.
PARKED_SECONDS: Final = 1.0

_current: Bell | None = None


def current_bell() -> Bell:
    """This process's bell; made at first use, its thread not started yet."""
    global _current
    bell = _current
    if bell is None or not bell.fits():
        fork.on_before(_park)
        fork.on_after_in_parent(_unpark)
        bell = _current = Bell()
    return bell


def _park(seconds: float) -> None:
    bell = _current
    if bell is not None and bell.pid == os.getpid():  # an inherited one's lock may be held for ever
        bell.park(seconds)


def _unpark() -> None:
    bell = _current
    if bell is not None and bell.pid == os.getpid():
        bell.unpark()
