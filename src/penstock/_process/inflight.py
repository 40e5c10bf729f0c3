"""Connects under way: what a forked child lets go of, before any link is there that could.

A child inherits the sockets of connects that other threads or tasks have begun. Nobody uses them there,
but as long as they are open the server does not see the parent's end, and keeps its session. So who
connects says which descriptor it is, where it knows (`note`). Where the library tells only when it is
done (psycopg2, asyncpg), it says where it connects to (`searching`), and the child looks for sockets that
have come up since then and lead there.

It must not know: any database library, links, pools. What it keeps are descriptors with the numbers of
their sockets, so that an old note is harmless: a descriptor that was closed and is something else by
now has another number, and one that a pool has let go of, too (pools come first).

No lock: dicts changed by single atomic operations, since a fork may come between any two.
"""

from __future__ import annotations

import os
import stat

# The C class, never gevent's: see sockets.py.
from _socket import socket as RawSocket  # noqa: N812
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from penstock._process import fork
from penstock._process.sockets import point_at_null

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

#: Where Linux lists a process's descriptors. Elsewhere only what was noted is let go of.
_LISTED: Final = "/proc/self/fd"

_noted: dict[int, int] = {}  # descriptor -> number of its socket
_searching: dict[object, tuple[frozenset[int], frozenset[str]]] = {}


def note(fd: int) -> None:
    """Remember the socket of a connect that has begun, until it is closed."""
    with suppress(OSError):
        _noted[fd] = os.fstat(fd).st_ino


@contextmanager
def searching(ports: Collection[str]) -> Iterator[None]:
    """While a library connects to one of these ports and does not tell its descriptor.

    Args:
        ports: of all addresses that are tried; also those of Unix sockets.
    """
    if not hasattr(os, "fork") or not os.path.isdir(_LISTED):  # noqa: PTH112  two calls less
        yield
        return
    mark = object()
    _searching[mark] = (frozenset(_sockets().values()), frozenset(ports))
    try:
        yield
    finally:
        _searching.pop(mark, None)


def let_go() -> None:
    """In a forked child, when the pools have let go of their links: of the rest."""
    for fd, number in list(_noted.items()):
        with suppress(OSError):
            if os.fstat(fd).st_ino == number:
                point_at_null(fd)
    for before, ports in list(_searching.values()):
        for fd, number in _sockets().items():
            if number not in before and _port_of_peer(fd) in ports:
                point_at_null(fd)
    _noted.clear()
    _searching.clear()


def _sockets() -> dict[int, int]:
    """The process's sockets: their descriptors and their numbers."""
    found = {}
    for name in os.listdir(_LISTED):  # noqa: PTH208  numbers are wanted, and quickly
        with suppress(OSError):  # that of the listing itself
            about = os.fstat(int(name))
            if stat.S_ISSOCK(about.st_mode):
                found[int(name)] = about.st_ino
    return found


def _port_of_peer(fd: int) -> str:
    """The port that a socket leads to, of an address or of PostgreSQL's Unix sockets; else ""."""
    try:
        raw = RawSocket(fileno=os.dup(fd))
    except OSError:
        return ""
    try:
        peer = raw.getpeername()
    except OSError:  # not connected
        return ""
    finally:
        raw.close()
    if isinstance(peer, tuple):
        return str(peer[1])
    path = os.fsdecode(peer)
    return path.rpartition(".s.PGSQL.")[2] if ".s.PGSQL." in path else ""


fork.on_after_pools_in_child(let_go)
