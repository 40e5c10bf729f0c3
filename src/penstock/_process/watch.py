"""Who hung up? One epoll for all connections of the process, and one sleeping thread or gevent's hub.

Each connection's descriptor is registered with ``EPOLLRDHUP | EPOLLONESHOT`` and without EPOLLIN:
ordinary traffic never wakes it (0 wake-ups in 10,000 queries and notifications), a server
that closes does, 7 to 10 us later, once. Where there is no epoll, `available()` is False, a `Watch`
does nothing, and the runtime looks at the socket at each borrow. On gevent there is no thread: the hub
waits for the epoll's own descriptor (`hub.listen`), decided when the epoll is made, in each process.

It must not know: slots, pools, drivers. A token is whatever its owner gave; `hung_up` says the rest.

Locks: `_changing` makes one step of an entry and its registration: libpq closes a broken socket by
itself, so its number can be another connection's while the old one is being removed. It is an RLock,
since a signal handler may close a pool. `_entries` is read without it. `_lock` protects starting, stopping and the epoll's
birth; it is never held while something waits, and a forked child makes its own.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from penstock._process import fork, runtime

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("penstock")

# <sys/epoll.h> and <bits/poll.h>; select has the names on Linux only, and gevent takes some away.
_EPOLLIN = 0x001
_EPOLLONESHOT = 1 << 30
_RDHUP = 0x2000
_ENDED = 0x2000 | 0x010 | 0x008 | 0x020  # RDHUP, HUP, ERR, and NVAL: closed behind our back

# A thread whose epoll was closed by somebody else would spin: so many failures in a row end it.
_FAILURES_IN_A_ROW = 10

_serials = itertools.count(1)


def available() -> bool:
    """Tell whether this system can watch; if not, look at the socket at each borrow."""
    return _select("epoll") is not None and hasattr(os, "eventfd")


def _select(name: str) -> Any:
    """What `select` has: gevent deletes `epoll`, and replaces `poll` by one that waits in the hub."""
    return runtime.original("select", name)


class _Entry:
    """One watched descriptor; the object itself, not its number, is what an event is checked by."""

    __slots__ = ("reported", "serial", "token")

    def __init__(self, token: Any) -> None:
        self.serial = next(_serials)
        self.token = token
        self.reported = False


class _Run:
    """One life of the thread."""

    __slots__ = ("failures", "missed", "stopping", "thread")

    def __init__(self, watch: Watch) -> None:
        self.failures = 0
        # Events may have been taken from the epoll and not been looked at, by an earlier life, too.
        self.missed = True
        self.stopping = False
        self.thread = threading.Thread(
            target=watch._serve,  # noqa: SLF001  a part of it
            args=(self,),
            name="penstock-watch",
            daemon=True,
        )


class Watch:
    """Tells when the other end of a descriptor hangs up.

    Made once per process; costs nothing until the first `add`, follows forks from then on, and
    lives until `close`. All methods may be called from any thread.

    Args:
        hung_up: called as ``hung_up(token, fd)`` in the watcher's thread (or by `collect`). It must
            be cheap, must not block, and must check that `token` still has that descriptor; it may
            be called twice for one end. Its errors are logged.
        threaded: False starts no thread and asks no hub: an event loop waits for `fileno()` to become
            readable and calls `collect`.

    Attributes:
        wakeups: how often something came out of the epoll, for tests and statistics.
    """

    def __init__(self, hung_up: Callable[[Any, int], object], *, threaded: bool = True) -> None:
        self.wakeups = 0
        self._hung_up = hung_up
        self._threaded = threaded
        self._entries: dict[int, _Entry] = {}
        self._lock = runtime.Lock()
        self._changing = runtime.Lock()
        self._ep: Any = None
        self._wake = -1  # an eventfd
        self._run: _Run | None = None
        self._listener: Any = None  # on gevent: what makes the hub collect
        self._missed = False  # on gevent: a collection was cut short

    def __repr__(self) -> str:
        run = self._run
        runs = self._listens() or (run is not None and run.thread.is_alive())
        state = "running" if runs else "not running"
        return f"<Watch {state}: {len(self._entries)} watched, {self.wakeups} wake-ups>"

    def add(self, fd: int, token: Any) -> int:
        """Watch `fd` until `remove`; starts the thread if it does not run.

        Args:
            fd: an open socket's descriptor, not watched yet.
            token: given back to `hung_up`. It is kept strongly: hand in a weak reference if it must not
                be kept alive.

        Returns:
            A serial number for `remove`; 0 where nothing can be watched.

        Raises:
            OSError: the descriptor is closed or no socket, or the system's limit is reached; it is
                not watched then.
        """
        if not fork.page[0]:
            fork.noticed()
        ep = self._ep or self._open()
        if ep is None:
            return 0
        if fd == self._wake:  # a number that was closed, and taken by our own
            raise OSError(errno.EBADF, "not a connection's descriptor")
        entry = _Entry(token)
        with self._changing:
            self._enter(ep, fd, entry)
        if self._threaded:
            self._start()
        return entry.serial

    def remove(self, fd: int, serial: int = 0) -> None:
        """Stop watching `fd`. Call it before closing; unknown and closed ones are ignored.

        Args:
            fd: the descriptor.
            serial: what `add` returned: a descriptor that was reused since is then left alone. 0
                removes whatever has that number.
        """
        with self._changing:
            self._take_out(fd, serial)

    def _enter(self, ep: Any, fd: int, entry: _Entry) -> None:
        self._entries[fd] = entry  # before registering: the event may come at once
        try:
            _register(ep, fd)
        except BaseException:
            self._entries.pop(fd, None)
            raise

    def _take_out(self, fd: int, serial: int) -> None:
        entry = self._entries.get(fd)
        if entry is None or (serial and entry.serial != serial):
            return
        self._entries.pop(fd, None)
        ep = self._ep
        # Never on an inherited epoll: it would take away the parent's registration.
        if ep is not None and fork.page[0]:
            _unregister(ep, fd)

    def sweep(self) -> None:
        """Look at every watched descriptor now: one system call each, no waiting."""
        for fd, entry in list(self._entries.items()):
            self._look(fd, entry)

    # -- for event loops ------------------------------------------------------------------------

    def fileno(self) -> int:
        """Give the descriptor to wait on: readable when `collect` has something to do.

        Raises:
            OSError: nothing can be watched on this system.
        """
        ep = self._ep or self._open()
        if ep is None:
            raise OSError("no epoll on this system")
        return int(ep.fileno())

    def collect(self) -> None:
        """Take what is in the epoll, without waiting, and tell `hung_up`."""
        ep = self._ep
        if ep is not None:
            self._dispatch(ep.poll(0))

    # -- start, stop, fork ------------------------------------------------------------------------

    def stop(self, seconds: float = 1.0) -> bool:
        """End the thread; what is registered stays so, and no event is lost.

        Args:
            seconds: how long to wait for its end.

        Returns:
            Whether no thread is left. One that could not end in time ends by itself, unless
            `start` comes first.
        """
        run = self._tell_to_stop()
        if run is None:
            return True
        if run.thread is threading.current_thread():
            return False
        return fork.wait_gone(run.thread, seconds)

    def start(self) -> None:
        """Start the thread again if there is something to watch."""
        if self._entries and self._threaded:
            self._start()

    def close(self) -> None:
        """Stop, close the epoll, forget everything. For tests and for the end of the process."""
        for call in (self.stop, self.start, self.after_fork_in_child):
            fork.forget(call)
        if self.stop(1.0):
            self._drop_all()

    def after_fork_in_child(self) -> None:
        """Forget what was inherited; repeatable. The new epoll is made at the next `add`."""
        self._lock = runtime.Lock()  # another thread may have held the old one
        self._changing = runtime.Lock()
        self._run = None
        self._drop_all()

    def _drop_all(self) -> None:
        self._entries = {}
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        ep, self._ep = self._ep, None
        wake, self._wake = self._wake, -1
        if ep is not None:
            ep.close()  # our copy of the number only: a parent's registrations stay
        if wake >= 0:
            os.close(wake)

    def _open(self) -> Any:
        with self._lock:
            if self._ep is None and available():
                self._make()
            return self._ep

    def _make(self) -> None:
        fork.on_before(self.stop)
        fork.on_after_in_parent(self.start)
        fork.on_after_in_child(self.after_fork_in_child)
        ep = _select("epoll")()
        if self._threaded:
            self._listener = runtime.listen(ep.fileno(), self._collect_in_hub)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        ep.register(self._wake, _EPOLLIN)
        self._ep = ep

    def _listens(self) -> bool:
        return self._listener is not None and bool(self._listener.fit())

    def _start(self) -> None:
        if self._listener is not None:
            self._listen_again()
            return
        run = self._run
        if run is not None and not run.stopping and run.thread.is_alive():
            return
        with self._lock:
            self._start_locked()

    def _listen_again(self) -> None:
        """The hub that listened may have been destroyed: find the one that is there now."""
        with self._lock:
            if not self._listens():
                self._listener = runtime.listen(self._ep.fileno(), self._collect_in_hub)

    def _collect_in_hub(self) -> None:
        """As one lap of the thread: what an interrupt cuts off is swept up right after."""
        try:
            if self._missed:
                self.sweep()
            self._missed = True
            self.collect()
            self._missed = False
        except BaseException:  # noqa: BLE001  a hub prints what it is not spared
            self.sweep()
            _log.exception("the watcher goes on after an error")

    def _start_locked(self) -> None:
        run = self._run
        if run is not None and run.thread.is_alive():
            run.stopping = False  # on its way out: it looks once more, under the lock
            return
        self._run = run = _Run(self)
        try:
            runtime.start_aside(run.thread.start)
        except RuntimeError:  # the interpreter is ending, or no thread is to be had
            _log.warning("the watcher's thread cannot start; trying again at the next connection")

    def _tell_to_stop(self) -> _Run | None:
        with self._lock:
            run = self._run
            if run is None or not run.thread.is_alive():
                return None
            run.stopping = True
            os.eventfd_write(self._wake, 1)
            return run

    def _leave(self, run: _Run) -> bool:
        with self._lock:
            if run.stopping and self._run is run:
                self._run = None
            return run.stopping

    # -- the thread -------------------------------------------------------------------------------

    def _serve(self, run: _Run) -> None:
        # No loop inside a `try`: 3.12 and 3.13 leave gaps there through which an exception escapes.
        while self._lap(run):
            pass

    def _lap(self, run: _Run) -> bool:
        try:
            return self._wait(run)
        except BaseException:  # noqa: BLE001  whatever strikes here, the watch goes on
            run.failures += 1
            _log.exception("the watcher goes on after an error")
            return run.failures < _FAILURES_IN_A_ROW

    def _wait(self, run: _Run) -> bool:
        if run.stopping and self._leave(run):
            return False
        if run.missed:
            self.sweep()
        run.missed = True  # a registration fires once: what is lost from here on must be swept up
        events = self._ep.poll()
        self._dispatch(events)
        run.missed = False
        run.failures = 0
        return True

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        self.wakeups += 1
        for fd, _ in events:
            if fd == self._wake:
                _drain(fd)
            else:
                self._event(fd)

    def _event(self, fd: int) -> None:
        entry = self._entries.get(fd)
        if entry is not None:
            self._look(fd, entry)

    def _look(self, fd: int, entry: _Entry) -> None:
        """Report `entry` if it has ended. The event may be that of an earlier user of the number."""
        if entry.reported or not _ended(fd) or self._entries.get(fd) is not entry:
            return
        try:
            self._hung_up(entry.token, fd)
        except Exception:  # noqa: BLE001  one owner's error must not keep the others from being told
            _log.exception("telling of a connection that hung up failed")
        entry.reported = True


def _register(ep: Any, fd: int) -> None:
    try:
        ep.register(fd, _RDHUP | _EPOLLONESHOT)
    except FileExistsError:  # not removed before, and still open somewhere
        ep.modify(fd, _RDHUP | _EPOLLONESHOT)


def _unregister(ep: Any, fd: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed already, the descriptor or the epoll
        ep.unregister(fd)


def _ended(fd: int) -> bool:
    poll = _select("poll")()
    poll.register(fd, _RDHUP)
    return any(events & _ENDED for _, events in poll.poll(0))


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # another life of the thread was first
        os.eventfd_read(fd)
