"""Wait for a descriptor on the running event loop, with an exact deadline and nothing left behind.

It must not know: any database library, any pool. It works on every loop that has `add_reader`:
asyncio's selector loops, uvloop, and AnyIO on either.
"""

from __future__ import annotations

import asyncio
from math import inf
from os import getpid
from time import monotonic

from penstock._drivers import sockets
from penstock._drivers.sockets import READ, WRITE


async def wait(fd: int, events: int, deadline: float) -> int:
    """Wait until `fd` is readable or writable; errors and hang-ups count as both.

    Args:
        fd: the descriptor. Nobody else may be waiting for it on this loop: a loop knows one reader
            and one writer for each.
        events: READ, WRITE or both.
        deadline: an instant of the monotonic clock; one in the past means a look without waiting.

    Returns:
        What came true, or 0 if the deadline came first.
    """
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[int] = loop.create_future()
    timer = None
    pid = getpid()
    try:
        if events & READ:
            loop.add_reader(fd, _tell, woken, READ)
        if events & WRITE:
            loop.add_writer(fd, _tell, woken, WRITE)
        if deadline != inf:
            timer = loop.call_later(max(0.0, deadline - monotonic()), _tell, woken, 0)
        # A loop that was blocked may come to the timer first: hence the last look.
        return await woken or sockets.wait(fd, events, 0.0)
    finally:
        if timer is not None:
            timer.cancel()
        # In a forked child, where this coroutine is dropped: the loop's epoll is the parent's, too.
        if getpid() == pid:
            _stop_waiting(loop, fd, events)


def is_awaited(fd: int) -> bool:
    """Whether somebody on this loop waits for `fd`. He is not woken by it any more after this."""
    loop = asyncio.get_running_loop()
    read, written = loop.remove_reader(fd), loop.remove_writer(fd)
    return read or written


def _stop_waiting(loop: asyncio.AbstractEventLoop, fd: int, events: int) -> None:
    if events & READ:
        loop.remove_reader(fd)
    if events & WRITE:
        loop.remove_writer(fd)


def _tell(woken: asyncio.Future[int], seen: int) -> None:
    if not woken.done():
        woken.set_result(seen)
