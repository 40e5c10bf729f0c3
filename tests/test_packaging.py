"""What is shipped: the wheel, the source archive, and an import that needs nothing.

Archives are made by the build backend itself, in a subprocess.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
# The demo's bank: in the checkout it is an example, in the wheel a part of the demo.
BANK = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples/bank/bank").rglob("*.py")}


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The archives by their suffix."""
    pytest.importorskip("hatchling", reason="needs the build backend")
    folder = tmp_path_factory.mktemp("dist")
    done = run("-m", "hatchling", "build", "-d", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in folder.iterdir()}


def test_the_wheel_has_every_module_the_types_marker_and_the_license(built):
    names = set(zipfile.ZipFile(built[".whl"]).namelist())
    example = {name.replace("examples/bank/", "penstock/cli/_example/") for name in BANK}
    assert {name for name in names if name.endswith(".py")} == SOURCES | example
    assert "penstock/cli/_example/bank/openapi.yaml" in names
    assert "penstock/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entries = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"penstock = penstock.cli:main" in zipfile.ZipFile(built[".whl"]).read(entries)


def test_the_demo_of_an_installed_wheel_has_its_bank(built, tmp_path):
    zipfile.ZipFile(built[".whl"]).extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import penstock.cli.example as example; "
    done = run("-I", "-c", code + "print(example.folder_of_the_bank())")
    assert done.stdout.strip() == str(tmp_path / "penstock/cli/_example"), done.stderr
    assert (tmp_path / "penstock/cli/_example/bank/asgi.py").is_file()
    assert (tmp_path / "penstock/cli/status.html").is_file()


def test_the_wheel_needs_no_other_package_and_any_python_from_3_11(built):
    wheel = zipfile.ZipFile(built[".whl"])
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed == []
    assert "Requires-Python: >=3.11" in lines


def test_the_source_archive_has_what_it_takes_to_run_the_tests(built):
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in SOURCES} | BANK <= names
    wanted = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "conftest.py"}
    wanted |= {"pyproject.toml", "docs/options.md", "tests/conftest.py", "bench/hot_path.py"}
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


# -- without a driver ------------------------------------------------------------------------------

NO_DRIVER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"psycopg", "psycopg2", "asyncpg"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import penstock
"""


def test_importing_needs_no_driver_and_no_package_at_all():
    # -S: no site-packages; -I: nothing from the environment
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import penstock"
    done = run("-I", "-S", "-c", code)
    assert done.returncode == 0, done.stderr


def test_importing_imports_no_driver_that_is_there_nor_what_gevent_patches():
    drivers = "{'psycopg', 'psycopg2', 'asyncpg', 'gevent', 'asyncio', 'ssl'}"
    done = run("-c", f"import sys, penstock; assert not {drivers} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_pool_without_its_driver_names_the_extra_to_install():
    code = NO_DRIVER + "penstock.ConnectionPool('postgresql://app@db/shop')"
    done = run("-c", code)
    said, page = done.stderr.strip().splitlines()[-2:]
    assert done.returncode == 1
    assert "DriverNotFoundError" in said
    assert said.endswith("next step: pip install 'penstock[psycopg-binary]'")
    assert page == "  help: penstock's docs/errors/driver-not-found-error.md"


def test_a_driver_that_does_not_exist_is_told_from_one_that_is_not_installed():
    done = run("-c", NO_DRIVER + "penstock.ConnectionPool(driver='oracle')")
    assert "no driver 'oracle' for ConnectionPool; there is: psycopg, psycopg2" in done.stderr
