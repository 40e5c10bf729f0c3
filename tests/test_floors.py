"""Imports point down only, the machine stays pure, and `import penstock` imports no driver.

A new module needs a floor here; a new need of the machine's needs a reason here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent / "src"

#: What each folder may import of penstock, imports for types included; a folder is the longest of these that
#: a module's name begins with. What it is allowed to know follows from that: docs/design.md says it in words.
MAY_IMPORT = {
    "_machine": "",
    "_process": "",
    "errors": "",
    "drivers": "",
    "config": "errors drivers _machine.policy",
    "conninfo": "config",
    "_drivers": "errors drivers config _process _drivers.psycopg3.gevent_waits _drivers.psycopg2.gevent_waits",
    "_drivers.psycopg3": "errors drivers config _process _drivers",
    "_drivers.psycopg2": "errors drivers config _process _drivers _drivers.psycopg3.diagnose",
    "_drivers.asyncpg": "errors drivers config _process _drivers",
    "_pool": "errors drivers config _process _drivers _machine",
    "_pool.sync": "errors drivers config _process _drivers _machine _pool",
    "_pool.aio": "errors drivers config _process _drivers _machine _pool",
    "pools": "errors config _process _pool _pool.sync _pool.aio",
    "integrations": "errors drivers config _process _drivers _machine.slot _pool _pool.sync _pool.aio pools",
    "": "errors drivers config _drivers _machine.stats _pool _pool.sync _pool.aio pools",
}
#: Nobody's on the way up: they may import everything, and nothing imports them.
TOOLS = {"testing"}

MACHINE_MAY_IMPORT = {
    *("__future__", "bisect", "collections", "collections.abc", "dataclasses", "enum"),
    *("math", "operator", "typing", "weakref"),
}

# What may be imported at the top of a module that exists for it: (module prefix, packages).
OPTIONAL = {
    "penstock._drivers.psycopg3": {"psycopg", "psycopg_binary", "psycopg_c"},
    "penstock._drivers.psycopg2": {"psycopg2"},
    "penstock._drivers.asyncpg": {"asyncpg"},
    "penstock._process.greenlets": {"gevent", "greenlet"},
    "penstock.compat.psycopg_pool": {"psycopg"},
    "penstock.compat.psycopg2_pool": {"psycopg2"},
    "penstock.integrations.flask": {"flask", "werkzeug"},
    "penstock.integrations.connexion": {"connexion", "flask", "starlette"},
    "penstock.integrations.bottle": {"bottle"},
    "penstock.integrations.fastapi": {"fastapi", "starlette"},
    "penstock.integrations.tornado": {"tornado"},
    "penstock.integrations.gunicorn": {"gunicorn"},
    "penstock.integrations.sqlalchemy": {"sqlalchemy"},
    "penstock.integrations.django": {"django"},
    "pytest_penstock.plugin": {"pytest"},
    "penstock.observe.prometheus": {"prometheus_client"},
    "penstock.observe.otel": {"opentelemetry"},
}  # fmt: skip


class Import(NamedTuple):
    """One import of one name, as an absolute dotted name."""

    name: str
    line: int
    at_top: bool  # runs when the module is imported
    for_types: bool  # under `if TYPE_CHECKING`


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "penstock").rglob("*.py"))}


def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(walk(tree.body, package, at_top=True, for_types=False))


def walk(nodes: list[ast.stmt], package: str, *, at_top: bool, for_types: bool) -> Iterator[Import]:
    for node in nodes:
        for name in names_in(node, package):
            yield Import(name, node.lineno, at_top, for_types)
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        typed = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(node, field, [])
            if isinstance(inner, list):
                only_types = for_types or (typed and field == "body")
                yield from walk(inner, package, at_top=at_top and not lazy, for_types=only_types)
        for handler in getattr(node, "handlers", []):
            yield from walk(handler.body, package, at_top=at_top, for_types=for_types)


def names_in(node: ast.stmt, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        up = ".".join(parts[: len(parts) - node.level + 1])
        base = f"{up}.{base}" if base else up
    # `from penstock._process import fork` imports a module, `from penstock._process.fork import page` a name in one
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else base for name in names]


def folder(module: str) -> str:
    """The longest folder of the table that a module is in; a tool's own name."""
    parts = module.split(".")[1:]
    if parts[:1] and parts[0] in TOOLS:
        return parts[0]
    names = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next(name for name in names if name in MAY_IMPORT)


def of_penstock(imports: list[Import]) -> list[Import]:
    return [found for found in imports if found.name.split(".")[0] == "penstock"]


def may_import(module: str, other: str) -> bool:
    own, its = folder(module), folder(other)
    if own == its or own in TOOLS:
        return True
    allowed = MAY_IMPORT[own].split()
    return its in allowed or other.removeprefix("penstock.") in allowed


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_what_the_table_allows(module: str) -> None:
    parts = module.split(".")[1:]
    assert not parts or folder(module), f"{module} is in no folder of the table: give it a line"
    wrong = [
        f"{module}:{found.line} imports {found.name}"
        for found in of_penstock(imports_of(module))
        if not may_import(module, found.name)
    ]
    assert not wrong


@pytest.mark.parametrize("module", [m for m in MODULES if folder(m) == "_machine"])
def test_the_machine_is_pure(module: str) -> None:
    wrong = [
        found
        for found in imports_of(module)
        if found.name not in MACHINE_MAY_IMPORT and not found.name.startswith("penstock._machine")
    ]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_needed(module: str) -> None:
    allowed = {
        package
        for prefix, packages in OPTIONAL.items()
        if module.startswith(prefix)
        for package in packages
    }
    wrong = [
        f"{module}:{found.line} imports {found.name}"
        for found in imports_of(module)
        if found.at_top
        and not found.for_types
        and (root := found.name.split(".")[0]) not in sys.stdlib_module_names
        and root not in {"penstock", *allowed}
    ]
    assert not wrong


def test_no_two_modules_import_each_other_not_even_for_types() -> None:
    needs = {
        module: {
            found.name
            for found in of_penstock(imports_of(module))
            if found.name not in {"penstock", module}
        }
        for module in MODULES
    }
    while ready := {module for module, needed in needs.items() if not needed & needs.keys()}:
        needs = {module: needed for module, needed in needs.items() if module not in ready}
    assert not needs, f"a circle of imports among {sorted(needs)}"


def test_no_two_folders_of_the_table_import_each_other() -> None:
    needs = {
        each: {folder(f"penstock.{name}") for name in MAY_IMPORT[each].split()}
        for each in MAY_IMPORT
    }
    for each in ("_drivers.psycopg3", "_drivers.psycopg2"):
        needs["_drivers"].discard(each)  # `_drivers` finds a driver by its name, at first use
    while ready := {each for each, needed in needs.items() if not needed & needs.keys()}:
        needs = {each: needed for each, needed in needs.items() if each not in ready}
    assert not needs


def test_the_test_sees_imports_wherever_they_stand() -> None:
    """A checker that sees nothing would be green for ever."""
    source = (
        "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "try:\n    import d\nexcept E:\n    import e\n"
        "class C:\n    def f(self):\n        from . import g\n"
    )
    found = list(walk(ast.parse(source).body, "penstock.cli", at_top=True, for_types=False))
    assert [(i.name, i.at_top, i.for_types) for i in found] == [
        ("a", True, False),
        ("b", True, True),
        ("c", True, False),
        ("d", True, False),
        ("e", True, False),
        ("penstock.cli", False, False),
    ]
    assert names_in(ast.parse("from penstock._process import fork").body[0], "penstock") == [
        "penstock._process.fork"
    ]


DRIVERS = "psycopg psycopg2 asyncpg flask gunicorn gevent sqlalchemy django"


def test_importing_penstock_imports_no_driver_and_no_framework() -> None:
    script = (
        "import sys, penstock\n"
        f"print(sorted(set({DRIVERS.split()!r}) & sys.modules.keys()), "
        "any(m.startswith('penstock.cli') for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[] False\n", "")


@pytest.mark.parametrize(
    "module", ["errors", "config.pool_config", "_process.watch", "_process.fork"]
)
def test_these_modules_import_where_the_system_has_nothing(module: str) -> None:
    """Windows and macOS in short: no fork hook, no epoll, no eventfd, no madvise, no private maps."""
    script = (
        "import mmap, os, select, sys\n"
        "sys.platform = 'win32'\n"
        "for place, names in ((os, 'register_at_fork fork eventfd'), (select, 'epoll poll'),"
        " (mmap, 'MAP_PRIVATE MAP_ANONYMOUS MAP_ANON')):\n"
        "    for name in names.split():\n"
        "        if hasattr(place, name): delattr(place, name)\n"
        f"import penstock.{module}\n"
        "from penstock._process import fork, watch\n"
        "watcher = watch.Watch(print)\n"
        "fork.install()\n"
        "print(watch.available(), watcher.add(0, 'x'), watcher.stop(), fork.page[0] != 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False 0 True True\n", "")


def test_the_table_refuses_what_it_does_not_allow() -> None:
    assert may_import("penstock._pool.aio.pool", "penstock._machine.slot")
    assert not may_import("penstock._pool.aio.pool", "penstock._pool.sync.pool")
    assert not may_import("penstock._machine.slot", "penstock.errors")
    assert not may_import("penstock._drivers.psycopg2.link", "penstock._drivers.psycopg3.link")
    assert not may_import("penstock.pools", "penstock.testing.fakes")
