"""Threads or gevent? The one place that knows what this process runs on, and what follows from it.

gevent turns a process's threads into greenlets by patching the standard library, at any time: a worker
of `gunicorn --preload -k gevent` patches long after the application was imported and its pools were
made. So nothing here is decided at import. Each question is asked when something is made (a gate for
one who waits, the keeper, the watcher), and again in a forked child, where all of it is made anew.

Locks are native in both cases (`Lock`, see _process/lock.py).

It must not know: pools, slots, drivers. gevent is imported by `_process/greenlets.py`, which is imported only
where gevent has patched.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from _queue import SimpleQueue  # the native one, whatever is patched
from _thread import _local, start_new_thread
from typing import TYPE_CHECKING, Any, Final, Protocol

from penstock._process import lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType, ModuleType

Lock: Final = lock.Lock

# The runner of each thread. Not `threading.current_thread()`: once gevent has patched, that tells a
# thread of before that it is another one.
_here = _local()


class Gate(Protocol):
    """What a borrower, or the keeper, sleeps at."""

    def put(self, item: Any, /) -> object:
        """Wake who sleeps. For any thread, any greenlet and as any weak reference's callback."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Wait for something that was put in; raises `queue.Empty` when the time is up."""


class Runner(Protocol):
    """A thread or a greenlet that runs one function."""

    def start(self) -> None:
        """Have it run; returns at once, or as soon as a thread has begun."""

    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""


class Ways(Protocol):
    """How a process works in the background."""

    #: Whether its runners are threads of the system, which must be parked around a fork.
    parks: bool

    def fit(self) -> bool:
        """Whether the process still runs on what it ran on when these were made."""

    def inbox(self) -> Gate:
        """What a runner waits at: being in it keeps no process and no hub from ending."""

    def runner(self, run: Callable[[], object], name: str) -> Runner:
        """Make one that runs `run`; it does not run yet."""

    def current(self) -> object:
        """The runner that calls; something else if it is none of these ways."""

    def ends(self, error: BaseException) -> bool:
        """Whether `error` is a runner's wish to end, and not to be survived."""


class _Thread(threading.Thread):
    """A daemon thread that knows itself."""

    def start(self) -> None:
        """Start it, where no signal strikes."""
        start_aside(super().start)

    def run(self) -> None:
        """Run the target."""
        _here.runner = self
        try:
            super().run()
        finally:
            _drop_hub()


def start_aside(start: Callable[[], object]) -> None:
    """Call a thread's `start` where no signal strikes: in a thread of its own.

    From CPython 3.14 on (see _process/lock.py) a signal's exception in `threading.Thread.start` can leave one of
    that module's locks held, which belongs to all threads of the process: none could start any more.
    Signals strike the main thread only. This waits, as `start` does, until the thread runs.

    Raises:
        RuntimeError: no thread can be started.
    """
    if sys.version_info < (3, 14) or is_green():
        start()
        return
    answer: SimpleQueue[BaseException | None] = SimpleQueue()
    start_new_thread(_start, (start, answer))
    error = answer.get()
    if error is not None:
        raise error


def _start(start: Callable[[], object], answer: SimpleQueue[BaseException | None]) -> None:
    error = None
    try:
        start()
    except BaseException as failure:  # noqa: BLE001  for the caller
        error = failure
    answer.put(error)


class Threads:
    """Daemon threads and the system's own queues."""

    parks = True

    def fit(self) -> bool:
        """Until gevent patches."""
        return not is_green()

    def inbox(self) -> Gate:
        """A queue whose `put` is one C call."""
        return _native_gate()

    def runner(self, run: Callable[[], object], name: str) -> Runner:
        """A daemon thread."""
        return _Thread(target=run, name=name, daemon=True)

    def current(self) -> object:
        """The calling thread, if it is a runner."""
        return getattr(_here, "runner", None)

    def ends(self, _error: BaseException) -> bool:
        """Never: whatever strikes, a thread goes on."""
        return False


def is_green() -> bool:
    """Whether threads are greenlets in this process, now."""
    return _patched("threading")


def has_green_waits() -> bool:
    """Whether waiting for a descriptor switches to other greenlets in this process, now."""
    return _patched("select")


def _patched(module: str) -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched(module))


def _drop_hub() -> None:
    """At the end of a thread, where waits are gevent's and threads are not: it had a hub of its own."""
    if has_green_waits() and not is_green():
        _greenlets().drop_hub()


_found: list[ModuleType] = []
_finding = Lock()


def _greenlets() -> Any:
    """Give gevent's half; gevent is there, so it may be imported.

    By one thread at a time: two that meet at the import system's lock, which is gevent's by now, would
    wait in hubs that have nothing else to wait for, and such a hub ends (LoopExit).
    """
    if not _found:
        with _finding:
            from penstock._process import greenlets  # noqa: PLC0415

            _found.append(greenlets)
    return _found[0]


def when_patched(call: Callable[[], object]) -> None:
    """Call `call` when gevent patches later on; known only where gevent was imported by now.

    A process that borrows before it patches would else not look again while connections are idle.
    """
    if "gevent" not in sys.modules or has_green_waits() or call in _told:
        return
    _told.append(call)
    from gevent import events  # noqa: PLC0415  gevent is there, so it may be imported

    def tell(event: object) -> None:
        if isinstance(event, events.GeventDidPatchAllEvent):
            call()

    events.subscribers.append(tell)


_told: list[Callable[[], object]] = []


def original(module: str, name: str) -> Any:
    """What a module had under a name before gevent patched it; None if it never had it."""
    if _patched(module):
        try:
            return sys.modules["gevent.monkey"].get_original(module, name)
        except AttributeError:
            return None
    return getattr(sys.modules[module], name, None)


def gate() -> Gate:
    """What the calling thread or greenlet can sleep at."""
    # Also where threads are threads: the connection may be another greenlet's of the same thread.
    if is_green() or has_green_waits():
        green: Gate = _greenlets().Gate()
        return green
    return _native_gate()


def _native_gate() -> Gate:
    place: SimpleQueue[Any] = SimpleQueue()
    return place


def ways() -> Ways:
    """How this process works in the background, as of now."""
    if is_green():
        green: Ways = _greenlets().Greenlets()
        return green
    return Threads()


def listen(fd: int, call: Callable[[], object]) -> Any:
    """On gevent: have the hub call `call` while `fd` is readable; None on threads."""
    if not is_green():
        return None
    return _greenlets().Listener(fd, call)


def is_running_callbacks() -> bool:
    """Whether the caller is gevent's hub itself, which cannot wait for anything."""
    if not (is_green() or has_green_waits()):
        return False
    return bool(_greenlets().is_hub())


def whereabouts(idents: Iterable[int]) -> tuple[Mapping[int, FrameType] | None, Mapping[int, str]]:
    """Where the greenlets with these idents stand, and what they are called; (None, {}) on threads.

    It looks at every object that the garbage collector knows: for error reports, not for a hot path.
    """
    if not is_green():
        return None, {}
    frames, names = _greenlets().whereabouts(set(idents))
    return frames, names


def rest(place: Gate, seconds: float) -> None:
    """Sleep at a gate until something is put in, or for so long."""
    with contextlib.suppress(queue.Empty):
        place.get(timeout=seconds)
