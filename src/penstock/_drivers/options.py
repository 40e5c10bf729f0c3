"""Options of a library's `connect` that a pool cannot honour: the words for them, before anything is opened.

It must not know: which options a library has; each driver does. No lock: pure functions.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from penstock.config.conninfo import Wrong, read
from penstock.config.secret import Secret
from penstock.drivers import UnfitOption

if TYPE_CHECKING:
    from collections.abc import Iterable

    from penstock.drivers import Recipe

#: What other libraries, and other drivers, call the same thing.
_MEANT: Final = {
    "database": "dbname",
    "db": "dbname",
    "username": "user",
    "passwd": "password",
    "pwd": "password",
    "hostname": "host",
    "ssl": "sslmode",
}
#: What a library's `connect` takes, and a pool by an option of its own.
_OF_THE_POOL: Final = {
    "conninfo": "conninfo",
    "dsn": "conninfo",
    "connection_class": "connection_class",
}


def names_in(recipe: Recipe) -> list[str]:
    """The options that a recipe names: those of a conninfo that parses, and the keywords."""
    found = read(Secret(recipe.conninfo))
    said = [] if isinstance(found, Wrong) else list(found)
    return list(dict.fromkeys((*said, *recipe.kwargs)))


def unknown_option(key: str, library: str, known: Iterable[str]) -> UnfitOption:
    """What to say of an option that this library does not have.

    Args:
        key: the option.
        library: its name, with the version where that decides.
        known: the options that it has.
    """
    if key in _OF_THE_POOL:
        option = _OF_THE_POOL[key]
        return UnfitOption(key, "is the pool's own", f"give it to the pool as {option}=")
    names = sorted(known)
    close = difflib.get_close_matches(key.lower(), names, n=1)
    meant = _MEANT.get(key.lower()) or (close[0] if close else None)
    hint = f"did you mean {meant!r}?" if meant in names else "leave it out, or look at its spelling"
    return UnfitOption(key, f"is unknown to {library}", hint)
