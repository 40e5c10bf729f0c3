"""Which of the server's errors say that a session, or its driver, remembers an older schema.

A migration changes tables and types under connections that stay open. What a driver has prepared then
fails on each of them, again and again, until it is forgotten or the session ends. A code alone does not
tell; the server's function does, and `elog` texts, which PostgreSQL never translates.

It must not know: any database library, links, pools. Pure functions, no lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from penstock.drivers import Outdated

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The codes that `outdated_by` takes an interest in.
CODES: Final = frozenset(("0A000", "26000", "42704", "XX000"))

#: All of them, to be compared with what was noted: a walk through the class itself takes 1.5 us.
MARKS: Final = frozenset(Outdated)

#: Worst first.
_ORDER: Final = (Outdated.TYPES, Outdated.SESSION, Outdated.STATEMENTS)


def outdated_by(
    sqlstate: str | None, function: str | None, text: str | None, names: str
) -> Outdated | None:
    """What this error says to be outdated; None: nothing.

    Args:
        sqlstate: its code.
        function: the server's function that raised it.
        text: its primary message.
        names: what the names of the driver's own prepared statements begin with. A name stands in the
            message in every language; what the user prepared by SQL has other names, and is the user's.
    """
    if sqlstate not in CODES:
        return None
    text = text or ""
    if (sqlstate, function) == ("0A000", "RevalidateCachedQuery"):
        return Outdated.STATEMENTS  # "cached plan must not change result type"
    if sqlstate == "26000" and names in text:
        return Outdated.STATEMENTS  # "prepared statement ... does not exist"
    if (sqlstate, function) == ("42704", "lookup_type_cache"):
        return Outdated.TYPES  # "type with OID ... does not exist"
    if sqlstate == "XX000" and text.startswith("cache lookup failed for type"):
        return Outdated.TYPES
    if sqlstate == "XX000" and text.startswith("could not open relation with OID"):
        return Outdated.SESSION
    return None


def worst_of(found: Iterable[object]) -> Outdated | None:
    """The one that asks for most."""
    seen = set(found)
    return next((each for each in _ORDER if each in seen), None)


def take_from(touched: set[str]) -> Outdated | None:
    """What was noted among the changes of a connection; it is not noted any more."""
    if touched.isdisjoint(MARKS):
        return None
    found = worst_of(touched)
    touched.difference_update(MARKS)
    return found
