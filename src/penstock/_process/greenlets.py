"""gevent's half of `_process/runtime.py`: gates, the keeper's inbox and runners, and what the hub listens to.

One job: be to greenlets what `_queue.SimpleQueue` and `threading.Thread` are to threads.

It must not know: pools, slots, drivers, the keeper. It is imported only where gevent has patched.

Waking. A `put` must be right from any greenlet, from the hub itself, from another native thread, from
a signal handler, and as the callback of a weak reference anywhere in the middle of these. The one
thing that gevent promises to be is `loop.run_callback_threadsafe`; so a put is that function, bound
to a queue's own put by `partial`: no line of Python runs before the item is on its way, and the
queue's put runs in the hub of the thread that the queue belongs to.

Home. What runs in the background runs in the hub of the main thread, which outlives other threads
and is not stopped between two jobs as a thread pool's is. Nothing here keeps a hub alive: timers and
watchers are made with ``ref=False``.
"""

from __future__ import annotations

import gc
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import gevent.hub
import gevent.queue
from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

READ = 1  # libev's EV_READ, libuv's UV_READABLE

# Before gevent 25.4 its SimpleQueue is CPython's, in Python; then Queue is the simple one.
_Queue: Any = gevent.queue.SimpleQueue
if not _Queue.__module__.startswith("gevent"):
    _Queue = gevent.queue.Queue


def is_hub() -> bool:
    """Whether the caller is a hub, running a callback."""
    return isinstance(getcurrent(), gevent.hub.Hub)


def drop_hub() -> None:
    """At the end of a thread: close the two descriptors of its hub; gevent keeps them for ever."""
    gevent.get_hub().destroy(destroy_loop=True)


def home() -> Any:
    """The hub of the main thread; the calling thread's where the main thread has none."""
    mine = gevent.get_hub()
    if getattr(mine, "main_hub", True):
        return mine
    # Once per process at most, and only where a thread of its own is the first to use a pool.
    hubs = [each for each in gc.get_objects() if isinstance(each, gevent.hub.Hub)]
    return next((each for each in hubs if each.main_hub and _lives(each)), mine)


def _lives(hub: Any) -> bool:
    """Whether this hub's loop can still run callbacks."""
    return not hub.dead and hub.loop is not None and bool(hub.loop.ptr)


class Gate:
    """Where one greenlet sleeps, in its own thread's hub; anybody may wake it."""

    __slots__ = ("get", "put")

    def __init__(self) -> None:
        queue = _Queue()
        self.get: Callable[..., Any] = queue.get
        self.put: Callable[[Any], object] = partial(
            gevent.get_hub().loop.run_callback_threadsafe, queue.put
        )


class Inbox:
    """Where the keeper sleeps, in the home hub. It keeps no hub from ending."""

    __slots__ = ("_loop", "_queue", "put")

    def __init__(self, hub: Any) -> None:
        self._loop = hub.loop
        self._queue = queue = _queue_in(hub)
        self.put: Callable[[Any], object] = partial(hub.loop.run_callback_threadsafe, queue.put)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item; when the time is up, None, like one that was put in."""
        if timeout is None or not block:
            return self._queue.get(block)
        # The queue's own timeout would be a timer that keeps the hub alive.
        timer = self._loop.timer(timeout, ref=False)
        timer.start(self._queue.put, None)
        try:
            return self._queue.get()
        finally:
            timer.stop()
            timer.close()


def _queue_in(hub: Any) -> Any:
    """A queue that belongs to `hub`: it would take the calling thread's."""
    mine = gevent.get_hub()
    if mine is hub:
        return _Queue()
    try:
        gevent.hub.set_hub(hub)  # pyright: ignore[reportAttributeAccessIssue]  from C
        return _Queue()
    finally:
        gevent.hub.set_hub(mine)  # pyright: ignore[reportAttributeAccessIssue]


class Greenlets:
    """Raw greenlets in the home hub: they carry nothing of the request that caused their start."""

    parks = False

    def __init__(self) -> None:
        self._hub = home()

    def fit(self) -> bool:
        """Until the hub is destroyed."""
        return _lives(self._hub)

    def inbox(self) -> Inbox:
        """A queue that belongs to the home hub."""
        return Inbox(self._hub)

    def runner(self, run: Callable[[], object], name: str) -> GreenRunner:
        """A greenlet of the home hub."""
        return GreenRunner(self._hub, run, name)

    def current(self) -> object:
        """The runner that calls, or None."""
        return getattr(getcurrent(), "runner", None)

    def ends(self, error: BaseException) -> bool:
        """A greenlet that is killed, or collected, must end."""
        return isinstance(error, gevent.GreenletExit)


class GreenRunner:
    """One greenlet, started from wherever, run in the home hub."""

    def __init__(self, hub: Any, run: Callable[[], object], name: str) -> None:
        self.name = name
        self._hub = hub
        self._run = run
        self._greenlet: Any = None
        self._start: Any = None  # gevent's record of the callback that starts it

    def start(self) -> None:
        """Have the hub start it; never switches."""
        self._start = self._hub.loop.run_callback_threadsafe(self._begin)

    def _begin(self) -> None:
        # In the hub, which so becomes its parent.
        made: Any = greenlet(self._run)
        self._greenlet = made
        made.runner = self
        made.switch()

    def is_alive(self) -> bool:
        """Whether it runs or is about to."""
        made = self._greenlet
        if made is None:
            return self._start is not None and bool(self._start.pending)
        return not made.dead


class Listener:
    """Has the home hub call a function while a descriptor is readable; keeps no hub alive.

    It must not raise, nor wait: it runs in the hub.
    """

    def __init__(self, fd: int, call: Callable[[], object]) -> None:
        self._hub = home()
        self._io: Any = None
        if gevent.get_hub() is self._hub:
            self._listen(fd, call)
        else:  # a loop's watchers are changed in its own thread only
            self._hub.loop.run_callback_threadsafe(self._listen, fd, call)

    def _listen(self, fd: int, call: Callable[[], object]) -> None:
        self._io = self._hub.loop.io(fd, READ, ref=False)
        self._io.start(call)

    def fit(self) -> bool:
        """Until the hub is destroyed."""
        return _lives(self._hub)

    def close(self) -> None:
        """Stop; before the descriptor is closed."""
        io, self._io = self._io, None
        if io is not None and self.fit():
            io.stop()
            io.close()


# -- where greenlets stand ------------------------------------------------------------------------


def whereabouts(idents: set[int]) -> tuple[dict[int, FrameType], dict[int, str]]:
    """Frames and names of the greenlets whose `threading.get_ident()` is in `idents`."""
    frames: dict[int, FrameType] = {}
    names: dict[int, str] = {}
    found = [each for each in gc.get_objects() if id(each) in idents and isinstance(each, greenlet)]
    for each in found:
        frame = sys._getframe() if each is getcurrent() else each.gr_frame  # noqa: SLF001  documented
        if frame is not None:
            frames[id(each)] = frame
        name = _thread_name(id(each)) or getattr(each, "name", "")
        if name:
            names[id(each)] = str(name)
    return frames, names


def _thread_name(ident: int) -> str:
    """What the program called it, if it was started as a thread."""
    thread = threading._active.get(ident)  # type: ignore[attr-defined]  # noqa: SLF001  `enumerate` locks
    return "" if thread is None or isinstance(thread, threading._DummyThread) else thread.name  # noqa: SLF001
