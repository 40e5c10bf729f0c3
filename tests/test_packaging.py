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
BANK = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples/bank/bank").rglob("*.py")}


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


PLUGIN = ROOT / "pytest-penstock"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The archives of penstock by their suffix."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> dict[str, Path]:
    """The archives of pytest-penstock by their suffix."""
    return build(PLUGIN, tmp_path_factory.mktemp("plugin"))


def build(project: Path, folder: Path) -> dict[str, Path]:
    pytest.importorskip("hatchling", reason="needs the build backend")
    done = run("-m", "hatchling", "build", "-d", str(folder), cwd=project)
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in folder.iterdir()}


def names_in_wheel(wheel: Path) -> set[str]:
    """What is in it, apart from what every wheel says of itself."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def names_in_sdist(archive: Path) -> set[str]:
    with tarfile.open(archive) as opened:
        return {each.name.partition("/")[2] for each in opened.getmembers() if each.isfile()}


def test_the_wheel_has_every_module_and_the_types_marker_and_nothing_else(built):
    assert names_in_wheel(built[".whl"]) == SOURCES | {"penstock/py.typed"}
    about = {Path(name).name for name in zipfile.ZipFile(built[".whl"]).namelist()}
    assert "LICENSE" in about
    assert "entry_points.txt" not in about


def test_the_plugins_archives_have_its_modules_and_nothing_else(plugin):
    source = PLUGIN / "src"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    modules.add("pytest_penstock/py.typed")
    assert names_in_wheel(plugin[".whl"]) == modules
    tests = {path.relative_to(PLUGIN).as_posix() for path in PLUGIN.glob("tests/*.py")}
    about = {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert tests
    assert names_in_sdist(plugin[".gz"]) - about == tests | {f"src/{name}" for name in modules}
    wheel = zipfile.ZipFile(plugin[".whl"])
    entries = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"[pytest11]\npytest_penstock.plugin = pytest_penstock.plugin" in wheel.read(entries)
    version = run("-m", "hatchling", "version", cwd=ROOT).stdout.strip()
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    assert f"Version: {version}" in lines
    assert f"Requires-Dist: penstock=={version}" in lines


def test_the_wheel_needs_no_other_package_and_any_python_from_3_11(built):
    wheel = zipfile.ZipFile(built[".whl"])
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed == []
    assert "Requires-Python: >=3.11" in lines


def test_the_source_archive_has_what_it_takes_to_run_the_tests(built):
    names = names_in_sdist(built[".gz"])
    assert {f"src/{name}" for name in SOURCES} | BANK <= names
    wanted = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "conftest.py"}
    wanted |= {"pyproject.toml", "docs/options.md", "tests/conftest.py", "bench/hot_path.py"}
    wanted |= {"demo/__main__.py", "demo/status.html", "pytest-penstock/pyproject.toml"}
    assert wanted <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"src", "pytest-penstock", "demo", "tests", "bench", "docs", "examples"}
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
