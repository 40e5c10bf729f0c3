"""A planted fault: what is wrong, where, and which tests must notice. Read from the *.toml beside.

Its one job: load the list, and say what is wrong with an entry before anything is run. It must not
know: how tests are run, how the list is shown.
"""

from __future__ import annotations

import ast
import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

#: Seconds for the tests of one fault, in all: the price of one that makes them hang.
PATIENCE = 90


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One edit of the pool's code.

    Attributes:
        part: the file that it stands in, "machine" say.
        name: what is wrong with the pool then, as a sentence.
        file: below src/penstock.
        old: the text that is replaced; it occurs exactly once.
        new: what stands there instead.
        tests: pytest's node ids. Each must notice; one without [parameters] notices if any of its
            cases does.
        why: what its users would see, where the name does not say it.
    """

    part: str
    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    why: str = ""

    def path(self, sources: Path) -> Path:
        return sources / "penstock" / self.file


def parts() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load() -> list[Fault]:
    """All faults, part by part, in the order of their files."""
    found = []
    for part in parts():
        entries = tomllib.loads((HERE / f"{part}.toml").read_text(encoding="utf-8"))
        found += [Fault(part=part, **entry) for entry in entries["fault"]]
    return found


def does_not_apply(fault: Fault, root: Path = ROOT) -> str:
    """Why this fault can be planted no more; nothing if it can."""
    path = fault.path(root / "src")
    if not path.is_file():
        return f"there is no file {fault.file}"
    times = path.read_text(encoding="utf-8").count(fault.old)
    if times != 1:
        return f"the old text occurs {times} times in {fault.file}"
    if fault.new == fault.old:
        return "the new text is the old one"
    missing = [test for test in fault.tests if not exists(test, root)]
    if missing or not fault.tests:
        return f"there is no test {', '.join(missing)}"
    return ""


def exists(test: str, root: Path = ROOT) -> bool:
    """Whether the file has a function of this name; its parameters are seen when it is run."""
    file, _, rest = test.partition("::")
    return rest.partition("[")[0].split("::")[-1] in _functions(root / file)


@functools.cache
def _functions(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
