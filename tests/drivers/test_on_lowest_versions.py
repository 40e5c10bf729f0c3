"""Every option of a pool, on every runtime and driver, over the oldest libraries that pyproject.toml allows.

In an environment of its own, which is made here and thrown away.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.old_libraries import python_with

from penstock._drivers.asyncpg import private as asyncpg_private
from penstock._drivers.psycopg2 import private as psycopg2_private
from penstock._drivers.psycopg3 import private as psycopg3_private

if TYPE_CHECKING:
    from pytest_penstock.postgres import Server

ROOT = Path(__file__).parents[2]
WANTED = [
    f"psycopg[binary]=={psycopg3_private.LIBRARY.least}",
    f"psycopg2-binary=={psycopg2_private.LIBRARY.least}",
    f"asyncpg=={asyncpg_private.LIBRARY.least}",
    "gevent==23.9.*",
]
PROGRAM = Path(__file__).with_name("every_option.py")


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the oldest libraries."""
    folder = tmp_path_factory.mktemp("lowest")
    return python_with(folder, "--only-binary=:all:", *WANTED)


@pytest.mark.parametrize("runtime", ["threads", "gevent", "asyncio"])
def test_every_option_works(python: Path, server: Server, runtime: str) -> None:
    done = run(python, PROGRAM, runtime, server.conninfo(over="tcp"))
    assert done.stdout == "fine\n", done.stdout + done.stderr


@pytest.mark.parametrize("runtime", ["threads", "gevent", "asyncio"])
def test_every_option_works_with_the_libraries_of_today(server: Server, runtime: str) -> None:
    done = run(sys.executable, PROGRAM, runtime, server.conninfo(over="tcp"))
    assert done.stdout == "fine\n", done.stdout + done.stderr
