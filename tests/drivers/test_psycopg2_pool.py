"""ConnectionPool over psycopg2, as its users write it, on a real PostgreSQL."""

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time

import psycopg2
import psycopg2.extras
import pytest
from flask import Flask, g
from psycopg2 import extensions
from tests.forks import PATIENCE, Child, quiet_libc_fork, until

from penstock import (
    ConnectionPool,
    DriverNotFoundError,
    MisuseError,
    PenstockError,
    PoolTimeout,
    ServerUnavailable,
)
from penstock.integrations.flask import Penstock

GENEROUS = 15.0  # how much later than its timeout an answer may come on a loaded machine


@pytest.fixture
def pool_of(server):
    made: list[ConnectionPool] = []

    def make(conninfo=None, **options):
        conninfo = server.conninfo(over="unix") if conninfo is None else conninfo
        options = {"name": f"two-{len(made)}", **options}
        made.append(ConnectionPool(conninfo, driver="psycopg2", **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close(timeout=0)


def run(conn, statement, params=None):
    with conn.cursor() as cursor:
        cursor.execute(statement, params)


def rows(conn, query, params=None):
    with conn.cursor() as cursor:
        cursor.execute(query, params)
        return cursor.fetchall()


_numbers = itertools.count()


def ask(pool, **options):
    """One statement with a nonce; gives the backend's pid, raises on somebody else's answer."""
    nonce = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
    with pool.connection(**options) as conn:
        [(said, backend)] = rows(conn, "select %s::text, pg_backend_pid()", [nonce])
    assert said == nonce, f"asked {nonce}, got {said}"
    return backend


def ask_in_one(pool):
    nonce = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
    said, backend = pool.execute("select %s::text, pg_backend_pid()", [nonce]).fetchone()
    assert said == nonce, f"asked {nonce}, got {said}"
    return backend


def sessions(server, pool):
    found = server.execute(
        f"select pid from pg_stat_activity where application_name like '%/{pool.name}/%'"
    )
    return {int(pid) for (pid,) in found}


# -- borrowing --------------------------------------------------------------------------------------


def test_a_block_commits_and_one_that_raises_rolls_back(pool_of):
    pool = pool_of(max_size=1)
    pool.execute("create temp table kept (n int)")  # temporary: the pool has one session
    with pool.connection() as conn:
        assert isinstance(conn, extensions.connection)
        run(conn, "insert into kept values (1)")
    with pytest.raises(KeyError), pool.connection() as conn:
        run(conn, "insert into kept values (2)")
        raise KeyError
    with pool.connection() as conn, conn:  # psycopg2's own block: commits, does not close
        run(conn, "insert into kept values (3)")
    with pool.connection(autocommit=True) as conn:
        run(conn, "begin")
        run(conn, "insert into kept values (4)")
    assert pool.execute("select n from kept order by n").fetchall() == [(1,), (3,), (4,)]
    assert pool.stats().opened == 1


def test_a_commit_that_fails_reaches_the_borrower_and_the_connection_goes_back(pool_of):
    pool = pool_of(max_size=1)
    pool.execute("create temp table once (n int, unique (n) deferrable initially deferred)")
    with pytest.raises(psycopg2.errors.UniqueViolation), pool.connection() as conn:
        run(conn, "insert into once values (1), (1)")
    assert pool.execute("select count(*) from once").fetchone() == (0,)
    assert (pool.stats().idle, pool.stats().opened) == (1, 1)


def test_a_block_whose_session_was_lost_does_not_end_well(pool_of, server):
    pool = pool_of(max_size=1)
    with pytest.raises(psycopg2.OperationalError), pool.connection() as conn:
        [(backend,)] = rows(conn, "select pg_backend_pid()")
        server.execute(f"select pg_terminate_backend({backend}, 10000)")
        with contextlib.suppress(psycopg2.OperationalError):
            rows(conn, "select 1")
    assert ask(pool) != backend


def test_getconn_and_putconn(pool_of, caplog):
    pool = pool_of(max_size=1)
    conn = pool.getconn()
    assert rows(conn, "select 1") == [(1,)]
    pool.putconn(conn)
    assert "idle in transaction: rolled back" in caplog.text
    conn = pool.getconn(timeout=1)
    rows(conn, "select 1")
    conn.commit()
    caplog.clear()
    pool.putconn(conn)
    assert caplog.text == ""
    with pytest.raises(MisuseError):
        pool.putconn(conn)
    assert (pool.stats().idle, pool.stats().borrows) == (1, 2)


def test_a_result_of_execute_is_detached(pool_of):
    pool = pool_of(max_size=1)
    result = pool.execute("select n, n * 2 from generate_series(1, 3) n")
    assert pool.stats().idle == 1
    assert result.fetchone() == (1, 2)
    assert list(result) == [(2, 4), (3, 6)]
    assert (result.rowcount, result.statusmessage) == (3, "SELECT 3")
    assert [column.name for column in result.description] == ["n", "?column?"]
    with pytest.raises(psycopg2.errors.DivisionByZero):
        pool.execute("select 1 / 0")
    assert pool.execute("select %s::int", [7]).fetchone() == (7,)
    pool.execute("vacuum pg_class")  # what no transaction may
    assert pool.stats().opened == 1


def test_errors_of_the_pool_are_psycopg2s_too(pool_of):
    pool = pool_of(max_size=1)
    conn = pool.getconn()
    with pytest.raises(psycopg2.OperationalError) as caught:
        pool.getconn(timeout=0)
    assert isinstance(caught.value, PoolTimeout)
    pool.putconn(conn)
    with pytest.raises(psycopg2.InterfaceError) as misuse:
        pool.putconn(object())
    assert isinstance(misuse.value, MisuseError)


def test_settings_of_a_borrow_end_with_it(pool_of):
    pool = pool_of(max_size=1)
    with pool.connection(settings={"app.user": "ann"}) as conn:
        assert rows(conn, "select current_setting('app.user')") == [("ann",)]
    with pool.connection() as conn:
        assert rows(conn, "select coalesce(current_setting('app.user', true), '')") == [("",)]


def test_a_connection_that_was_given_back_raises_but_its_old_cursor_does_not(pool_of):
    """The second half is what docs/psycopg2.md says is not caught."""
    pool = pool_of(max_size=1, autocommit=True)
    with pool.connection() as conn:
        cursor = conn.cursor()
    with pytest.raises(psycopg2.InterfaceError, match="given back to its pool"):
        conn.cursor()
    cursor.execute("select 1")


def test_client_side_settings_do_not_reach_the_next_borrower(pool_of):
    pool = pool_of(max_size=1, kwargs={"cursor_factory": psycopg2.extras.RealDictCursor})
    with pool.connection() as conn:
        conn.set_session(isolation_level="SERIALIZABLE", readonly=True)
        conn.cursor_factory = None
        conn.set_client_encoding("LATIN1")
        assert rows(conn, "select 1 as n") == [(1,)]
    with pool.connection() as conn:
        assert rows(conn, "select 1 as n") == [{"n": 1}]
        assert (conn.isolation_level, conn.readonly, conn.encoding) == (None, None, "UTF8")
        assert rows(conn, "show transaction_read_only")[0]["transaction_read_only"] == "off"
    assert pool.stats().opened == 1


def test_a_session_is_reset_at_return_if_the_pool_says_so(pool_of):
    def configure(conn):
        run(conn, "set work_mem = '7MB'")
        conn.commit()

    pool = pool_of(max_size=1, reset="session", configure=configure)
    with pool.connection() as conn:
        run(conn, "create temp table left_behind (n int)")
        run(conn, "set work_mem = '9MB'; select pg_advisory_lock(5)")
    with pool.connection() as conn:
        assert rows(conn, "show work_mem") == [("7MB",)]
        assert rows(conn, "select to_regclass('left_behind')") == [(None,)]
        held = "select count(*) from pg_locks where locktype = 'advisory'"
        assert rows(conn, held + " and pid = pg_backend_pid()") == [(0,)]
    assert pool.stats().opened == 1


# -- what it costs ------------------------------------------------------------------------------------


def test_a_borrow_says_nothing_to_the_server_and_one_statement_takes_one_round_trip(
    pool_of, server, proxy
):
    pool = pool_of(server.conninfo(port=proxy.port), max_size=1)
    pool.open(wait=True)
    with proxy.counting() as count:
        for _ in range(50):
            with pool.connection():
                pass
    assert count.round_trips == 0
    with proxy.counting() as count:
        pool.execute("select 1")
    assert count.round_trips == 1
    with proxy.counting() as count, pool.connection() as conn:
        rows(conn, "select 1")
    assert count.round_trips == 3  # begin, the statement, commit


# -- servers that go ----------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_a_restart_while_all_are_idle_costs_nobody_an_error(pool_of, fresh_server, over):
    pool = pool_of(fresh_server.conninfo(over=over), min_size=4, max_size=4, timeout=PATIENCE)
    pool.open(wait=True)
    until(lambda: pool.stats().idle == 4, "all are open")
    fresh_server.restart()
    for _ in range(40):
        ask(pool)
    until(lambda: pool.stats().closed.get("hung up", 0) == 4, "four hang-ups heard")
    assert (pool.stats().timeouts, pool.stats().refused) == (0, 0)


@pytest.mark.parametrize("option", ["ping", "on_borrow", "transaction"])
def test_a_frozen_server_costs_a_borrower_no_more_than_his_timeout(
    pool_of, fresh_server, option, monkeypatch
):
    monkeypatch.setattr("penstock._pool.sync.borrowing.TIDY_SECONDS", 1.0)

    def select(conn):
        rows(conn, "select 1")
        conn.rollback()

    options = {"ping": {"ping_after": 0}, "transaction": {}}.get(option, {option: select})
    pool = pool_of(fresh_server.conninfo(), max_size=2, timeout=1.0, **options)
    with pool.connection():
        pass
    began = time.monotonic()
    fresh_server.pause()
    try:
        if option == "transaction":
            with pytest.raises((PenstockError, psycopg2.Error)):
                _leave_a_transaction_on_a_frozen_server(pool, fresh_server)
        else:
            with pytest.raises((PenstockError, psycopg2.Error)), pool.connection():
                pass
    finally:
        fresh_server.resume()
    assert time.monotonic() - began < GENEROUS
    assert ask(pool, timeout=GENEROUS)


def _leave_a_transaction_on_a_frozen_server(pool, server):
    server.resume()
    with pool.connection(timeout=GENEROUS) as conn:
        rows(conn, "select 1")
        server.pause()
        raise psycopg2.DataError  # the rollback at the return meets the frozen server


def test_a_server_that_is_down_and_a_wrong_password_are_told_apart(pool_of, server):
    nobody = pool_of("host=127.0.0.1 port=1 user=x dbname=x")
    with pytest.raises(ServerUnavailable) as caught:
        nobody.execute("select 1", timeout=0.5)
    assert isinstance(caught.value.__cause__, psycopg2.OperationalError)
    nowhere = pool_of(server.conninfo(dbname="nowhere"))
    with pytest.raises(ServerUnavailable, match="3D000"):
        nowhere.open(wait=True, timeout=PATIENCE)


# -- forks ----------------------------------------------------------------------------------------------

FORKS = 30

forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def ask_and_fork(pool, fork=os.fork):
    mine = [ask(pool), ask_in_one(pool)]
    grandchild = Child(lambda: [ask(pool), ask_in_one(pool)], fork=fork)
    mine.append(ask(pool))
    return {"child": sorted(set(mine)), "grandchild": sorted(set(grandchild.answer(PATIENCE / 2)))}


class Hammer:
    """Threads that use a pool without a pause, and count what goes wrong."""

    def __init__(self, pool, threads=6):
        self.pool = pool
        self.asked = 0
        self.backends = set()
        self.errors = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self):
        for call in itertools.cycle([ask, ask_in_one]):
            if self._stop.is_set():
                return
            try:
                self.backends.add(call(self.pool))
                self.asked += 1
            except BaseException as error:
                self.errors.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads), "a borrower hangs"


@forks
@pytest.mark.parametrize("over", ["unix", "tls"])
def test_forks_under_load_disturb_nobody(over, request, pool_of):
    server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    pool = pool_of(server.conninfo(over=over), min_size=0, max_size=4, timeout=PATIENCE)
    inherited: set[int] = set()
    with Hammer(pool) as hammer:
        until(lambda: len(hammer.backends) == 4, "four sessions in use")
        before = sessions(server, pool)
        children = []
        for _ in range(FORKS):
            children.append(Child(functools.partial(ask_and_fork, pool)))
            if len(children) >= 4:
                inherited.update(*children.pop(0).answer().values())
        for child in children:
            inherited.update(*child.answer().values())
        served = hammer.asked
        until(lambda: hammer.asked > served + 100, "the parent goes on")
    assert hammer.errors == []
    assert hammer.backends == before
    assert inherited.isdisjoint(before)
    assert len(inherited) == 2 * FORKS
    until(lambda: sessions(server, pool) == before, "the children's sessions are gone")
    assert (pool.stats().opened, pool.stats().closed, pool.stats().orphaned) == (4, {}, 0)


@forks
@pytest.mark.parametrize(
    "fork", [pytest.param(os.fork, id="hooks"), pytest.param(quiet_libc_fork, id="libc")]
)
def test_a_child_and_its_child_get_sessions_of_their_own(pool_of, server, fork):
    pool = pool_of(min_size=2, max_size=2)
    pool.open(wait=True)
    before = sessions(server, pool)

    def act():
        found = ask_and_fork(pool, fork)
        with pytest.raises(psycopg2.InterfaceError, match="before the fork"):
            conn.cursor()
        return found

    with pool.connection() as conn:
        rows(conn, "select 1")
        answer = Child(act, fork=fork).answer()
        assert rows(conn, "select 2") == [(2,)]
    assert not before & {*answer["child"], *answer["grandchild"]}
    assert ask(pool) in before
    until(lambda: sessions(server, pool) == before, "the parent's sessions as before")


# -- the driver's name ------------------------------------------------------------------------------------


def test_a_missing_psycopg2_names_the_extra(monkeypatch):
    for name in [each for each in sys.modules if each.startswith("penstock._drivers.psycopg2")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(DriverNotFoundError, match=r"penstock\[psycopg2-binary\]"):
        ConnectionPool("", driver="psycopg2")


# -- what people have -------------------------------------------------------------------------------------


def test_the_pool_in_flasks_g_of_a_swagger_service(server):
    """seeds/000: keyword arguments of ThreadedConnectionPool(1, 20, ...), getconn, putconn and g."""
    settings = psycopg2.extensions.parse_dsn(server.conninfo(over="tcp"))
    settings["database"] = settings.pop("dbname")
    app = Flask("seed")
    pool = app.config["postgreSQL_pool"] = ConnectionPool(
        driver="psycopg2", min_size=1, max_size=20, kwargs=settings
    )

    @app.before_request
    def before_request():
        g.db = app.config["postgreSQL_pool"].getconn()

    @app.teardown_appcontext
    def close_conn(error):
        db = g.pop("db", None)
        if db is not None:
            app.config["postgreSQL_pool"].putconn(db)

    @app.get("/<int:number>")
    def controller(number):
        conn = g.db
        cur = conn.cursor()
        cur.execute("select %s::int", (number,))
        data = cur.fetchone()
        cur.close()
        return {"data": data[0]}

    @app.get("/wrong")
    def wrong():
        cur = g.db.cursor()
        cur.execute("select 1/0")

    client = app.test_client()
    with pool:
        for number in range(20):
            assert client.get(f"/{number}").json == {"data": number}
            assert client.get("/wrong").status_code == 500
        assert (pool.stats().in_use, pool.stats().opened) == (0, 1)


def test_a_database_client_with_dict_rows_and_autocommit(server):
    """seeds/001: RealDictCursor, autocommit, one connection per request, ended sessions in between."""
    app = Flask("seed")
    app.config["PENSTOCK_DATABASE_URI"] = server.conninfo(over="unix")
    app.config["PENSTOCK_POOL_OPTIONS"] = {
        "driver": "psycopg2",
        "min_size": 2,
        "max_size": 32,
        "autocommit": True,
        "kwargs": {"cursor_factory": psycopg2.extras.RealDictCursor},
        "name": "seed-1",
    }
    app.config["PENSTOCK_TRANSACTIONS"] = "autocommit"
    db = Penstock(app)

    @app.get("/")
    def view():
        first, again = db.conn, db.conn
        assert first is again and first.autocommit
        return db.execute("select 7 as n, pg_backend_pid() as pid").fetchone()

    client = app.test_client()
    pool = app.extensions["penstock"].pools["default"]
    assert {client.get("/").get_json()["n"] for _ in range(10)} == {7}
    for backend in sessions(server, pool):
        server.execute(f"select pg_terminate_backend({backend}, 10000)")
    until(lambda: pool.stats().closed.get("hung up"), "the ends are heard")
    assert client.get("/").get_json()["n"] == 7
    assert pool.stats().in_use == 0
    app.extensions["penstock"].close()


# -- the Flask extension ----------------------------------------------------------------------------------


@pytest.fixture
def shop(server, caplog):
    server.execute("create database two_notes")
    server.execute("create table note (tag text primary key)", dbname="two_notes")
    app = Flask("shop")
    app.config["PENSTOCK_DATABASE_URI"] = server.conninfo(dbname="two_notes", over="unix")
    app.config["PENSTOCK_POOL_OPTIONS"] = {"driver": "psycopg2", "max_size": 1, "timeout": 10.0}
    app.db = Penstock(app)  # type: ignore[attr-defined]
    yield app
    app.extensions["penstock"].close()
    server.execute("drop database two_notes with (force)")


def test_the_flask_extension_works_over_psycopg2(shop, caplog):
    db = shop.db
    kept = functools.partial(_kept, shop)

    @db.on_first_use
    def say_who(conn):
        with conn.cursor() as cursor:
            cursor.execute("select set_config('app.user', 'ann', true)")

    @shop.get("/add/<tag>/<int:status>")
    def add(tag, status):
        db.execute("insert into note values (%s)", (tag,))
        user = db.execute("select current_setting('app.user')").fetchone()[0]
        return user, status

    @shop.get("/forgets/<tag>")
    def forgets(tag):
        db.execute("insert into note values (%s)", (tag,))
        db.execute("select 1/0") if tag == "wrong" else None
        return "", 409

    @shop.get("/stream/<tag>")
    def stream(tag):
        db.execute("insert into note values (%s)", (tag,))

        def lines():
            with db.conn.cursor(name="notes") as cursor:
                cursor.execute("select tag from note order by tag")
                for (line,) in cursor:
                    yield f"{line}\n"

        return db.stream(lines())

    client = shop.test_client()
    assert client.get("/add/one/200").text == "ann"
    assert client.get("/add/two/404").status_code == 404
    assert kept() == ["one"]
    caplog.clear()
    assert client.get("/forgets/three").status_code == 409
    assert "answered 409: uncommitted work on pool" in caplog.text
    assert client.get("/forgets/wrong").status_code == 500
    assert client.get("/stream/four").text == "four\none\n"
    assert kept() == ["four", "one"]
    with shop.app_context():
        db.execute("insert into note values ('five')")
        db.rollback()
        db.execute("insert into note values ('six')")
        db.commit()
    assert kept() == ["four", "one", "six"]
    pool = shop.extensions["penstock"].pools["default"]
    assert (pool.stats().in_use, pool.stats().opened) == (0, 1)


def test_a_session_lost_in_a_request_is_an_error_and_not_half_a_commit(shop, server):
    db = shop.db
    kept = functools.partial(_kept, shop)

    @shop.get("/lost")
    def lost():
        db.execute("insert into note values ('first half')")
        backend = db.execute("select pg_backend_pid()").fetchone()[0]
        server.execute(f"select pg_terminate_backend({backend}, 10000)")
        for _ in range(2):
            with contextlib.suppress(psycopg2.Error):
                db.execute("insert into note values ('second half')")
        return "ok"

    assert shop.test_client().get("/lost").status_code == 500
    assert kept() == []


def _kept(shop):
    with shop.app_context():
        return [tag for (tag,) in shop.db.execute("select tag from note order by tag").fetchall()]


def test_pausing_one_backend_does_not_hold_up_others(pool_of, server):
    """A tidy that waits for its deadline holds no lock of the pool's, nor of the driver's."""
    pool = pool_of(max_size=2, min_size=2)
    pool.open(wait=True)
    conn = pool.getconn()
    [(backend,)] = rows(conn, "select pg_backend_pid()")
    os.kill(backend, signal.SIGSTOP)
    try:
        returning = threading.Thread(target=pool.putconn, args=(conn,))
        returning.start()
        for _ in range(20):
            assert ask(pool) != backend
        assert returning.is_alive()
    finally:
        os.kill(backend, signal.SIGCONT)
        returning.join(PATIENCE)
    assert pool.stats().in_use == 0
