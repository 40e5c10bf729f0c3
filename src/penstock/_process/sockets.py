"""What is done to a descriptor behind a driver's back: wait, shut down, point at the null device.

It must not know: any database library, any pool. A descriptor number is all it gets, so whoever
calls must be sure that the number still belongs to the connection that is meant (numbers are
reused).
"""

from __future__ import annotations

import errno
import os
import select

# The C class, never `socket.socket`: gevent replaces that one by a class that switches the
# descriptor to its own hub, and the thread that gives up on a connection may have none.
from _socket import SHUT_RDWR
from _socket import socket as RawSocket  # noqa: N812  # the same name would hide the difference
from math import ceil, inf
from time import monotonic

READ = 1
WRITE = 2

_POLL_IN = 0x001  # POLLIN and POLLOUT have these values on Linux, macOS and the BSDs
_POLL_OUT = 0x004


def deadline_in(seconds: float | None) -> float:
    """The instant by the monotonic clock that is `seconds` away; for None, never."""
    return inf if seconds is None else monotonic() + seconds


def seconds_to(deadline: float) -> float | None:
    """How much time is left, not below 0; None if there is no limit."""
    return None if deadline == inf else max(0.0, deadline - monotonic())


def wait(fd: int, events: int, deadline: float) -> int:
    """Wait until `fd` is readable or writable; errors and hang-ups count as both.

    Args:
        fd: the descriptor.
        events: READ, WRITE or both.
        deadline: an instant of the monotonic clock; one in the past means a look without waiting.

    Returns:
        What came true, or 0 if the deadline came first.

    Raises:
        OSError: the process was forked meanwhile, and this is the child, where gevent runs the
            greenlets of the parent on: the socket is the parent's, and is let go of.
    """
    process = os.getpid()
    seen = _wait(fd, events, deadline)
    if os.getpid() != process:
        point_at_null(fd)
        raise OSError(errno.EBADF, "the connection is the parent process's")
    return seen


def _wait(fd: int, events: int, deadline: float) -> int:
    # Looked up per call: gevent replaces `select.poll` and `select.select` when it patches.
    if not hasattr(select, "poll"):  # Windows
        return _wait_by_select(fd, events, deadline)
    poller = select.poll()
    poller.register(fd, (events & READ and _POLL_IN) | (events & WRITE and _POLL_OUT))
    left = seconds_to(deadline)
    # Rounded up: rounded down, the last millisecond would be a busy loop.
    for _, seen in poller.poll(None if left is None else ceil(left * 1000)):
        return _translated(seen, events)
    return 0


def _translated(seen: int, events: int) -> int:
    if seen & ~(_POLL_IN | _POLL_OUT):  # POLLERR, POLLHUP, POLLNVAL: let the library find out
        return events
    return (seen & _POLL_IN and READ) | (seen & _POLL_OUT and WRITE)


def _wait_by_select(fd: int, events: int, deadline: float) -> int:
    wanted_in = [fd] if events & READ else []
    wanted_out = [fd] if events & WRITE else []
    # Windows reports a refused connection in the third list only.
    can_in, can_out, bad = select.select(wanted_in, wanted_out, [fd], seconds_to(deadline))
    if bad:
        return events
    return (READ if can_in else 0) | (WRITE if can_out else 0)


def shut_down(duplicate: int) -> None:
    """End both directions of a socket, given a duplicate of its descriptor, which is closed here.

    Whoever is blocked in it, in whatever thread, wakes up with an error. Never in a forked child:
    this acts on the socket, which the parent shares, and not on the descriptor.
    """
    try:
        raw = RawSocket(fileno=duplicate)
    except OSError:  # no socket (any more)
        os.close(duplicate)
        return
    try:
        raw.shutdown(SHUT_RDWR)
    except OSError:  # ENOTCONN: the peer was quicker
        pass
    finally:
        raw.close()


def shut_down_without_duplicate(fd: int) -> None:
    """The same to a socket that goes on belonging to whoever has it: for a process without a free descriptor.

    Whoever closes it in the same moment, and opens another, would have that one shut down: prefer `shut_down`.
    """
    try:
        raw = RawSocket(fileno=fd)
    except OSError:  # no socket (any more)
        return
    try:
        raw.shutdown(SHUT_RDWR)
    except OSError:  # ENOTCONN: the peer was quicker
        pass
    finally:
        raw.detach()


def point_at_null(fd: int) -> None:
    """Replace what `fd` refers to by the null device: nothing written to it reaches a peer.

    This undoes the inheritance of a socket by a forked child: the parent's socket is untouched,
    and a library that says goodbye on `fd` meets ENOTSOCK (DESIGN section 7).
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, fd, inheritable=False)
    finally:
        os.close(null)
