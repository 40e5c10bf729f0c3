"""What belongs to an event loop rather than to a pool: its watcher, and its end.

One job: one `Watch` per loop, which the loop itself waits for (no thread), and a hook that is called
when `asyncio.run`, or whoever runs the loop, shuts it down.

It must not know: pools, slots, drivers. A token is whatever its owner gave.

No lock: a loop and all that is here of it belong to one thread. `_watches` is changed by single
operations only, since several threads may run a loop each.
"""

from __future__ import annotations

import asyncio
import contextlib
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, finalize, ref

from penstock._process import watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection

    Loop = asyncio.AbstractEventLoop

#: Seconds for what is cancelled at a loop's end: it has only to hear of it.
CANCELLED_SECONDS: Final = 1.0

# -- who hung up ----------------------------------------------------------------------------------


class LoopWatch:
    """A watcher whose events arrive as callbacks of a loop.

    It does not keep its loop alive, and what it holds of the system goes with it.
    """

    def __init__(self, loop: Loop, hung_up: Callable[[Any, int], object]) -> None:
        self._loop = ref(loop)
        self._thread = get_ident()
        self._watch = watch.Watch(hung_up, threaded=False)
        self._reading = -1
        self._serials: set[int] = set()
        finalize(self, self._watch.close).atexit = False

    def add(self, loop: Loop, fd: int, token: Any) -> int:
        """Watch `fd` until `remove`; gives a serial number, 0 where nothing can be watched."""
        serial = self._watch.add(fd, token)
        if serial:
            self._serials.add(serial)
            if self._reading < 0:
                self._reading = self._watch.fileno()
                loop.add_reader(self._reading, self._watch.collect)
        return serial

    def remove(self, fd: int, serial: int) -> bool:
        """Stop watching; the last one that goes takes the watcher with it."""
        if serial not in self._serials:
            return False
        self._serials.discard(serial)
        self._watch.remove(fd, serial)
        # Elsewhere it is the garbage collector that calls, and a loop is changed by its own thread.
        if not self._serials and get_ident() == self._thread:
            self.close()
        return True

    def close(self) -> None:
        """Leave the loop; works when it is closed."""
        reading, self._reading = self._reading, -1
        loop = self._loop()
        if reading >= 0 and loop is not None and not loop.is_closed():
            loop.remove_reader(reading)
        self._watch.close()


_watches: WeakKeyDictionary[Loop, LoopWatch] = WeakKeyDictionary()


def watch_for(loop: Loop, fd: int, token: Any, hung_up: Callable[[Any, int], object]) -> int:
    """Watch `fd` by the loop's watcher; all pools on a loop share one."""
    found = _watches.get(loop)
    if found is None:
        found = _watches[loop] = LoopWatch(loop, hung_up)
    return found.add(loop, fd, token)


def unwatch(fd: int, serial: int) -> None:
    """Stop watching, whichever loop does."""
    for each in list(_watches.values()):
        if each.remove(fd, serial):
            return


def forget_watches() -> None:
    """In a forked child: the loops are the parent's. Their watchers see to the fork themselves."""
    _watches.clear()


# -- the end of a loop ----------------------------------------------------------------------------


def at_end(tell: Callable[[], Collection[asyncio.Task[Any]]]) -> AsyncGenerator[None, None]:
    """Have `tell` called when the running loop is shut down (`loop.shutdown_asyncgens`).

    It gives the tasks, cancelled, that the loop is to bring to their end before it is closed: those
    that were begun after it had cancelled all tasks.

    An asynchronous generator that has begun is closed then, and nobody sees it among the tasks.
    Whoever calls must keep it; closing it (`aclose`) calls `tell`, too.
    """
    generator = _until_closed(tell)
    # To its yield, by hand: it awaits nothing, so that nothing need be awaited here. The loop's
    # hook hears of it at this first step.
    with contextlib.suppress(StopIteration):
        generator.asend(None).send(None)
    return generator


async def _until_closed(
    tell: Callable[[], Collection[asyncio.Task[Any]]],
) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        cancelled = tell()
        if cancelled:
            await asyncio.wait(cancelled, timeout=CANCELLED_SECONDS)
