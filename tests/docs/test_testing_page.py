"""docs/testing.md: its files are somebody's project, and its tests pass in a pytest of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.docs.pages import ROOT, blocks
from tests.docs.test_examples import shop, tables, with_real_dsn
from tests.forks import PATIENCE

__all__ = ["shop", "tables"]  # fixtures

PAGE = ROOT / "docs/testing.md"
FILE = re.compile(r"# (\w+\.py)\n")


def test_the_files_of_the_page_are_a_project_whose_tests_pass(tables, tmp_path):
    written = []
    for block in blocks(PAGE):
        if block.language == "python" and (name := FILE.match(block.text)):
            written.append(name[1])
            (tmp_path / name[1]).write_text(with_real_dsn(block.text, tables), encoding="utf-8")
    assert written == ["conftest.py", "test_orders.py", "shop.py", "test_shop.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={**os.environ, "PENSTOCK_TEST_URL": tables.conninfo(over="tcp")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "4 passed" in done.stdout, done.stdout
