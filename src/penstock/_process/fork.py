"""Notices forks, and tells whoever asked before, after in the parent, and after in the child.

Two triggers for the child's side, because uWSGI without ``--py-call-osafterfork`` runs no at-fork
hooks: `os.register_at_fork`, and `page`, one private page of memory that the kernel wipes in every
child. A borrower reads ``page[0]`` (14 ns against 147 ns for getpid) and calls `noticed()` on 0.

The child's side runs once per fork: process-wide parts first (`on_after_in_child`: keeper, watcher),
then each registered pool, then what is to come after them (`on_after_pools_in_child`). Only when all
have run is the page armed: a child that is interrupted in the middle does all of it again, so every
handler must be repeatable.

It must not know: what a pool, a keeper or a watcher is. It calls what it was given.

No lock is taken before or in a fork that another thread could hold: registries are plain dicts and
lists changed by single atomic operations. The one lock, which keeps two threads from running the
child's side together, is made per process and is taken in the child only.
"""

from __future__ import annotations

import functools
import itertools
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

from penstock._process import runtime
from penstock._process.lock import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

# How long a fork may wait for threads to be parked, in all: unnoticed beside a fork of a loaded
# application (about 1 ms and more), and plenty for a thread that only has to leave a poll (0.1 ms).
PARK_SECONDS = 0.05

# MADV_WIPEONFORK, Linux 4.14: <asm-generic/mman-common.h>; the mmap module does not name it.
_MADV_WIPEONFORK = 18

_log = logging.getLogger("penstock")


class Forkable(Protocol):
    """What a registered pool offers. Every method must be repeatable."""

    def before_fork(self) -> object:
        """Run in the parent just before; never waits for a lock without a bound."""

    def after_fork_in_parent(self) -> object:
        """Run in the parent just after, also where the fork failed."""

    def after_fork_in_child(self) -> object:
        """Let go of everything inherited; start nothing."""


class Page(Protocol):
    """Memory that tells a child from its parent: ``page[0]`` is 0 in a child that did not notice yet."""

    def __getitem__(self, index: int, /) -> int:
        """Not 0: the same process as the one that armed it."""
        ...

    def __setitem__(self, index: int, value: int, /) -> None:
        """Arm with 1, disarm with 0."""


class PidPage:
    """The page where the kernel cannot wipe one: compares the process's number instead."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, index: int, /) -> int:
        return os.getpid() == self._pid

    def __setitem__(self, index: int, value: int, /) -> None:
        self._pid = os.getpid() if value else 0


def _new_page() -> Page:
    if sys.platform != "linux":
        return PidPage()  # 18 means other things elsewhere
    try:
        # Python's default is MAP_SHARED, and then madvise answers EINVAL
        memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError, ValueError):  # before 4.14, or a C library without madvise
        return PidPage()
    return memory


page: Page = _new_page()
page[0] = 1

# -- who is told ----------------------------------------------------------------------------------

_serials = itertools.count()
# Not a WeakSet: its Python-level guards can be in the middle of a change at the fork. Keys are never
# used twice (an id is), so that removing a dead entry can never hit a new one.
_pools: dict[int, weakref.ref[Forkable]] = {}

_before: list[Callable[[float], object]] = []
_in_parent: list[Callable[[], object]] = []
_in_child: list[Callable[[], object]] = []
_in_child_at_last: list[Callable[[], object]] = []

_not_hooked = [True]  # popping is atomic: whoever gets the element registers the hooks


def register(pool: Forkable) -> None:
    """Tell `pool` about forks from now on, as long as it lives; installs the hooks at first use.

    Call it before the pool opens anything. Registering twice is harmless.

    Args:
        pool: kept by a weak reference only.
    """
    if not page[0]:
        noticed()  # else a later notice would take the new pool for an inherited one
    install()
    if any(ref() is pool for ref in list(_pools.values())):
        return
    key = next(_serials)
    # `pop(key, ref)`, all in C: nothing that an interrupt could cut in two
    _pools[key] = weakref.ref(pool, functools.partial(_pools.pop, key))


def unregister(pool: Forkable) -> None:
    """Stop telling `pool` about forks; unknown pools are ignored."""
    for key, ref in list(_pools.items()):
        if ref() is pool:
            _pools.pop(key, None)


def registered() -> list[Forkable]:
    """Give what is registered and alive: every pool of this process that was not dropped."""
    # list() of a dict's values is one C call; nothing can change the dict within it
    return [pool for ref in list(_pools.values()) if (pool := ref()) is not None]


def install() -> None:
    """Register the at-fork hooks, once; does nothing where there is no fork."""
    if not hasattr(os, "register_at_fork"):
        return
    try:
        token = _not_hooked.pop()
    except IndexError:
        return
    try:
        os.register_at_fork(
            before=_run_before,
            after_in_parent=_run_in_parent,
            after_in_child=_run_in_child,
        )
    except BaseException:
        _not_hooked.append(token)  # registered twice is harmless, never is not
        raise


def on_before(park: Callable[[float], object]) -> None:
    """Call `park` before each fork, in the order given, ahead of the pools.

    Args:
        park: is given the seconds left of the 0.05 s that all share; returns within them. Kept
            strongly; given twice it is called once.
    """
    install()
    if park not in _before:
        _before.append(park)


def on_after_in_parent(call: Callable[[], object]) -> None:
    """Call `call` in the parent after each fork, in the order given, after the pools.

    Args:
        call: undoes what its `on_before` did; also called where the fork failed. Kept strongly;
            given twice it is called once.
    """
    install()
    if call not in _in_parent:
        _in_parent.append(call)


def on_after_in_child(call: Callable[[], object]) -> None:
    """Call `call` in each child, in the order given, ahead of the pools.

    Args:
        call: lets go of what was inherited; must be repeatable and start no thread. Kept
            strongly; given twice it is called once per fork.
    """
    install()
    if call not in _in_child:
        _in_child.append(call)


def on_after_pools_in_child(call: Callable[[], object]) -> None:
    """Call `call` in each child, in the order given, when the pools have let go of what is theirs.

    Args:
        call: as of `on_after_in_child`.
    """
    install()
    if call not in _in_child_at_last:
        _in_child_at_last.append(call)


def forget(call: Callable[..., object]) -> None:
    """Take `call` out of all lists; unknown ones are ignored."""
    for calls in (_before, _in_parent, _in_child, _in_child_at_last):
        if call in calls:
            calls.remove(call)


# -- the hooks --------------------------------------------------------------------------------------


def _run_before() -> None:
    deadline = time.monotonic() + PARK_SECONDS
    for park in tuple(_before):
        left = max(0.0, deadline - time.monotonic())
        _report(_try(functools.partial(park, left)))
    for pool in registered():
        _report(_try(pool.before_fork))


def _run_in_parent() -> None:
    for pool in registered():
        _report(_try(pool.after_fork_in_parent))
    for call in tuple(_in_parent):
        _report(_try(call))


def _run_in_child() -> None:
    page[0] = 0  # the hook knows what it is in, whatever the page says
    # logging has put its own locks right: its hook was registered before ours
    for failure in _child_side_once():
        _report(failure)


def noticed() -> None:
    """Run the child's side; for a borrower that reads ``page[0] == 0``.

    Returns when it has run, whichever thread ran it, with the page armed. Called again by a handler
    it returns at once. Errors of handlers are logged, `BaseException`s that are no `Exception` go
    up: the page then stays as it is, and the next borrower begins again.
    """
    failures = _child_side_once()
    if failures:
        # There was no hook, so a lock of logging's may be held for ever by a thread that is not
        # here: only this thread would hang on it.
        reports = threading.Thread(
            target=_report_all, args=(failures,), name="penstock-fork-report", daemon=True
        )
        runtime.start_aside(reports.start)


class _Turn:
    """One process's right to run the child's side; another process never sees its lock taken."""

    __slots__ = ("lock", "runner")

    def __init__(self) -> None:
        self.lock = Lock()
        self.runner = 0  # ident of the thread that runs it


# By pid: at a fork another thread may hold the parent's, and then it is held for ever in the child.
_turns: dict[int, _Turn] = {}


def _child_side_once() -> list[BaseException]:
    pid = os.getpid()
    turn = _turns.setdefault(pid, _Turn())  # atomic: all threads get the same one
    if turn.runner == threading.get_ident():
        return []  # a handler asked
    with turn.lock:
        return _child_side(pid, turn)


def _child_side(pid: int, turn: _Turn) -> list[BaseException]:
    if page[0]:
        return []  # another thread was first
    turn.runner = threading.get_ident()
    try:
        failures = _tell_child()
    finally:
        turn.runner = 0
    for old in [key for key in list(_turns) if key != pid]:
        _turns.pop(old, None)
    page[0] = 1
    return failures


def _tell_child() -> list[BaseException]:
    failures = [_try(call) for call in tuple(_in_child)]
    failures += [_try(pool.after_fork_in_child) for pool in registered()]
    failures += [_try(call) for call in tuple(_in_child_at_last)]
    return [failure for failure in failures if failure is not None]


def _try(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001  one handler's error must not stop the others
        return error
    return None


def _report(failure: BaseException | None) -> None:
    if failure is not None:
        _log.error("a handler failed at a fork; the others ran", exc_info=failure)


def _report_all(failures: list[BaseException]) -> None:
    for failure in failures:
        _report(failure)


# -- waiting for a thread to be gone ----------------------------------------------------------------


def wait_gone(thread: threading.Thread, seconds: float) -> bool:
    """Wait until `thread` has ended, for the operating system too.

    CPython counts the system's threads when it warns of a fork with several (3.12 and later), and
    before 3.13 ``join`` returns a moment before the thread is gone there.

    Args:
        thread: a started thread that was told to end; not the calling one.
        seconds: how long to wait at most.

    Returns:
        Whether it is gone. Never raises for a thread that has ended already.
    """
    deadline = time.monotonic() + seconds
    thread.join(max(0.0, seconds))
    if thread.is_alive():
        return False
    if sys.platform == "linux" and sys.version_info < (3, 13) and thread.native_id:
        return _task_gone(f"/proc/self/task/{thread.native_id}", deadline)
    return True


def _task_gone(path: str, deadline: float) -> bool:
    while os.path.exists(path):  # noqa: PTH110  Path imports and allocates more, just before a fork
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0001)  # it is past all Python code: tens of microseconds
    return True


def notice_fork() -> None:
    """In a child that ran no at-fork hook: let go of what was inherited, before touching it."""
    if not page[0]:
        noticed()
