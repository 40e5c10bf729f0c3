"""The session reset as SQL: what it clears, and what it sets back.

`DISCARD ALL` and `DEALLOCATE ALL` would throw away the statements that drivers prepared by protocol
and still count on. This list does not, and one message with it is one implicit transaction and one
round trip.

It must not know: any database library, links. Pure functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: What a session holds by its own SQL: rows of kind, name, value. pg_settings does not list custom
#: settings (`app.tenant`), so what `configure` set of those is not seen. `transaction_...` are the
#: running transaction's; "internal" cannot be set.
LEARN: Final = """\
select 'setting', name::text, setting from pg_catalog.pg_settings
 where source = 'session' and context <> 'internal' and name not like 'transaction\\_%'
union all select 'channel', c, '' from pg_catalog.pg_listening_channels() c
union all select 'statement', name::text, '' from pg_catalog.pg_prepared_statements where from_sql
union all select 'user', session_user::text, ''
union all select 'role', pg_catalog.current_setting('role'), ''"""

# Cursors and authorization first: the rest needs the rights of the role that logged in.
_CLEAR: Final = (
    "CLOSE ALL",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET ALL",
    "UNLISTEN *",
    "SELECT pg_catalog.pg_advisory_unlock_all()",
    "DISCARD PLANS",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
)


def literal(text: str) -> str:
    """A text as SQL, whatever standard_conforming_strings is; the client's encoding must be UTF-8."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f" E'{escaped}'" if "\\" in text else f"'{escaped}'"


def identifier(name: str) -> str:
    """A name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def reset_message(
    login: str,
    learned: Iterable[Sequence[str | None]] = (),
    *,
    literal: Callable[[str], str] = literal,
    identifier: Callable[[str], str] = identifier,
) -> str:
    """The message that brings a session back to the state that `learned` describes.

    Args:
        login: the name of the user who logged in.
        learned: the answer to `LEARN`; empty for a session that nobody configured.
        literal: quotes a text, for drivers that know better than this file.
        identifier: quotes a name.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for kind, name, value in learned:
        found.setdefault(kind or "", []).append((name or "", value or ""))
    statements = [*_CLEAR, _deallocate(found.get("statement", []), literal)]
    if settings := found.get("setting"):
        calls = (
            f"pg_catalog.set_config({literal(name)}, {literal(value)}, false)"
            for name, value in settings
        )
        statements.append("SELECT " + ", ".join(calls))
    statements += [f"LISTEN {identifier(name)}" for name, _ in found.get("channel", ())]
    # The roles last: what comes before may need the rights of the one that logged in.
    for user, _ in found.get("user", ()):
        if user != login:
            statements.append(f"SET SESSION AUTHORIZATION {literal(user)}")
    for role, _ in found.get("role", ()):
        if role != "none":
            statements.append(f"SET ROLE {literal(role)}")
    return "; ".join(statements)


def _deallocate(keep: list[tuple[str, str]], literal: Callable[[str], str]) -> str:
    # `from_sql` alone tells a borrower's PREPARE from what drivers prepare by protocol.
    # The body is quoted as a string, not by dollars: a name could hold the dollar tag.
    kept = "".join(f" and name <> {literal(name)}" for name, _ in keep)
    body = (
        "declare r record; begin for r in select name from pg_catalog.pg_prepared_statements"  # noqa: S608
        f" where from_sql{kept} loop"
        " execute 'deallocate ' || pg_catalog.quote_ident(r.name); end loop; end"
    )
    return f"DO {literal(body)}"
