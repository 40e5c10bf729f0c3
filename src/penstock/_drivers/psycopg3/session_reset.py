"""The session reset as psycopg 3 sends it: `session_reset`'s text as bytes, quoted by libpq.

libpq quotes by the rules of the session, whose encoding need not be UTF-8: so bytes of the server's
are never decoded here, they only pass through text (Latin-1 has a character for each byte).

It must not know: deadlines, links, what a reset clears.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from psycopg.pq import Escaping

from penstock._drivers import session_reset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.pq.abc import PGconn, PGresult

_BYTES: Final = "latin-1"

#: What to ask for what a session holds by its own SQL.
LEARN: Final = session_reset.LEARN.encode()


def reset_message(handle: PGconn, learned: PGresult | None) -> bytes:
    """The message that brings a session back to the state that `learned` describes.

    Args:
        handle: the libpq handle, for its quoting rules and the name of the user who logged in.
        learned: the answer to `LEARN`; None for a session that nobody configured.
    """
    escaping = Escaping(handle)
    text = session_reset.reset_message(
        handle.user.decode(_BYTES),
        _rows(learned),
        literal=lambda value: escaping.escape_literal(value.encode(_BYTES)).decode(_BYTES),
        identifier=lambda name: escaping.escape_identifier(name.encode(_BYTES)).decode(_BYTES),
    )
    return text.encode(_BYTES)


def _rows(learned: PGresult | None) -> Iterator[list[str]]:
    if learned is not None:
        for row in range(learned.ntuples):
            yield [(learned.get_value(row, column) or b"").decode(_BYTES) for column in range(3)]
