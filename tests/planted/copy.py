"""A copy of the checkout in a temporary folder: faults are planted there, and tests run there.

Its one job: make the copy, plant and undo in it, and run pytest on it within a time. The whole
checkout is copied, not `src` alone: tests start children with the path of their own root. It must not
know: the list of faults, what counts as noticed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.planted.fault import HERE, PATIENCE, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.planted.fault import Fault

_COPIED = ("src", "tests", "examples", "docs", "conftest.py", "pyproject.toml", "README.md")
#: Random schedules are the same in each run, so that what was noticed once is noticed again.
_SEED = "5"


@dataclass
class Outcome:
    """What a run of some tests showed.

    Attributes:
        ran: the tests' node ids.
        failed: node id and last line.
        ended: how pytest ended, where it did not as it should; "" if it did.
    """

    ran: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    ended: str = ""


class Copy:
    """One copy; `root` is removed by whoever made it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, root / name)
        shutil.copy(HERE / "only_this_copy.py", root / "src" / "sitecustomize.py")

    @contextlib.contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = fault.path(self.root / "src")
        right = path.read_text(encoding="utf-8")
        self._write(path, right.replace(fault.old, fault.new))
        try:
            yield
        finally:
            self._write(path, right)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Compiled files are told apart by size and second: both may be those of the former text.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def names(self, files: list[str]) -> set[str]:
        """The node ids of all tests in these files."""
        output, _ = self._pytest(["--collect-only", *files], PATIENCE)
        return {line for line in output.splitlines() if "::" in line}

    def run(self, tests: list[str], seconds: float, *, until_one_fails: bool = False) -> Outcome:
        """Run these tests on the copy; what still runs after `seconds` is killed."""
        told = self.root / "told.json"
        told.unlink(missing_ok=True)
        stop = ["-x"] if until_one_fails else []
        output, code = self._pytest(["-p", "tests.planted.told", *stop, *tests], seconds)
        ended = ""
        if code is None:
            ended = f"no end within {seconds:g} s, and no limit of the tests' own"
        elif code not in {0, 1}:
            ended = f"pytest ended with {code}: {_last(output)}"
        return self._outcome(told, ended)

    def _pytest(self, arguments: list[str], seconds: float) -> tuple[str, int | None]:
        """What pytest printed, and its exit status; None if it had to be killed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=self.root,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(self.root / "src"), str(self.root)]),
                "PENSTOCK_PLANTED": str(self.root / "told.json"),
                "PENSTOCK_SEED": _SEED,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "", None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # children that a fault left behind, too
            process.wait()
        return output, process.returncode

    def _outcome(self, told: Path, ended: str) -> Outcome:
        if not told.exists():
            return Outcome(ended=ended or "no test ran")
        found = json.loads(told.read_text(encoding="utf-8"))
        assert Path(found["penstock"]).is_relative_to(self.root), "not the copy was imported"
        failed = {name: why.replace(str(self.root), "") for name, why in found["failed"].items()}
        return Outcome(ran=found["ran"], failed=failed, ended=ended)


def _last(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
