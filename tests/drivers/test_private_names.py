"""What a driver takes for granted of its library is looked for when a pool is made, in one table per driver."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock import AsyncConnectionPool, ConnectionPool, DriverNotFoundError
from penstock._drivers.asyncpg import private as asyncpg_private
from penstock._drivers.private import (
    Library,
    UnsupportedLibrary,
    missing_in,
    parts_of,
    refuse_unsupported,
)
from penstock._drivers.psycopg2 import private as psycopg2_private
from penstock._drivers.psycopg3 import private as psycopg3_private

ROOT = Path(__file__).parents[2]
LIBRARIES: dict[str, Library] = {
    "psycopg": psycopg3_private.LIBRARY,
    "psycopg2": psycopg2_private.LIBRARY,
    "asyncpg": asyncpg_private.LIBRARY,
}
each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


@each_library
def test_the_library_that_is_installed_has_them_all(library: Library) -> None:
    assert list(missing_in(library)) == []
    refuse_unsupported(library)


class Without:
    """An object that lacks one name."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@each_library
def test_each_one_that_is_missing_is_told_with_what_it_is_for(library: Library) -> None:
    for owner, names in library.names.items():
        for name, purpose in names.items():
            owners = {**library.owners(), owner: Without(library.owners()[owner], name)}
            lacking = dataclasses.replace(library, owners=partial(dict, owners))
            with pytest.raises(UnsupportedLibrary) as caught:
                refuse_unsupported(lacking)
            text = str(caught.value)
            assert f"{owner}.{name} ({purpose})" in text
            assert f"{library.least} to {library.newest}" in text
            assert library.version() in text
            assert "next step: install" in text


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("3.1.20", False),
        ("3.2", False),
        ("3.2.1", True),
        ("3.2.1.dev1", True),
        ("3.10.0", True),
        ("4.0.0", True),
    ],
)
def test_a_library_that_is_too_old_is_told_by_its_version(found: str, fits: bool) -> None:
    library = dataclasses.replace(LIBRARIES["psycopg"], version=lambda: found)
    if fits:
        refuse_unsupported(library)
        return
    with pytest.raises(UnsupportedLibrary, match=f"3.2.1 or newer .* and {found} is installed"):
        refuse_unsupported(library)


def test_pyproject_asks_for_the_versions_that_the_drivers_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    seen = set()
    for line in lines:
        wanted = re.fullmatch(r"(psycopg2|psycopg|asyncpg)(?:\[binary\]|-binary)?>=([\d.]+)", line)
        if wanted:
            library = LIBRARIES[wanted[1]]
            least = (*parts_of(library.least), 0, 0)[:3]
            assert (*parts_of(wanted[2]), 0, 0)[:3] == least, line
            seen.add(wanted[1])
    assert seen == LIBRARIES.keys()


WITHOUT_BACKLOG = """
import psycopg

init = psycopg.BaseConnection.__init__

def without(self, *args):
    init(self, *args)
    del self.__dict__["_notifies_backlog"]

psycopg.BaseConnection.__init__ = without
"""
REMOVALS = {
    "psycopg": (
        WITHOUT_BACKLOG,
        "Connection._notifies_backlog",
    ),
    "psycopg2": (
        "import psycopg2.extensions as e; del e.set_wait_callback",
        "extensions.set_wait_callback",
    ),
    "asyncpg": (
        "import asyncpg; del asyncpg.connection.Connection._mark_stmts_as_closed",
        "Connection._mark_stmts_as_closed",
    ),
}


@pytest.mark.parametrize("driver", REMOVALS)
def test_a_pool_over_a_library_that_lacks_one_says_so_when_it_is_made(driver: str) -> None:
    remove, name = REMOVALS[driver]
    kinds = {"psycopg": ("", "Async"), "psycopg2": ("",), "asyncpg": ("Async",)}[driver]
    for kind in kinds:
        program = (
            f"{remove}\n"
            f"from penstock import {kind}ConnectionPool, DriverNotFoundError\n"
            f"try: {kind}ConnectionPool(driver={driver!r})\n"
            "except DriverNotFoundError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert f"driver {driver!r} does not know {driver} " in done.stdout, done.stderr
        assert f"this one has no {name} (" in done.stdout
        assert "next step: install" in done.stdout
        assert "docs/errors/driver-not-found-error.md" in done.stdout


def test_a_pool_over_a_library_that_is_too_old_says_so_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psycopg

    monkeypatch.setattr(psycopg, "__version__", "3.1.20")
    for pool in (ConnectionPool, AsyncConnectionPool):
        with pytest.raises(
            DriverNotFoundError, match=r"needs psycopg 3\.2\.1 or newer .* 3\.1\.20 is"
        ):
            pool()
    assert issubclass(DriverNotFoundError, ImportError)


# -- the tables are whole -------------------------------------------------------------------------------

#: Names of the standard library's, which drivers reach for; and `_pool`, which psycopg reads and never sets.
NOT_THEIRS = {"_sock", "_get_running_loop", "_ssl_protocol", "_transport", "_closed", "_pool"}


def private_names_in(prefix: str) -> dict[str, str]:
    """Each name with an underscore that the files of a driver use and none of ours makes, with its file."""
    used: dict[str, str] = {}
    ours: set[str] = set()
    folders = (ROOT / "src/penstock/_drivers", ROOT / "src/penstock/_process")
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        ours.update(*map(made_by, nodes))
        if file.parent.name == prefix and file.name != "private.py":
            used |= {name: file.name for node in nodes for name in used_by(node)}
    return {name: file for name, file in used.items() if name not in ours}


def used_by(node: ast.AST) -> set[str]:
    match node:
        case ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
            return {name} if _is_private(name) else set()
        case _:
            return set()


def made_by(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            # A method that calls the library's own of that name does not make it.
            return set() if any(_is_super_call(each, name) for each in ast.walk(node)) else {name}
        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
            return {name}
        case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
            return {str(e.value) for e in ast.walk(value) if isinstance(e, ast.Constant)}
        case ast.Name(id=name, ctx=ast.Store()):
            return {name}
        case _:
            return set()


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*", name) is not None and not name.startswith("_penstock")


def _is_super_call(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=found):
            return found == name
        case _:
            return False


@pytest.mark.parametrize(
    ("driver", "prefix"),
    [("psycopg", "psycopg3"), ("asyncpg", "asyncpg"), ("psycopg2", "psycopg2")],
)
def test_every_private_name_that_a_driver_uses_is_in_its_table(driver: str, prefix: str) -> None:
    table = {name for names in LIBRARIES[driver].names.values() for name in names}
    found = private_names_in(prefix)
    assert not {name: file for name, file in found.items() if name not in table | NOT_THEIRS}
    if driver != "psycopg2":
        assert len(found) > 5
