"""What was read of one database, and where: the common form of mappings, files and environment.

One job: `Entry` (a key, its value, its line) and `Section` (a database's entries, their file), and
the errors that name the place. An error shows no value and no text of a file but names: a broken
file has its secrets anywhere.

It must not know: which keys there are, how files are read. Whoever reads gives `Secret` texts.
No lock: values do not change.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from penstock.config.secret import Secret
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Entry:
    """One key and its value.

    Attributes:
        key: as it was written, for errors.
        word: what it means: without prefix, in small letters.
        value: texts are `Secret`.
        line: where it stands in the section's file, or what finds that out, or None.
        doubtful: this may be the rest of a broken line with a secret, so the key is shown only
            where it resembles one that exists.
        outside: 0 for the section's own; 1 and more for what it has from around it (the further
            away, the more). The nearer one wins.
    """

    key: str
    word: str
    value: Any
    line: int | Callable[[], int | None] | None = None
    doubtful: bool = False
    outside: int = 0

    def __repr__(self) -> str:
        return f"<Entry {'?' if self.doubtful else repr(self.key)}>"

    def number(self) -> int | None:
        """The line, found out if need be."""
        return self.line() if callable(self.line) else self.line


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """The entries of one database.

    Attributes:
        name: what the pool is called, unless an entry says so; or None.
        path: what the section is called in its file: for TOML the dotted name of the table.
        entries: as they were read; the same word may be there twice.
        file: the file, as the user named it; None: a mapping or the environment.
        expands: whether ``${VAR}`` in its texts is replaced from the environment.
        spelling: turns an option's name into what is written here, for "did you mean".
    """

    name: str | None
    entries: tuple[Entry, ...] = field(repr=False)
    file: str | None = None
    path: str | None = None
    expands: bool = False
    spelling: Callable[[str], str] = str

    def wrong(
        self,
        entry: Entry,
        allowed: str | None = None,
        given: str = "what is written there",
        *,
        what: str | None = None,
        hint: str | None = None,
    ) -> ConfigError:
        """The error for this entry's value, to be raised."""
        return ConfigError(
            entry.key, given, allowed,
            pool=self.name, hint=hint, what=what, file=self.file, line=entry.number(),
        )  # fmt: skip


def as_secret(value: Any) -> Any:
    """The value with every text in it a `Secret`."""
    if isinstance(value, str):
        return Secret(value)
    if isinstance(value, (list, tuple)):
        return [as_secret(each) for each in value]
    if isinstance(value, dict):
        return {key: as_secret(each) for key, each in value.items()}
    return value


# -- variables of the environment in files ----------------------------------------------------------

_DOLLAR: Final = re.compile(r"\$(?:\$|\{(?P<name>[^{}]*)\}|(?P<open>\{))")
_USUAL: Final = re.compile(r"[A-Z_][A-Z0-9_]*", re.ASCII)


class Unset(Exception):  # noqa: N818  it never leaves `expanded`
    """A ``${...}`` that cannot be replaced; the text says why, without pieces of secrets."""


def expanded(section: Section, entry: Entry) -> Entry:
    """The entry with its ``${VAR}`` replaced from the environment, and ``$$`` by one dollar.

    A dollar before anything else is a dollar. What a variable holds is not looked into again.

    Raises:
        ConfigError: the variable is not set, or the braces are not closed.
    """
    found = _expanded(entry.value)
    if isinstance(found, Unset):
        raise section.wrong(entry, what=f"option {entry.key!r} names {found}", hint=_HINT)
    return replace(entry, value=found)


_HINT: Final = "set it, or write $$ for a dollar"


def _expanded(value: Any) -> Any:
    try:
        return _replaced(value)
    except Unset as unset:
        return unset.with_traceback(None)


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return Secret(_DOLLAR.sub(_variable, value))
    if isinstance(value, list):
        return [_replaced(each) for each in value]
    if isinstance(value, dict):
        return {key: _replaced(each) for key, each in value.items()}
    return value


def _variable(match: re.Match[str]) -> str:
    if match[0] == "$$":
        return "$"
    name = match["name"]
    if not name:
        raise Unset("a variable by '${' without a name and '}'")
    found = os.environ.get(name)
    if found is None:
        if re.match(rf"{_USUAL.pattern}:?[-+?=]", name):
            raise Unset(
                "a variable with a default, as shells and Compose have it: there are none here"
            )
        # a name that is not written as usual may be a piece of a password
        shown = repr(name) if _USUAL.fullmatch(name) else "a variable"
        raise Unset(f"{shown}, which is not set in the environment")
    return found
