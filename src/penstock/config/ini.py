"""Reading INI text into sections whose entries know their lines.

configparser reads, with interpolation off (passwords hold ``%``) and without inline comments
(passwords hold ``#`` and ``;``). It is followed line by line, so that each key knows where it was.

It must not know: which keys there are. It raises no error of configparser's: they quote the text.
No lock: a reader belongs to one call.
"""

from __future__ import annotations

import configparser
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from penstock.config.secret import Hidden, Secret, is_secret
from penstock.config.sections import Entry, Section

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The section that is in every other one.
_AROUND: Final = "DEFAULT"
_HEADER: Final = "put the name of the database above, in brackets: [default]"
# Stricter than configparser's, to which `[shop] PW = [x]` is a section, and the password in its name.
_SECTION: Final = re.compile(r"\[(?P<header>\w[\w .:/-]*)\]\s*(?:[#;].*)?\Z")


class Broken:
    """Why a text is no INI, or TOML: a line and a sentence, nothing of the text.

    Attributes:
        key: the key that it is about, or "file".
    """

    __slots__ = ("hint", "key", "line", "what")

    def __init__(
        self, what: str, line: int | None, hint: str | None = None, key: str = "file"
    ) -> None:
        self.what = what
        self.line = line
        self.hint = hint
        self.key = key


class _Key(str):
    """A key that knows where it was read; configparser keeps it as it is."""

    __slots__ = ("line", "written")
    line: int
    written: str


class _Lines:
    """The text's lines, one after the other, and which one is being read."""

    def __init__(self, text: Hidden[str]) -> None:
        self._text = text
        self.now = 0

    def __iter__(self) -> Iterator[str]:
        for self.now, line in enumerate(self._text.value.splitlines(keepends=True), 1):  # noqa: B020
            yield line

    def key(self, written: str) -> str:
        """What configparser makes of a key: case does not matter."""
        if isinstance(written, _Key):
            return written
        key = _Key(written.lower())
        key.line, key.written = self.now, written
        return key


def read_ini(text: Hidden[str], file: str) -> list[Section] | Broken:
    """All sections in order; [DEFAULT] is in each of them.

    Args:
        text: the file's content.
        file: its name, for errors.
    """
    lines = _Lines(text)
    # No default section of its own: in what it merges, a key would have the line of [DEFAULT]'s.
    parser = configparser.ConfigParser(
        interpolation=None, empty_lines_in_values=False, default_section="\0"
    )
    parser.SECTCRE = _SECTION
    parser.optionxform = lines.key  # type: ignore[assignment, method-assign]
    broken = _feed(parser, lines)
    if broken is not None:
        return broken
    own = {name: _entries(parser, name) for name in parser.sections()}
    around = own.pop(_AROUND, ())
    if around and not own:  # nothing to be in: it is the database itself
        return [Section(_AROUND.lower(), around, file, path=_AROUND)]
    inherited = tuple(replace(entry, outside=1) for entry in around)
    return [Section(name, own[name] + inherited, file, path=name) for name in own]


def _feed(parser: configparser.ConfigParser, lines: _Lines) -> Broken | None:
    try:
        parser.read_file(lines)
    except configparser.DuplicateOptionError as error:
        return Broken("a key stands twice in this section", error.lineno, key=_shown(error.option))
    except configparser.DuplicateSectionError as error:
        return Broken("a section of that name stands above, too", error.lineno, "merge the two")
    except configparser.MissingSectionHeaderError as error:
        return Broken("a key stands before the first section", error.lineno, _HEADER)
    except configparser.ParsingError as error:
        first = error.errors[0][0] if error.errors else getattr(error, "lineno", None)
        return Broken("this line is no 'key = value'", first)
    except (configparser.Error, ValueError, AttributeError):
        # AttributeError: 3.11 and 3.12 trip over an indented line below a line that is none
        return Broken("this line cannot be read", lines.now)
    return None


def _shown(option: str) -> str:
    return option if option.replace("_", "").isalpha() else "?"


def _entries(parser: configparser.ConfigParser, name: str) -> tuple[Entry, ...]:
    pairs = sorted(parser.items(name, raw=True), key=lambda pair: _line(pair[0]) or 0)
    entries, before = [], ""
    for key, value in pairs:
        written = key.written if isinstance(key, _Key) else key
        # After a secret comes what a line break in it has split off, perhaps; and a secret's
        # name may have lost its "=".
        doubtful = is_secret(before) or not _is_plain(written)
        entries.append(Entry(written, str(key), Secret(value), _line(key), doubtful))
        before = key
    return tuple(entries)


def _line(key: str) -> int | None:
    return key.line if isinstance(key, _Key) else None


def _is_plain(key: str) -> bool:
    letters = key.replace("_", "").replace("-", "")
    return letters.isalpha() and letters.isascii() and not is_secret(key)
