"""The other tests of this folder once more, on the oldest Flask that the extension works with.

In an environment of its own, which is made here and thrown away: Flask 2.2 is what Connexion 2.14 needs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.old_libraries import python_with

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
WANTED = ["flask[async]==2.2.*", "werkzeug==2.2.*", "psycopg[binary]", "psycopg2-binary", "pytest"]


def run(*command, **environment):
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def python(tmp_path):
    """An interpreter with an old Flask."""
    return python_with(tmp_path / "old", *WANTED)


def test_every_test_of_this_folder_passes_on_flask_2_2(python, server):
    version = "import importlib.metadata as m; print(m.version('flask'), m.version('werkzeug'))"
    flask, werkzeug = run(python, "-c", version).stdout.split()
    assert flask.startswith("2.2.") and werkzeug.startswith("2.2.")
    done = run(
        *(python, "-W", "default", "-m", "pytest", HERE, "-q"),
        # Warnings are errors in this project, but Werkzeug 2.2 causes some on a Python that is newer.
        *("-p", "no:cacheprovider", "-W", "default", "--ignore", __file__),
        PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT / "pytest-penstock/src"))),
        PENSTOCK_PG_BIN=str(server.binaries.path),
    )
    assert done.returncode == 0, done.stdout[-8000:]
    said = re.search(r"(\d+) passed", done.stdout)
    assert said and int(said[1]) > 150, done.stdout
    assert " skipped" not in done.stdout, done.stdout
    print(sys.version.split()[0], flask, werkzeug, said[0])
