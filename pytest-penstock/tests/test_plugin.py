"""The fixtures as users have them: in a pytest of their own, which knows nothing of this one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_penstock.postgres import Server

PATIENCE = 60.0  # seconds until a test gives up; never a pass mark

CONFTEST = """
import psycopg, pytest
pytest_plugins = ["pytest_penstock.plugin"]

@pytest.fixture(scope="session")
def penstock_schema(penstock_url):
    with psycopg.connect(penstock_url) as conn:
        conn.execute("create table orders (id int primary key, state text)")
        conn.execute("insert into orders values (1, 'new')")
"""

TWO_TESTS = """
import pytest

@pytest.mark.parametrize("turn", [1, 2])
def test_an_order(penstock_pool, turn):
    penstock_pool.execute("insert into orders values (2, 'mine')")
    with penstock_pool.connection() as conn:
        conn.execute("update orders set state = 'paid'")
    assert penstock_pool.execute("select * from orders order by id").fetchall() == [
        (1, "paid"), (2, "paid")
    ]
"""


@pytest.fixture
def given_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    conninfo = server.conninfo(over="tcp")
    monkeypatch.setenv("PENSTOCK_TEST_URL", conninfo)
    return conninfo


class Project:
    """A folder with tests of somebody else's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text, encoding="utf-8")

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
        return subprocess.Popen(
            [*command, "--rootdir", str(self.folder), *options, str(self.folder)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options: str, **environment: str) -> str:
        return output_of(self.start(*options, **environment))


def output_of(process: subprocess.Popen[str]) -> str:
    with process:
        return process.communicate(timeout=PATIENCE)[0]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def databases(server: Server) -> list[str]:
    rows = server.execute("select datname from pg_database where datname like 'penstock_test_%'")
    return [name for (name,) in rows]


def test_each_test_has_the_schema_and_nothing_of_another(project, given_server, server):
    project.write(conftest=CONFTEST, test_orders=TWO_TESTS)
    assert "2 passed" in project.run()
    assert databases(server) == []


def test_without_a_server_a_temporary_one_is_started(project, monkeypatch):
    monkeypatch.delenv("PENSTOCK_TEST_URL", raising=False)
    project.write(conftest=CONFTEST, test_orders=TWO_TESTS)
    assert "2 passed" in project.run()


def test_the_ini_file_may_name_the_server(project, server, monkeypatch):
    monkeypatch.delenv("PENSTOCK_TEST_URL", raising=False)
    project.write(
        conftest=CONFTEST,
        test_where=f"def test_where(penstock_server):\n    assert {server.port!r} == "
        "int(penstock_server.partition('port=')[2].partition(' ')[0].strip(\"'\"))\n",
    )
    words = server.conninfo(over="tcp")
    (project.folder / "pytest.ini").write_text(f"[pytest]\npenstock_test_url = {words}\n")
    assert "1 passed" in project.run()


def test_two_workers_at_a_time_do_not_meet(project, given_server, server):
    """What pytest-xdist does: one process per worker, which says who it is."""
    project.write(conftest=CONFTEST, test_orders=TWO_TESTS)
    started = [project.start(PYTEST_XDIST_WORKER=f"gw{number}") for number in range(2)]
    assert ["2 passed" in output_of(each) for each in started] == [True, True]
    assert databases(server) == []


def test_a_database_is_called_after_its_worker(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    script = "from pytest_penstock.plugin import database_name; print(database_name())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("penstock_test_gw3_")


def test_a_test_that_fails_leaves_nothing_and_the_database_is_dropped(
    project, given_server, server
):
    project.write(
        conftest=CONFTEST,
        test_orders="""
def test_it_fails(penstock_pool):
    leaked = penstock_pool.getconn(timeout=1)
    leaked.execute("insert into orders values (2, 'mine')")
    leaked.commit()
    assert False

def test_it_sees_nothing(penstock_pool):
    assert len(penstock_pool.execute("select * from orders").fetchall()) == 1
""",
    )
    assert "1 failed, 1 passed" in project.run("-W", "ignore")
    assert databases(server) == []


FLASK_APP = """
from flask import Flask, request
from penstock import ConnectionPool

pool = ConnectionPool("", name="shop")  # the address is in the environment: PGHOST, PGDATABASE ...
app = Flask(__name__)

@app.post("/orders/<int:number>")
def add(number):
    with pool.connection() as conn:
        conn.execute("insert into orders values (%s, 'new')", (number,))
        if "fail" in request.args:
            raise ValueError
    return {}

@app.get("/orders")
def count():
    return {"orders": pool.execute("select count(*) from orders").fetchone()[0]}
"""

FLASK_TESTS = """
import pytest
from shop import app, pool

@pytest.fixture(autouse=True)
def nothing_stays(penstock_undone):
    penstock_undone(pool)

@pytest.fixture
def client():
    return app.test_client()

@pytest.mark.parametrize("turn", [1, 2])
def test_an_order_is_counted(client, turn):
    assert client.post("/orders/2").status_code == 200
    assert client.post("/orders/3?fail").status_code == 500
    assert client.post("/orders/2").status_code == 500
    assert client.get("/orders").json == {"orders": 2}

def test_the_test_may_hold_a_connection(client):
    with pool.connection() as conn:
        conn.execute("insert into orders values (5, 'mine')")
        assert client.get("/orders").json == {"orders": 2}
        client.post("/orders/6")
        assert conn.execute("select count(*) from orders").fetchone() == (3,)
"""


def test_a_flask_app_with_a_pool_of_its_own_is_undone(project, server):
    server.execute("create database flaskshop")
    conninfo = psycopg.conninfo.conninfo_to_dict(server.conninfo(over="unix", dbname="flaskshop"))
    with psycopg.connect(server.conninfo(over="unix", dbname="flaskshop")) as conn:
        conn.execute("create table orders (id int primary key, state text)")
        conn.execute("insert into orders values (1, 'new')")
    project.write(
        conftest='pytest_plugins = ["pytest_penstock.plugin"]\n',  # as well as the entry point
        shop=FLASK_APP,
        test_shop=FLASK_TESTS,
    )
    address = {f"PG{key.upper()}": str(conninfo[key]) for key in ("host", "port", "user")}
    assert "3 passed" in project.run(PGDATABASE="flaskshop", **address)
    assert server.execute("select id from orders", dbname="flaskshop")[-1] == ("1",)
    server.execute("drop database flaskshop with (force)")


def test_importing_penstock_testing_imports_no_pytest_and_no_driver():
    script = (
        "import sys, penstock.testing; print(sorted({'pytest', 'psycopg'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
