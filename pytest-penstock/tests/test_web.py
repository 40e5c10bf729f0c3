"""Web applications under test: the Flask extension, and Connexion 3, whose views run in other threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from flask import Flask

from penstock import ConnectionPool
from penstock.integrations.flask import Penstock
from pytest_penstock import undone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_penstock.postgres import Server

SPEC = """
openapi: 3.0.0
info: {title: notes, version: "1"}
paths:
  /notes/{number}:
    post:
      operationId: add
      parameters: [{name: number, in: path, required: true, schema: {type: integer}}]
      responses: {"200": {description: the thread that did it}}
  /notes:
    get:
      operationId: count
      responses: {"200": {description: how many}}
"""


@pytest.fixture(scope="module")
def notes(server: Server) -> Iterator[str]:
    server.execute("create database webnotes")
    server.execute("create table note (id int primary key)", dbname="webnotes")
    yield server.conninfo(dbname="webnotes", over="unix")
    server.execute("drop database webnotes with (force)")


@pytest.fixture(autouse=True)
def nothing_stays(notes: str) -> Iterator[None]:
    yield
    with psycopg.connect(notes) as conn:
        assert conn.execute("select * from note").fetchall() == []


def test_what_a_flask_app_with_the_extension_does_is_undone(notes):
    app = Flask("notes")
    app.config["PENSTOCK_DATABASE_URI"] = notes
    db = Penstock(app)

    @app.post("/notes/<int:number>")
    def add(number: int) -> dict[str, Any]:
        db.execute("insert into note values (%s)", (number,))
        if number > 9:
            raise ValueError(number)
        return {}

    @app.get("/notes")
    def count() -> dict[str, Any]:
        return {"notes": len(db.execute("select * from note").fetchall())}

    extension, client = app.extensions["penstock"], app.test_client()
    for _ in range(2):
        with undone(extension):
            assert client.post("/notes/1").status_code == 200
            assert client.post("/notes/10").status_code == 500
            assert client.post("/notes/1").status_code == 500
            assert client.get("/notes").json == {"notes": 1}
    extension.close()


@pytest.fixture
def pool(notes: str) -> Iterator[ConnectionPool[Any]]:
    with ConnectionPool(notes, timeout=1.0, name="notes") as pool:
        yield pool


@pytest.mark.filterwarnings("ignore")  # Starlette's about its test client
def test_views_of_connexion_3_share_the_test_s_transaction_from_their_threads(pool, tmp_path):
    connexion = pytest.importorskip("connexion", minversion=None)
    if not hasattr(connexion, "AsyncApp"):
        pytest.skip("Connexion 2")
    threads: set[int] = set()

    def add(number: int) -> dict[str, Any]:
        threads.add(threading.get_ident())
        with pool.connection() as conn:
            conn.execute("insert into note values (%s)", (number,))
        return {}

    def count() -> dict[str, Any]:
        return {"notes": pool.execute("select count(*) from note").fetchone()[0]}

    (tmp_path / "notes.yaml").write_text(SPEC, encoding="utf-8")
    app = connexion.FlaskApp("notes", specification_dir=tmp_path)
    app.add_api("notes.yaml", resolver=connexion.Resolver({"add": add, "count": count}.get))
    with undone(pool), app.test_client() as client, pool.connection() as conn:
        # The test holds a connection all the while; with no transaction open it is in nobody's way.
        assert client.post("/notes/1").status_code == 200
        conn.execute("insert into note values (2)")
        conn.commit()
        assert client.get("/notes").json() == {"notes": 2}
        conn.execute("insert into note values (3)")
        assert (
            client.post("/notes/4").status_code == 500
        )  # it has waited for the test's transaction
        conn.rollback()
        assert client.post("/notes/4").status_code == 200
        assert client.get("/notes").json() == {"notes": 3}
    assert threads
    assert threading.get_ident() not in threads
