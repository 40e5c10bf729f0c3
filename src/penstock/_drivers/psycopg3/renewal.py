"""Another psycopg connection object over the same libpq handle, and the old one dead for good.

It must not know: links, pools, deadlines. No lock: the connection is nobody's at that moment.
Private names of psycopg that it relies on are each held by tests/drivers/test_third_party_assumptions.py.
"""

# ruff: noqa: SLF001  psycopg's own two callbacks

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import psycopg

from penstock._drivers.psycopg3.guard import DEAD, WatchedAdapters, forget_notes
from penstock._drivers.renewal import followed, successor

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

C = TypeVar("C", bound=psycopg.BaseConnection[Any])


def renewed(old: C, handle: PGconn) -> C:
    """A connection like `old`, over the same handle; `old` is left with nothing that is shared.

    Everything is carried over: attributes of the user's class, adapters, row factory, handlers, the
    cache of prepared statements. Both are parked: the new one is to be lent next.
    """
    new: C = successor(old)
    _rewire(new, old, handle)
    _bereave(old)
    return new


def _rewire(
    new: psycopg.BaseConnection[Any], old: psycopg.BaseConnection[Any], handle: PGconn
) -> None:
    """Have what refers to the connection refer to the new object."""
    attributes = vars(new)
    if (adapters := attributes["_adapters"]) is not None:
        # A copy: whoever holds the old one's map must not register for the new one.
        attributes["_adapters"] = WatchedAdapters(adapters, new)
    for name in ("_notice_handlers", "_notify_handlers"):
        attributes[name] = [followed(each, old, new) for each in attributes[name]]
    me = ref(new)
    handle.notice_handler = partial(psycopg.BaseConnection._notice_handler, me)
    handle.notify_handler = partial(psycopg.BaseConnection._notify_handler, me)


def _bereave(old: psycopg.BaseConnection[Any]) -> None:
    """What the old object would share: lists that it could change, the set that notes changes."""
    forget_notes(old)
    vars(old).update(
        pgconn=DEAD,
        _notice_handlers=[],
        _notify_handlers=[],
        _notifies_backlog=deque(),
        _prepared=type(old._prepared)(),
    )
