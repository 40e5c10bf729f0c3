"""What psycopg prepared is forgotten as soon as the server says that it is outdated.

psycopg forgets its prepared statements at a rollback. In autocommit there is none, and one that fails is
executed by its name on and on. All errors of a connection's statements pass through `conn.wait()`, also
those that the program swallows, so that is where they are seen.

Only psycopg's own memory is emptied here: the server's statements go when the pool asks for it
(`PgconnLink.forget`). psycopg's `clear()` would send DEALLOCATE ALL behind the next statement, and take what
that one prepares with it.

It must not know: links, pools. No lock: who executes owns the connection.
Private names of psycopg that it relies on are each held by tests/drivers/test_third_party_assumptions.py.
"""

# ruff: noqa: SLF001  psycopg's own PrepareManager

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg.adapt import Transformer

from penstock._drivers.outdated import CODES, outdated_by
from penstock._drivers.psycopg3.guard import noted_of
from penstock.drivers import Outdated

if TYPE_CHECKING:
    from psycopg.abc import PQGen

RV = TypeVar("RV")

#: Where a connection keeps the keys of statements that psycopg has forgotten and the server has not.
FORGOTTEN: Final = "_penstock_forgotten"

#: What the names of psycopg's prepared statements begin with.
_NAMES: Final = "_pg3_"


def outdated(error: BaseException) -> Outdated | None:
    """What an error of psycopg's says to be outdated."""
    if not isinstance(error, psycopg.Error) or error.sqlstate not in CODES:
        return None
    said = error.diag
    return outdated_by(error.sqlstate, said.source_function, said.message_primary, _NAMES)


def note(conn: psycopg.BaseConnection[Any], error: psycopg.Error) -> None:
    """If this error says that what psycopg prepared is outdated: forget it, and note that."""
    found = outdated(error)
    if found is None:
        return
    noted_of(conn).add(found)
    prepared = conn._prepared
    vars(conn)[FORGOTTEN] = vars(conn).get(FORGOTTEN, frozenset()) | prepared._names.keys()
    prepared._names.clear()
    prepared._counts.clear()


def failed_at_bind(conn: Any, error: psycopg.Error, query: Any, params: Any) -> bool:
    """Whether a statement failed before anything of it was executed, since it was prepared before.

    A prepared statement is a single one, and is looked at when its values are bound. Words about the
    context would be those of a function that was running, and had perhaps done something.
    """
    if outdated(error) is not Outdated.STATEMENTS or error.diag.context:
        return False
    cursor = conn.cursor()
    cursor._tx = Transformer(cursor)
    key = conn._prepared.key(cursor._convert_query(query, params))
    return key in vars(conn).get(FORGOTTEN, ())


class WaitsAndNotes(psycopg.Connection[Any]):
    """What is put in front of a connection class that waits as psycopg does: 0.1 us per statement.

    `super()` would cost as much again, and a call that passes on whatever it was given four times as much.
    """

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Run one of psycopg's generators, as psycopg does."""
        try:
            if timeout is None:  # psycopg 3.2 knows none
                return psycopg.Connection.wait(self, gen, interval)
            return psycopg.Connection.wait(self, gen, interval, timeout)
        except psycopg.Error as error:
            note(self, error)
            raise


class NotesOutdated(psycopg.Connection[Any]):
    """What is put in front of a connection class, or another class in front of it, with its own way to wait."""

    def wait(self, gen: PQGen[RV], *how: Any, **more: Any) -> RV:
        """Run one of psycopg's generators, as the next class does."""
        try:
            return super().wait(gen, *how, **more)
        except psycopg.Error as error:
            note(self, error)
            raise


def in_front_of(base: type[Any], *limits: type[Any]) -> tuple[type[Any], ...]:
    """What goes in front of this connection class, whose statements are perhaps limited."""
    if not limits and getattr(base, "wait", None) is psycopg.Connection.wait:
        return (WaitsAndNotes,)
    return (NotesOutdated, *limits)


class AsyncNotesOutdated(psycopg.AsyncConnection[Any]):
    """The same for asyncio; where a class waits as psycopg does, `HearsCancellation` notes."""

    async def wait(self, gen: PQGen[RV], *how: Any, **more: Any) -> RV:
        """Run one of psycopg's generators, as the class does."""
        try:
            return await super().wait(gen, *how, **more)
        except psycopg.Error as error:
            note(self, error)
            raise
