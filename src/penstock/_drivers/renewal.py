"""Another object over the same session: what `guard=True` lends instead of one that somebody still has.

One job: move the state of a connection object, whatever its class keeps it in, into a new one of the
same class, and tell whether anybody but the link holds the old one.

It must not know: drivers (what refers to the old object by a name of the driver's, the driver mends),
pools. No lock: the connection is nobody's at that moment.
"""

from __future__ import annotations

from sys import getrefcount
from types import MethodType
from typing import Any, Final


class _Link:
    """What a link is to its connection: two references, from attributes."""

    __slots__ = ("conn", "real")


def _references_of_one() -> int:
    link = _Link()
    link.conn = link.real = object()  # type: ignore[attr-defined]  # slots
    return getrefcount(link.conn)  # type: ignore[attr-defined]


#: What `getrefcount(link.conn)` says when the link has the only references. Counted and not written
#: down: it is another number where arguments are borrowed (CPython 3.14).
ALONE: Final = _references_of_one()


def is_held(link: Any) -> bool:
    """Whether anybody but the link has the proxy that it lends, or the connection in the proxy."""
    # The link has the proxy once, and the connection twice: itself, and by the proxy.
    return bool(getrefcount(link.conn) >= ALONE or getrefcount(link.real) > ALONE)


def followed(value: Any, old: Any, new: Any) -> Any:
    """What to keep of a program's callable: a method of the old object becomes the new one's."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    return value


def successor(old: Any) -> Any:
    """A new object of the same class with everything that the old one has, slots included.

    No method of the class is called: a user's ``__init__`` would connect, or count.
    """
    kind = type(old)
    new = object.__new__(kind)
    state = object.__getstate__(old)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        vars(new).update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(new, name, value)
    return new
