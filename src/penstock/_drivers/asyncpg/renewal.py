"""Another asyncpg connection object over the same protocol, and the old one dead for good.

It must not know: links, pools. No lock: everything happens on the connection's event loop.
Private names of asyncpg that it relies on are each held by tests/drivers/test_asyncpg_assumptions.py.
"""

# asyncpg is annotated, but not as a typed package: what is read off its code is not its promise.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from functools import partial
from typing import Any, Final
from weakref import ref

from penstock._drivers.asyncpg.guard import DEAD, Watch, siblings
from penstock._drivers.renewal import successor

# What an object changes of its own accord when it is closed, dropped or used: not to be shared.
_SETS: Final = ("_log_listeners", "_termination_listeners", "_query_loggers", "_cancellations")


class _StillThere:
    """Stands for the protocol where the old object asks whether its session goes on: not its affair.

    "Connected", so that `close()`, `terminate()` and the finalizer of the old object do nothing.
    """

    __slots__ = ()

    def is_connected(self) -> bool:
        return True

    def _is_cancelling(self) -> bool:
        return False


def renewed(old: Any, protocol: Any) -> Any:
    """A connection like `old`, over the same protocol; `old` is left with nothing that it could harm.

    Everything is carried over: attributes of the user's class, listeners, codecs, the cache of
    statements. Both are parked: the new one is to be lent next. Shared stays the list of statements
    to close, where statements that die with the old object's holder belong.
    """
    new = successor(old)
    new._penstock = old._penstock  # not always in a slot
    protocol.set_connection(new)
    cache = new._stmt_cache
    cache._on_remove = partial(cache._on_remove.func, ref(new))
    family = siblings(old)
    family.discard(old)
    family.add(new)
    _bereave(old)
    return new


def _bereave(old: Any) -> None:
    old._protocol = DEAD
    old._penstock = Watch(_StillThere())
    old._listeners = {}
    for name in _SETS:
        setattr(old, name, set())
