"""Environments of a test's own, with other versions of libraries than the tests' own has.

Its one job: make one, fast. The tests' pip installs into it, which saves it a pip of its own; nothing is
compiled but what is imported. It must not know: what is tested there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

#: What pip says where there is no index, or none that has these for this interpreter.
NO_INDEX = re.compile("No matching distribution|Could not find a version|connection broken|Errno")


def python_with(folder: Path, *wanted: str) -> Path:
    """An interpreter that has these; the test is skipped where there is no package index that has them."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "--quiet",
    ]
    command = [*map(str, pip), "install", "--no-compile", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and NO_INDEX.search(done.stderr):
        pytest.skip(f"needs a package index that has {', '.join(wanted)}")
    assert not done.returncode, done.stderr
    return python
