"""Ending a session of an event loop's from wherever it is noticed: on the loop, elsewhere, after it.

It must not know: links, settings, pools. No lock: whoever calls is the only one who ends this session.
"""

# asyncpg is annotated, but not as a typed package: what is read off its code is not its promise.
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import os
from gc import get_referents
from typing import Any

from penstock._process.sockets import shut_down


def is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this very code runs on that loop."""
    return asyncio._get_running_loop() is loop


def look_at(outcome: asyncio.Future[Any]) -> None:
    """Take notice of an error that nobody may be left to hear: else the loop would complain."""
    if not outcome.cancelled():
        outcome.exception()


def drop(protocol: Any, transport: Any, loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """End a session; repeatable.

    Args:
        protocol: asyncpg's.
        transport: the event loop's, or that of its TLS.
        loop: where they belong.
        fd: the socket's descriptor as it was when the session began.
    """
    if is_running(loop):
        # Whoever awaited an answer may be gone without a word (a coroutine that was closed).
        for each in get_referents(protocol):
            if isinstance(each, asyncio.Future) and not each.done():
                each.add_done_callback(look_at)
        protocol.abort()
        transport.abort()
        return
    sock: Any = getattr(transport.get_extra_info("socket"), "_sock", None)
    if sock is None:  # uvloop shows none, and closes all of them when it is closed itself
        is_open = not loop.is_closed() and not transport.is_closing()
    else:
        is_open = sock.fileno() == fd
    if not is_open:  # the number may be somebody else's
        return
    try:
        shut_down(os.dup(fd))
    except OSError:  # closed already
        return
    # Never the transport: it belongs to the loop's thread, which finds the end by itself.
    if loop.is_closed():
        sock.close()
        _forget(transport)


def _forget(transport: Any) -> None:
    """Keep a transport whose loop is gone from warning that nobody closed it."""
    inner: Any = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    if inner is not None:
        transport._closed = True
    for each in (transport, inner):
        if getattr(each, "_sock", None) is not None:
            each._sock = None
