"""A well-known gist's DatabaseClient, written on the extension: what it promises, it keeps.

Its words: "It will always return a valid connection and will always return the same connection to
the same request." Its pool is in autocommit, its rows are mappings; a dead connection is replaced, one
that comes back in a transaction is rolled back, all come back at the request's end.
"""

import psycopg
import pytest
from flask import Flask, abort
from psycopg import Connection
from psycopg.rows import DictRow, dict_row
from tests.forks import until

from penstock import PoolTimeout
from penstock.integrations.flask import Penstock


class DatabaseClient:
    def __init__(self, app=None, **options):
        self.db = Penstock(connection_class=Connection[DictRow])
        if app is not None:
            self.init_app(app, **options)

    def init_app(self, app, minconn=2, maxconn=32, **options):
        own = {"min_size": minconn, "max_size": maxconn, "kwargs": {"row_factory": dict_row}}
        app.config.update(PENSTOCK_DATABASE_URI=own | options, PENSTOCK_TRANSACTIONS="autocommit")
        self.db.init_app(app)

    def conn(self):
        return self.db.conn


@pytest.fixture
def app():
    return Flask("gist")


@pytest.fixture
def client_of(app, notes):
    def make(**options):
        return DatabaseClient(app, url=notes, **options)

    yield make
    app.extensions["penstock"].close(timeout=0)


@pytest.fixture
def get(app):
    def answer(view):
        app.view_functions["view"] = view
        return app.test_client().get("/")

    app.add_url_rule("/", "view", lambda: "")
    return answer


def lent(app):
    return app.extensions["penstock"].pools["default"].stats().in_use


def pid_of(conn):
    return conn.execute("select pg_backend_pid() as pid").fetchone()["pid"]


def test_it_takes_at_most_ten_lines():
    import inspect

    lines = [line for line in inspect.getsource(DatabaseClient).splitlines() if line.strip()]
    assert len(lines) <= 11  # with its class line


def test_a_request_gets_the_same_connection_always_in_autocommit_with_mappings_for_rows(
    client_of, get, app
):
    client = client_of()

    @get
    def answer():
        assert client.conn() is client.conn()
        assert client.conn().autocommit
        assert lent(app) == 1
        return client.conn().execute("select 'yes' as answer").fetchone()

    assert answer.json == {"answer": "yes"}
    assert lent(app) == 0


def test_it_comes_back_however_the_request_ends(client_of, get, app):
    client = client_of(maxconn=2)

    def bug():
        client.conn()
        raise ZeroDivisionError

    assert get(lambda: client.conn() and abort(404)).status_code == 404
    assert get(bug).status_code == 500
    assert lent(app) == 0


def test_one_that_died_between_requests_is_replaced(client_of, get, outside, app):
    client = client_of(minconn=1, maxconn=1)
    first = get(lambda: str(pid_of(client.conn()))).text
    outside.execute("select pg_terminate_backend(%s)", [int(first)])
    pool = app.extensions["penstock"].pools["default"]
    until(lambda: pool.stats().closed.get("hung up"), "the pool has heard of it")
    assert get(lambda: str(pid_of(client.conn()))).text != first


def test_one_that_dies_in_a_request_is_replaced_once_its_user_was_told(client_of, get, outside):
    client = client_of()

    @get
    def answer():
        first = client.conn()
        outside.execute("select pg_terminate_backend(%s)", [pid_of(first)])
        with pytest.raises(psycopg.OperationalError):
            until(lambda: not first.execute("select 1"), "its session has ended")
        second = client.conn()
        assert second is not first
        assert client.conn() is second
        return str(pid_of(second))

    assert answer.status_code == 200


def test_what_a_request_leaves_behind_does_not_reach_the_next(client_of, get, app):
    client = client_of(minconn=1, maxconn=1, reset="session")

    def leave():
        conn = client.conn()
        conn.execute("create temp table left_behind (x int)")
        conn.execute("set search_path to nowhere")
        conn.row_factory = psycopg.rows.tuple_row
        conn.autocommit = False
        conn.execute("insert into left_behind values (1)")
        return str(conn.info.backend_pid)

    def find():
        conn = client.conn()
        assert conn.autocommit
        assert conn.info.transaction_status == 0
        assert conn.execute("show search_path").fetchone()["search_path"] != "nowhere"
        assert conn.execute("select to_regclass('left_behind') as it").fetchone()["it"] is None
        return str(conn.info.backend_pid)

    left = get(leave)
    found = get(find)
    assert (left.status_code, found.status_code) == (200, 200)
    assert left.text == found.text


def test_it_says_so_when_the_pool_is_full(client_of, get, app):
    client = client_of(minconn=1, maxconn=1, timeout=0.01)
    app.testing = True
    pool = app.extensions["penstock"].pools["default"]
    pool.open(wait=True, timeout=30)
    with pool.connection(30), pytest.raises(PoolTimeout):
        get(lambda: str(pid_of(client.conn())))
