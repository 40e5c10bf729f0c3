"""SQL as far as a stand-in must read it: where statements end, and which ones rule transactions.

One job: bytes of SQL to `Statement`s. It is no parser: it knows quotes, comments, and the first
words of a statement.

It must not know: connections, what is done about a statement. It takes no lock; it is pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


class Kind(Enum):
    """What a statement does to transactions; OTHER: nothing, the server may have it as it is."""

    BEGIN = "begin"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    SAVEPOINT = "savepoint"
    RELEASE = "release"
    ROLLBACK_TO = "rollback to"
    TWO_PHASE = "two-phase"
    DEALLOCATE = "deallocate"
    LISTEN = "listen"
    IN_BLOCK = "in a block only"
    READ_ONLY = "set transaction read only"
    OTHER = "other"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement.

    Attributes:
        sql: its text.
        kind: what it does to transactions.
        name: of the savepoint, or of the prepared statement (None: all of them).
        read_only: it makes the transaction one that may only look.
        chain: COMMIT AND CHAIN.
        tag: what a server calls a BEGIN or COMMIT when it is done.
    """

    sql: bytes
    kind: Kind = Kind.OTHER
    name: bytes | None = None
    read_only: bool = False
    chain: bool = False
    tag: bytes = b""


_TOKEN: Final = re.compile(
    rb"""
      (?P<dollar> \$(?:[A-Za-z_\x80-\xff][\w\x80-\xff]*)?\$ )
    | (?P<escaped> [eE]'(?:[^'\\]|\\.|'')*' )
    | (?P<quoted> '(?:[^']|'')*' | "(?:[^"]|"")*" )
    | (?P<line> --[^\n]* )
    | (?P<comment> /\* )
    | (?P<word> [A-Za-z_\x80-\xff][\w$\x80-\xff]* )
    | (?P<number> \$?\d[\w.]* )
    | (?P<sign> [^\s] )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_MARK: Final = re.compile(rb"/\*|\*/")

# A cheap look that spares the other statements the reading.
_MAY_RULE: Final = re.compile(
    rb"\b(?:begin|start|commit|end|abort|rollback|savepoint|release|prepare|deallocate|listen|declare|lock|transaction|transaction_read_only)\b",
    re.IGNORECASE,
)

# SET LOCAL name, and set_config('name' | $1 | %s already merged, ..., true)
_SET_LOCAL: Final = re.compile(rb"\bset\s+local\s+([\w.$\x80-\xff]+|\"[^\"]+\")", re.IGNORECASE)
_SET_CONFIG: Final = re.compile(rb"\bset_config\s*\(\s*(?:\$(\d+)|'((?:[^']|'')*)')", re.IGNORECASE)


def statements(sql: bytes) -> list[Statement]:
    """What a simple query consists of; in one piece where nothing in it rules transactions."""
    if not _MAY_RULE.search(sql):
        return [Statement(sql, Kind.OTHER if _words(sql, 1) else Kind.EMPTY)]
    found = [statement(part) for part in split(sql)]
    if all(each.kind in {Kind.OTHER, Kind.EMPTY} for each in found):
        kinds = {each.kind for each in found}
        return [Statement(sql, Kind.OTHER if Kind.OTHER in kinds else Kind.EMPTY)]
    return [each for each in found if each.kind is not Kind.EMPTY]


def statement(sql: bytes) -> Statement:
    """One statement, read by its first words."""
    words = [word.upper() for word in _words(sql, 12)]
    if not words:
        return Statement(sql, Kind.EMPTY)
    kind = _kind(words)
    if kind is Kind.OTHER:
        return Statement(sql)
    return Statement(
        sql,
        kind,
        name=_name(kind, _words(sql, 12)),
        read_only=b"READ ONLY" in b" ".join(words),
        chain=words[-2:] == [b"AND", b"CHAIN"],
        tag=b"START TRANSACTION" if words[0] == b"START" else words[0],
    )


def _kind(words: list[bytes]) -> Kind:
    first, second = words[0], (*words, b"", b"")[1]
    if first == b"BEGIN" or (first == b"START" and second == b"TRANSACTION"):
        return Kind.BEGIN
    if second in {b"PREPARED", b"TRANSACTION"} and (
        (first == b"PREPARE" and second == b"TRANSACTION")
        or (first in {b"COMMIT", b"ROLLBACK"} and second == b"PREPARED")
    ):
        return Kind.TWO_PHASE
    if first in {b"COMMIT", b"END"}:
        return Kind.COMMIT
    if first in {b"ROLLBACK", b"ABORT"}:
        return Kind.ROLLBACK_TO if b"TO" in words[1:3] else Kind.ROLLBACK
    if first == b"SET" and _makes_read_only(words):
        return Kind.READ_ONLY
    plain = {
        b"SAVEPOINT": Kind.SAVEPOINT,
        b"RELEASE": Kind.RELEASE,
        b"DEALLOCATE": Kind.DEALLOCATE,
        b"LISTEN": Kind.LISTEN,
        b"LOCK": Kind.IN_BLOCK,
        b"DECLARE": Kind.OTHER if b"HOLD" in words else Kind.IN_BLOCK,
    }
    return plain.get(first, Kind.OTHER)


def _makes_read_only(words: list[bytes]) -> bool:
    if words[1] == b"TRANSACTION":
        return b"READ ONLY" in b" ".join(words)
    name, *value = [word for word in words[1:] if word not in {b"LOCAL", b"SESSION", b"TO"}]
    return name == b"TRANSACTION_READ_ONLY" and value[:1] != [b"OFF"]


def _name(kind: Kind, words: list[bytes]) -> bytes | None:
    if kind not in {Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO, Kind.DEALLOCATE}:
        return None
    name = words[-1]
    if kind is Kind.DEALLOCATE and name.upper() == b"ALL":
        return None
    return name[1:-1].replace(b'""', b'"') if name[:1] == b'"' else name.lower()


def _words(sql: bytes, count: int) -> list[bytes]:
    """The first words, names in quotes among them; other values end the search."""
    found: list[bytes] = []
    for group, token, _, _ in _tokens(sql):
        if group == "word" or (group == "quoted" and token[:1] == b'"'):
            found.append(token)
        elif token == b"," or (token == b";" and not found):
            continue
        else:
            # A value, or a sign: no statement that rules transactions goes on like this.
            return found or [token]
        if len(found) == count:
            break
    return found


def split(sql: bytes) -> list[bytes]:
    """The statements of a text: cut at the semicolons that end one."""
    parts: list[bytes] = []
    begin = depth = 0
    words: list[bytes] = []
    for _, token, at, end in _tokens(sql):
        word = token.upper()
        depth += _deeper(word, words)
        if token == b";" and depth <= 0:
            parts.append(sql[begin:at])
            begin, depth, words = end, 0, []
        else:
            words.append(word)
    return [*parts, sql[begin:]]


def _deeper(word: bytes, before: list[bytes]) -> int:
    """By how much a word changes the depth in which a semicolon ends no statement."""
    if word == b"(":
        return 1
    if word == b")":
        return -1
    # A function's body in SQL: CREATE FUNCTION ... BEGIN ATOMIC ...; ...; END
    if before[:1] != [b"CREATE"]:
        return 0
    if word == b"ATOMIC" and before[-1] == b"BEGIN":
        return 1
    if b"ATOMIC" in before:
        return {b"CASE": 1, b"END": -1}.get(word, 0)
    return 0


def _tokens(sql: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """(group, token, begin, end) of all that matters; comments are left out."""
    at = 0
    while (match := _TOKEN.search(sql, at)) is not None:
        group, at = str(match.lastgroup), match.end()
        if group == "dollar":
            end = sql.find(match[0], at)
            at = len(sql) if end < 0 else end + len(match[0])
        elif group == "comment":
            at = _end_of_comment(sql, at)
            continue
        elif group == "line":
            continue
        yield group, sql[match.start() : at], match.start(), at


def _end_of_comment(sql: bytes, at: int) -> int:
    depth = 1
    while depth and (mark := _COMMENT_MARK.search(sql, at)) is not None:
        depth += 1 if mark[0] == b"/*" else -1
        at = mark.end()
    return len(sql) if depth else at


def local_settings(sql: bytes, params: list[bytes | None]) -> set[bytes]:
    """The settings that a statement may set for its transaction only, as far as it shows.

    Args:
        sql: its text.
        params: its parameters, for ``set_config($1, $2, true)``.
    """
    if b"et" not in sql.lower():
        return set()
    found = {match[1].strip(b'"').lower() for match in _SET_LOCAL.finditer(sql)}
    for match in _SET_CONFIG.finditer(sql):
        if match[1] is None:
            found.add(match[2].replace(b"''", b"'").lower())
        elif int(match[1]) <= len(params) and (name := params[int(match[1]) - 1]) is not None:
            found.add(name.lower())
    # TRANSACTION ISOLATION LEVEL is no setting, and TIME ZONE is one by another name
    return {{b"time": b"timezone"}.get(name, name) for name in found - {b"transaction"}}
