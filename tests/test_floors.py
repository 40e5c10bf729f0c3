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

# Every module, or the package it is in, by floor; a module imports from its own floor or below.
FLOORS = (
    {"_machine", "_process", "errors", "drivers"},
    {"_drivers", "config", "conninfo"},
    {"_pool", "pools"},
    {"integrations", "compat", "observe"},
    {""},  # penstock/__init__.py: the public names, nothing else
    {"testing", "launcher", "_supervisor"},
    {"cli", "__main__"},
)

# Packages that are nobody's on the way up: they serve the command line and tests only.
TOOLS = {"testing", "launcher", "_supervisor"}

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
    "penstock.testing.plugin": {"pytest"},
    "penstock.observe.prometheus": {"prometheus_client"},
    "penstock.observe.otel": {"opentelemetry"},
    # the demo extra, which the command line asks for before it imports these
    "penstock.cli": {"click", "flask", "gunicorn", "httpx", "psycopg", "psycopg2", "psycopg_pool", "rich", "werkzeug"},
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


def part(module: str) -> str:
    return [*module.split("."), ""][1]


def floor(module: str) -> int:
    return next((n for n, parts in enumerate(FLOORS) if part(module) in parts), -1)


def of_penstock(imports: list[Import]) -> list[Import]:
    return [found for found in imports if found.name.split(".")[0] == "penstock"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_floor_and_imports_point_down(module: str) -> None:
    assert floor(module) >= 0, f"{module} has no floor: give it one in {Path(__file__).name}"
    wrong = [
        f"{module}:{found.line} imports {found.name}"
        for found in of_penstock(imports_of(module))
        if floor(found.name) > floor(module)
    ]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_tools_are_used_by_the_command_line_and_tests_only(module: str) -> None:
    if part(module) in TOOLS | FLOORS[-1]:
        return
    wrong = [found for found in of_penstock(imports_of(module)) if part(found.name) in TOOLS]
    assert not wrong


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "_machine"])
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


def test_no_two_modules_import_each_other() -> None:
    needs = {
        module: {
            found.name
            for found in of_penstock(imports_of(module))
            if found.at_top and not found.for_types and found.name not in {"penstock", module}
        }
        for module in MODULES
    }
    while ready := {module for module, needed in needs.items() if not needed & needs.keys()}:
        needs = {module: needed for module, needed in needs.items() if module not in ready}
    assert not needs, f"a circle of imports among {sorted(needs)}"


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
