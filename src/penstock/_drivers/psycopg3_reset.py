"""The session reset as SQL: what it clears, and what it sets back of what `configure` had made.

It must not know: handles, deadlines, links; it makes messages and reads rows.

`DISCARD ALL` and `DEALLOCATE ALL` would throw away the statements that psycopg prepared and still
counts on (it fails from the 7th use on). This list does not, and one message with it is one
implicit transaction and one round trip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from psycopg.pq import Escaping

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

# What a session holds by its own SQL. pg_settings does not list custom settings (`app.tenant`), so
# what `configure` set of those is not seen; they belong in the connection's `options`.
# `transaction_...` are the running transaction's; "internal" cannot be set.
LEARN: Final = b"""\
select 'setting', name, setting from pg_catalog.pg_settings
 where source = 'session' and context <> 'internal' and name not like 'transaction\\_%'
union all select 'channel', c, '' from pg_catalog.pg_listening_channels() c
union all select 'statement', name, '' from pg_catalog.pg_prepared_statements where from_sql
union all select 'user', session_user::text, ''
union all select 'role', pg_catalog.current_setting('role'), ''"""

# Cursors and authorization first: the rest needs the rights of the role that logged in.
_CLEAR: Final = (
    b"CLOSE ALL",
    b"SET SESSION AUTHORIZATION DEFAULT",
    b"RESET ALL",
    b"UNLISTEN *",
    b"SELECT pg_catalog.pg_advisory_unlock_all()",
    b"DISCARD PLANS",
    b"DISCARD TEMP",
    b"DISCARD SEQUENCES",
)


def reset_message(handle: PGconn, learned: PGresult | None) -> bytes:
    """The message that brings a session back to the state that `learned` describes.

    Args:
        handle: the libpq handle, for its quoting rules and the name of the user who logged in.
        learned: the answer to `LEARN`; None for a session that nobody configured.
    """
    found = _grouped(learned)
    statements = [*_CLEAR, _deallocate(handle, found.get("statement", []))]
    statements += _set_back(handle, found)
    return b"; ".join(statements)


def _grouped(learned: PGresult | None) -> dict[str, list[tuple[bytes, bytes]]]:
    found: dict[str, list[tuple[bytes, bytes]]] = {}
    for row in range(learned.ntuples if learned else 0):
        kind, name, value = (learned.get_value(row, column) or b"" for column in range(3))  # type: ignore[union-attr]
        found.setdefault(kind.decode(), []).append((name, value))
    return found


def _deallocate(handle: PGconn, keep: list[tuple[bytes, bytes]]) -> bytes:
    # `from_sql` alone tells a borrower's PREPARE from what drivers prepare by protocol.
    # The body is quoted as a string, not by dollars: a name could hold the dollar tag.
    kept = b"".join(b" and name <> " + _literal(handle, name) for name, _ in keep)
    body = (
        b"declare r record; begin for r in select name from pg_catalog.pg_prepared_statements"
        b" where from_sql" + kept + b" loop"
        b" execute 'deallocate ' || pg_catalog.quote_ident(r.name); end loop; end"
    )
    return b"DO " + _literal(handle, body)


def _set_back(handle: PGconn, found: dict[str, list[tuple[bytes, bytes]]]) -> list[bytes]:
    statements: list[bytes] = []
    if settings := found.get("setting"):
        calls = (
            b"pg_catalog.set_config(%b, %b, false)"
            % (_literal(handle, name), _literal(handle, value))
            for name, value in settings
        )
        statements.append(b"SELECT " + b", ".join(calls))
    statements += [b"LISTEN " + _identifier(handle, name) for name, _ in found.get("channel", ())]
    # The roles last: what comes before may need the rights of the one that logged in.
    for user, _ in found.get("user", ()):
        if user != handle.user:
            statements.append(b"SET SESSION AUTHORIZATION " + _literal(handle, user))
    for role, _ in found.get("role", ()):
        if role != b"none":
            statements.append(b"SET ROLE " + _literal(handle, role))
    return statements


def _literal(handle: PGconn, text: bytes) -> bytes:
    return Escaping(handle).escape_literal(text)


def _identifier(handle: PGconn, name: bytes) -> bytes:
    return Escaping(handle).escape_identifier(name)
