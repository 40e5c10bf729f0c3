"""What a driver takes for granted of its library: its least version, and names that the library does not promise.

One job: to say of an installed library, before a pool uses it, that it is too old, or that it lacks a name
that the driver needs. Each driver's table is in a file of its own (`psycopg3_private.py` ...).

It must not know: any library, pools. No lock: pure functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Library:
    """A database library, and the versions that its driver is made for.

    Attributes:
        name: what is installed.
        least: the oldest version that is supported, as in pyproject.toml.
        why: why it is that one.
        newest: the newest version that the tests have run with, for people.
        version: gives the version that is installed.
        owners: gives the library's objects that have the private names, without a connection.
        names: for each owner its private names, and what the driver needs each for.
    """

    name: str
    least: str
    why: str
    newest: str
    version: Callable[[], str]
    owners: Callable[[], Mapping[str, Any]]
    names: Mapping[str, Mapping[str, str]]


class UnsupportedLibrary(Exception):  # noqa: N818  it says what was found
    """The library that is installed is not one that the driver can work with; the text says why."""


def refuse_unsupported(library: Library) -> None:
    """Look at the library that is installed.

    Raises:
        UnsupportedLibrary: it is too old, or lacks a private name.
    """
    found = library.version()
    if parts_of(found) < parts_of(library.least):
        raise UnsupportedLibrary(
            f"needs {library.name} {library.least} or newer ({library.why}), and {found} is installed; "
            f"next step: pip install --upgrade '{library.name}>={library.least}'"
        )
    if missing := list(missing_in(library)):
        raise UnsupportedLibrary(
            f"does not know {library.name} {found}: it is made for {library.least} to {library.newest}, and this one "
            f"has no {'; no '.join(missing)}; next step: install {library.name} {library.newest}, or a newer "
            "penstock"
        )


def missing_in(library: Library) -> Iterable[str]:
    """The names that the library that is installed does not have, each with what it is for."""
    owners = library.owners()
    for owner, names in library.names.items():
        for name, purpose in names.items():
            if not hasattr(owners.get(owner), name):
                yield f"{owner}.{name} ({purpose})"


def parts_of(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: of "2.9.13 (dt dec pq3)" and of "3.3.0.dev1" the first three."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition(" ")[0])[:3])
