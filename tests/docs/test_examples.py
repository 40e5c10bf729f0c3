"""What README and docs show is what happens: each fenced Python block is run on a real PostgreSQL.

The blocks of one page share a namespace, as a reader would type them. A ```text block that directly
follows a ```python block is what that one prints; figures may differ. ```console blocks name targets
of the Makefile, ```sql is run by the superuser. A ```toml or ```ini block that begins with a comment
of a file's name is that file.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import linecache
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from flask import Flask

import penstock
from penstock import ConnectionPool, PoolConfig, Pools
from penstock.errors.next_steps import _STEPS
from tests.docs.pages import PAGES, ROOT, blocks, headings, links, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_penstock.postgres import Server

LANGUAGES = {"diff", "python", "sql", "text", "console", "mermaid", "toml", "ini"}
FILE_NAME = re.compile(r"[#;] (?P<name>\w+\.(?:toml|ini|py))\n")
PLACEHOLDER = re.compile(r"postgresql://app@db/(\w+)")
TABLES = """
    alter role app reset all;
    alter role app connection limit -1;
    drop table if exists orders;
    create table orders (id int primary key, state text not null, total numeric not null);
    insert into orders values (1, 'new', 10), (2, 'sent', 20), (42, 'new', 30);
"""

with_python = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture(scope="module")
def shop(server: Server) -> Iterator[Server]:
    """The shared server, with the database that the examples talk about."""
    server.execute("create role app login")
    server.execute("create database shop owner app")
    yield server
    server.execute("drop database shop with (force)")
    server.execute("drop role app")


@pytest.fixture
def tables(shop: Server) -> Server:
    for statement in [*filter(str.strip, TABLES.split(";")), "grant all on orders to app"]:
        shop.execute(statement, dbname="shop")
    return shop


def with_real_dsn(text: str, server: Server) -> str:
    return PLACEHOLDER.sub(lambda m: server.conninfo(user="app", dbname=m[1], over="tcp"), text)


def same_but_for_figures(text: str) -> str:
    """Numbers are as they come, lines are broken where the page is narrow."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", text).replace("attempts", "attempt").split())


def run_page(page: Path, server: Server) -> list[tuple[int, str, str]]:
    """Run a page's blocks; answers (line, shown, printed) for each output that is shown."""
    namespace: dict[str, Any] = {"__name__": "example"}
    shown, printed = [], ""
    environment = dict(os.environ)
    try:
        for block in blocks(page):
            named = FILE_NAME.match(block.text)
            if named is not None:
                text = with_real_dsn(block.text, server)
                Path(named["name"]).write_text(text, encoding="utf-8")
            if block.language == "python":
                source = "\n" * (block.line - 1) + with_real_dsn(block.text, server)
                output, name = io.StringIO(), name_of(page)
                # As a reader's file has it: the pool reads which `with` a borrower is in.
                linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
                with contextlib.redirect_stdout(output):
                    exec(compile(source, name, "exec"), namespace)
                printed = output.getvalue()
            elif block.language == "sql":
                for statement in filter(str.strip, block.text.split(";")):
                    server.execute(statement, dbname="shop")
            elif block.language == "text" and block.follows:
                shown.append((block.line, block.text, printed))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        close_pools(namespace)
    return shown


def close_pools(namespace: dict[str, Any]) -> None:
    """Those in the page's variables, and those of its Flask apps."""
    for one in namespace.values():
        if isinstance(one, (ConnectionPool, Pools)):
            one.close()
        elif isinstance(one, Flask) and "penstock" in one.extensions:
            one.extensions["penstock"].close()


@pytest.mark.parametrize("page", with_python, ids=name_of)
def test_every_example_runs_and_prints_what_the_page_shows(page, tables, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # a block may import the file that another one is
    for cls in (psycopg.Connection, psycopg.AsyncConnection):  # a tracer puts back something else
        monkeypatch.setattr(cls, "connect", vars(cls)["connect"])
    for line, shown, printed in run_page(page, tables):
        assert same_but_for_figures(printed) == same_but_for_figures(shown), (
            f"{name_of(page)}:{line} shows another output than is printed:\n{printed}"
        )


@every_page
def test_every_fenced_block_says_what_it_is(page):
    unknown = [(b.line, b.language) for b in blocks(page) if b.language not in LANGUAGES]
    assert not unknown, f"{name_of(page)}: these blocks are not tested: {unknown}"


@every_page
def test_every_make_target_that_is_named_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    console = "\n".join(b.text for b in blocks(page) if b.language == "console")
    inline = page.read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z]+)", console, re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z]+)", inline))
    assert named <= targets


def test_the_readme_names_the_two_commands_of_a_newcomer():
    commands = [b.text for b in blocks(ROOT / "README.md") if b.language == "console"]
    assert "make demo\nmake test\n" in commands


@every_page
def test_every_relative_link_leads_somewhere(page):
    local = [link for link in links(page) if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not heading or heading in headings(target))


@every_page
def test_every_extra_that_is_named_exists(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.findall(r"'(?:penstock|\.)\[([\w,-]+)\]'", page.read_text(encoding="utf-8"))
    named = {extra for each in found for extra in each.split(",")}
    assert named <= set(project["optional-dependencies"])


@every_page
def test_no_page_names_a_place_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?<![\w.])/(?:home|work|root|tmp|Users|usr|opt|var)/\S*", text)
    assert not found


# -- the Flask recipe, as it is deployed ----------------------------------------------------------


@pytest.mark.parametrize("preload", [False, True], ids=["each worker loads", "preload"])
def test_the_flask_recipe_serves_under_gunicorn(preload, tables):
    """With --preload the pool is used in the master, too, before the fork."""
    recipe = next(b for b in blocks(ROOT / "README.md") if b.text.startswith("# wsgi.py\n"))
    source = with_real_dsn(recipe.text, tables)
    if preload:
        source += "\nwith app.app_context():\n    db.execute('select 1')\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "wsgi.py").write_text(source, encoding="utf-8")
        with gunicorn(folder, *["--preload"] * preload) as client:
            answers = [client.get(f"/orders/{n}").json() for n in (1, 2, 42, 7) * 5]
            healthy = client.get("/healthz")
    wanted = [{"state": "new"}, {"state": "sent"}, {"state": "new"}, {"error": "no such order"}]
    assert answers == wanted * 5
    assert healthy.status_code == 200, healthy.text


@contextlib.contextmanager
def gunicorn(folder: str, *options: str) -> Iterator[Any]:
    import httpx

    path = f"{folder}/socket"
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "4"]
    command += ["--bind", f"unix:{path}", "--chdir", folder, *options, "wsgi:app"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until_it_listens(path, process)
            transport = httpx.HTTPTransport(uds=path)
            with httpx.Client(transport=transport, base_url="http://shop", timeout=30) as client:
                yield client
        finally:
            process.terminate()
            process.communicate(timeout=30)


def wait_until_it_listens(path: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(path) == 0:
                return
        time.sleep(0.02)  # nobody says when it listens
    process.terminate()
    pytest.fail(f"gunicorn does not listen: {process.communicate()[1]}")


# -- tables that say what the code says ------------------------------------------------------------


def rows(page: str) -> list[list[str]]:
    """The cells of every table of a page, without heads."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    return [row for row in cells if row[0].startswith("`")]


def test_the_option_table_lists_every_option_with_its_default():
    listed = {
        row[0].strip("`"): ast.literal_eval(row[2].strip("`")) for row in rows("docs/options.md")
    }
    assert listed == {field.name: field.default for field in dataclasses.fields(PoolConfig)}


def test_the_error_page_lists_every_next_step_by_its_code():
    listed = {row[0].strip("`"): row[1] for row in rows("docs/errors/server-unavailable.md")}
    assert listed == _STEPS


# -- a page per error --------------------------------------------------------------------------------

ERRORS = [
    one
    for name in penstock.__all__
    if isinstance(one := getattr(penstock, name), type)
    and issubclass(one, Exception)
    and one is not penstock.PenstockError
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda one: one.__name__)
def test_each_error_has_a_page_and_its_text_ends_with_the_pages_name(error):
    page = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", error.__name__).lower()
    page = f"docs/errors/{page}.md"
    assert str(error()).splitlines()[-1] == f"  help: penstock's {page}"
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.startswith(f"# {error.__name__}\n")
    printed = [b.text for b in blocks(ROOT / page) if b.language == "text" and b.follows]
    assert any(f"help: penstock's {page}" in one for one in printed)
    index = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert f"(errors/{Path(page).name})" in index


def test_an_error_of_no_class_names_the_page_of_all():
    assert str(penstock.PenstockError()).endswith("\n  help: penstock's docs/errors.md")
    assert repr(penstock.PoolClosed(pool="shop")) == "<PoolClosed: pool 'shop' is not open.>"


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    index += (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    faults = (ROOT / "docs/faults/README.md").read_text(encoding="utf-8")
    index += faults.replace("](", "](faults/")  # an index of its own folder
    pages = {one.relative_to(ROOT / "docs").as_posix() for one in (ROOT / "docs").rglob("*.md")}
    assert pages - set(re.findall(r"\]\(([^)#]+)", index)) == {"README.md"}
