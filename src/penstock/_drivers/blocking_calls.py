"""Calls that block, made for an event loop in daemon threads of our own.

The loop's default executor will not do: `asyncio.run` waits for it at its end, and a name server that
is gone holds a look-up for seconds. A daemon thread keeps nothing from ending. There are at most
`LIMIT` of them per process; what comes on top waits for its turn, within its deadline.

It must not know: what is called. One lock protects the queue, the calls and the count; it is never
held while something is called. A thread ends when there is nothing left to call.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

from penstock._process import runtime
from penstock._process.lock import Lock

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")

#: Each can be held up by a resolver for as long as that likes.
LIMIT: Final = 8

#: Seconds after which a call is no longer joined: a resolver that hangs once would stop everybody who
#: asks for that name, until it returns. glibc gives a name server that is gone 5 s.
JOINED_WITHIN: Final = 5.0


class _Outcome:
    """What a call returned or raised."""

    __slots__ = ("error", "value")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        try:
            self.value = function()
        except BaseException as error:  # noqa: BLE001  it is the waiter's
            self.error = error


class _Call:
    """One call, and the futures of those who wait for its outcome."""

    __slots__ = ("began", "function", "key", "waiters")

    def __init__(self, key: Hashable, function: Callable[[], Any]) -> None:
        self.key = key
        self.function = function
        self.began = inf  # when a thread took it
        self.waiters: list[asyncio.Future[_Outcome | None]] = []


class SideThreads:
    """At most `limit` daemon threads, started when there is something to call."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = Lock()
        self._calls: dict[Hashable, _Call] = {}  # those that may be joined, queued or under way
        self._queue: deque[_Call] = deque()
        self._threads = 0

    async def call(self, key: Hashable, function: Callable[[], T], deadline: float) -> T:
        """Have `function` called in a thread and wait for what it returns or raises.

        Calls with an equal key share one, unless it has been under way for `JOINED_WITHIN` seconds.
        Cancelled or too late, the waiting ends at once; a call that has begun goes on by itself, one
        that has not is dropped.

        Raises:
            TimeoutError: not in time.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[_Outcome | None] = loop.create_future()
        timer = call = None
        try:
            call, wanted = self._enter(key, function, waiter)
            if wanted:
                self._start()
            if deadline != inf:
                left = max(0.0, deadline - monotonic())
                timer = loop.call_later(left, _settle, waiter, None)
            outcome = await waiter
        finally:
            if timer is not None:
                timer.cancel()
            if call is not None:
                self._leave(call, waiter)
        if outcome is None:
            raise TimeoutError
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[no-any-return]

    def _enter(
        self, key: Hashable, function: Callable[[], Any], waiter: asyncio.Future[_Outcome | None]
    ) -> tuple[_Call, bool]:
        """Join the call or queue it; whether one more thread is to be started."""
        with self._lock:
            call = self._calls.get(key)
            if call is None or monotonic() - call.began > JOINED_WITHIN:
                call = self._calls[key] = _Call(key, function)
                self._queue.append(call)
            call.waiters.append(waiter)
            wanted = bool(self._queue) and self._threads < self._limit
            self._threads += wanted
        return call, wanted

    def _start(self) -> None:
        try:
            thread = threading.Thread(target=self._work, name="penstock-aside", daemon=True)
            runtime.start_aside(thread.start)
        except BaseException:  # there is no thread to be had; the queue keeps nothing of us
            with self._lock:
                self._threads -= 1
            raise

    def _leave(self, call: _Call, waiter: asyncio.Future[_Outcome | None]) -> None:
        with self._lock:
            if waiter in call.waiters:
                call.waiters.remove(waiter)

    def _work(self) -> None:
        while (call := self._next()) is not None:
            self._finish(call, _Outcome(call.function))

    def _next(self) -> _Call | None:
        with self._lock:
            while self._queue:
                call = self._queue.popleft()
                if call.waiters:
                    call.began = monotonic()
                    return call
                del self._calls[call.key]
            self._threads -= 1
            return None

    def _finish(self, call: _Call, outcome: _Outcome) -> None:
        with self._lock:
            if self._calls.get(call.key) is call:  # else a later one has its place
                del self._calls[call.key]
            waiters, call.waiters = call.waiters, []
        for waiter in waiters:
            try:
                waiter.get_loop().call_soon_threadsafe(_settle, waiter, outcome)
            except RuntimeError:  # that loop is closed
                continue


def _settle(waiter: asyncio.Future[_Outcome | None], outcome: _Outcome | None) -> None:
    if not waiter.done():
        waiter.set_result(outcome)


class _OfThisProcess:
    """The process's own threads: a forked child inherits none, and perhaps a lock that is held."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._threads = SideThreads()

    def get(self) -> SideThreads:
        if self._pid != os.getpid():
            self._threads = SideThreads()
            self._pid = os.getpid()
        return self._threads


_process: Final = _OfThisProcess()


async def call_aside(key: Hashable, function: Callable[[], T], deadline: float) -> T:
    """`SideThreads.call` of this process's threads; the key None shares with nobody."""
    return await _process.get().call(object() if key is None else key, function, deadline)
