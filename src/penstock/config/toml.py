"""Reading TOML text into sections whose entries know their lines.

tomllib reads. It tells no lines, so an entry's line is found when it is needed, by reading the
text's beginnings again.

It must not know: which keys there are. It raises no error of tomllib's: some quote the text.
No lock: pure functions.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from penstock.config.ini import Broken
from penstock.config.sections import Entry, Section, as_secret

if TYPE_CHECKING:
    from penstock.config.secret import Hidden

#: What of tomllib's words may be shown, and how it is said here.
_WORDS: Final = (
    ("overwrite", "a key or a section stands here for the second time"),
    ("twice", "a key or a section stands here for the second time"),
    ("Invalid value", "a value cannot be read: texts stand between quotes"),
    ("Unterminated", "a text is not ended by a quote"),
    ("Unescaped", "a backslash in a text: write it twice, or put the text between single quotes"),
    ("Expected '='", "'=' is missing after a key"),
)
_OPTION_TABLES: Final = frozenset(("kwargs",))

Path = tuple[str, ...]


def read_toml(text: Hidden[str], file: str) -> list[Section] | Broken:
    """The sections of a text: the tables that hold no other table, or the whole text if it has none.

    Keys of the tables around a section, and those on top, are in it, unless it has its own.

    Args:
        text: the file's content.
        file: its name, for errors.
    """
    document = _parsed(text)
    if isinstance(document, Broken):
        return document
    return [
        Section(path[-1] if path else None, _entries(document, path, text), file, ".".join(path))
        for path in _paths(document, ())
    ]


def _parsed(text: Hidden[str]) -> dict[str, Any] | Broken:
    try:
        return tomllib.loads(text.value)
    except tomllib.TOMLDecodeError as error:
        told = str(error)
    except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
        return Broken("a value cannot be read: it is too long or nested too deep", None)
    found = re.search(r"\(at line (\d+), column \d+\)\Z", told)
    last = text.value.count("\n") + (not text.value.endswith("\n"))
    what = next((ours for theirs, ours in _WORDS if theirs in told), "this line is not TOML")
    return Broken(what, int(found[1]) if found else last)


def _paths(table: dict[str, Any], path: Path) -> list[Path]:
    inner = [(key, value) for key, value in table.items() if _is_section(key, value)]
    return [each for key, value in inner for each in _paths(value, (*path, key))] or [path]


def _is_section(key: str, value: object) -> bool:
    return isinstance(value, dict) and key.lower() not in _OPTION_TABLES


def _entries(document: dict[str, Any], path: Path, text: Hidden[str]) -> tuple[Entry, ...]:
    found: list[Entry] = []
    for depth in range(len(path), -1, -1):  # the nearest first
        words = {entry.word for entry in found}
        around = _of_table(_table(document, path[:depth]), path[:depth], text)
        outside = len(path) - depth
        found += [replace(each, outside=outside) for each in around if each.word not in words]
    return tuple(found)


def _table(document: dict[str, Any], path: Path) -> dict[str, Any]:
    found: Any = document
    for part in path:
        found = found[part]
    return dict(found)


def _of_table(table: dict[str, Any], path: Path, text: Hidden[str]) -> list[Entry]:
    return [
        Entry(
            key,
            key.lower(),
            as_secret(value),
            partial(_line_of, (*path, key), text),
            doubtful=not _is_plain(key),
        )
        for key, value in table.items()
        if not _is_section(key, value)
    ]


def _is_plain(key: str) -> bool:
    return re.fullmatch(r"[A-Za-z]+([_-][A-Za-z]+)*", key) is not None


# -- lines ----------------------------------------------------------------------------------------------


def _line_of(path: Path, text: Hidden[str]) -> int | None:
    """The line where the key stands: the first beginning of the text that has it ends there."""
    lines = text.value.split("\n")
    for number, line in enumerate(lines, 1):
        if path[-1] in line and _has(path, lines, number) and not _has(path, lines, number - 1):
            return number
    return None


def _has(path: Path, lines: list[str], number: int) -> bool:
    """Whether the first `number` lines, and as many more as the last value takes, have the key."""
    for end in range(number, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:end]))
        except (ValueError, RecursionError):
            continue
        for part in path:
            found = found.get(part) if isinstance(found, dict) else None
        return found is not None
    return False
