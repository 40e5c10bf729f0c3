"""Wait for a descriptor on the running event loop, with an exact deadline and nothing left behind.

It must not know: any database library, any pool. It works on every loop that has `add_reader`:
asyncio's selector loops, uvloop, and AnyIO on either.

A loop knows one reader and one writer for each number, and numbers are used again: somebody who waited for
a descriptor that was closed under him may still be registered for what is ours now, and will take our
registration away when he notices. So a wait looks by itself, and registers again, every `BEAT`.
"""

from __future__ import annotations

import asyncio
from os import getpid
from time import monotonic
from typing import Final

from penstock._process import sockets
from penstock._process.sockets import READ, WRITE

#: Seconds. How late a wait is at most whose registration somebody else has removed.
BEAT: Final = 0.5


async def wait(fd: int, events: int, deadline: float) -> int:
    """Wait until `fd` is readable or writable; errors and hang-ups count as both.

    Args:
        fd: the descriptor. Nobody else may be waiting for it on this loop.
        events: READ, WRITE or both.
        deadline: an instant of the monotonic clock; one in the past means a look without waiting.

    Returns:
        What came true, or 0 if the deadline came first.
    """
    while True:
        left = deadline - monotonic()
        # A loop that was blocked may come to the timer first: hence the look.
        seen = await _one_beat(fd, events, min(left, BEAT)) or sockets.wait(fd, events, 0.0)
        if seen or left <= BEAT:
            return seen


async def _one_beat(fd: int, events: int, seconds: float) -> int:
    if seconds <= 0:
        return 0
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[int] = loop.create_future()
    pid = getpid()
    timer = loop.call_later(seconds, _tell, woken, 0)
    try:
        _forget(loop, fd)  # whose it was before
        if events & READ:
            loop.add_reader(fd, _tell, woken, READ)
        if events & WRITE:
            loop.add_writer(fd, _tell, woken, WRITE)
        return await woken
    finally:
        timer.cancel()
        # In a forked child, where this coroutine is dropped: the loop's epoll is the parent's, too.
        if getpid() == pid:
            _forget(loop, fd)


def stop_awaiting(fd: int) -> None:
    """Have nobody wait for `fd` any more on the running loop, if one runs: it is about to be closed."""
    try:
        _forget(asyncio.get_running_loop(), fd)
    except (RuntimeError, NotImplementedError):  # none runs, or it knows no descriptors
        return


def _forget(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    for remove in (loop.remove_reader, loop.remove_writer):
        try:
            remove(fd)
        except OSError:  # asyncio took it for a socket that is closed; it has forgotten that now
            continue


def _tell(woken: asyncio.Future[int], seen: int) -> None:
    if not woken.done():
        woken.set_result(seen)
