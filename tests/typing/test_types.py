"""The public types, checked as users' tools do: by mypy and pyright, strictly.

The files beside this one are read by them and never run.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.config.pool_config import OPTIONS, AsyncOptions, Options

HERE = Path(__file__).parent
FILES = [str(HERE / name) for name in ("as_users_write.py", "as_users_should_not.py")]


def check(checker: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed here; `make lint` runs it")
    command = [sys.executable, "-m", checker, *arguments, *FILES]
    return subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


def test_mypy_sees_what_users_mean_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    done = check("mypy", "--strict", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_does_too() -> None:
    done = check("pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_typed_options_are_all_options_but_the_three_that_are_parameters() -> None:
    parameters = {"conninfo", "connection_class", "driver"}
    for options in (Options, AsyncOptions):
        assert {*options.__annotations__} | parameters == set(OPTIONS)
