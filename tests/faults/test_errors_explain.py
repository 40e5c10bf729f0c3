"""Every way not to get a connection, or to misuse one: its class, its figures, its words, no secrets."""

import contextlib
import gc
import inspect
import logging
import shutil
import socket
import struct
import subprocess
import threading
import time
import traceback

import psycopg
import pytest
from psycopg.rows import dict_row, tuple_row
from tests.forks import PATIENCE, until
from tests.wire import WireProxy

from penstock import (
    ConnectionPool,
    MisuseError,
    PenstockError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    TooManyRequests,
)
from pytest_penstock.postgres import Server

PASSWORD = "hunter2-and-more"
WRONG = "wr0ng-s3cret"


@pytest.fixture(scope="module")
def strict_server():
    """A server that wants a password over TCP."""
    with Server(hba=["host all all 127.0.0.1/32 scram-sha-256"]) as running:
        running.execute(f"create role app login password '{PASSWORD}'")
        running.execute("create role barred nologin password 'x'")
        yield running


@pytest.fixture
def strict_proxy(strict_server):
    with WireProxy("127.0.0.1", strict_server.port) as running:
        yield running


@pytest.fixture
def wrong_pool(strict_server, strict_proxy):
    """With a wrong password. No frame of a test has it in a local variable."""
    conninfo = strict_server.conninfo(user="app", password=WRONG, port=strict_proxy.port)
    pool = ConnectionPool(conninfo, min_size=3, max_size=5, name="wrong")
    yield pool
    pool.close()


@pytest.fixture
def pool_of(server):
    made = []

    def make(**options):
        conninfo = options.pop("conninfo", server.conninfo(over="unix"))
        made.append(ConnectionPool(conninfo, **{"name": "explains", **options}))
        return made[-1]

    yield make
    for pool in made:
        pool.close(timeout=0)


class Answering:
    """A server on a socket that answers every start-up with the same bytes, once or for ever."""

    def __init__(self, *says):
        self.says = says
        self.asked = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.conninfo = (
            f"host=127.0.0.1 port={self.port} user=app dbname=app password={WRONG}"
            " sslmode=disable gssencmode=disable"
        )
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.asked += 1
            with client, contextlib.suppress(OSError):
                for message in self.says:
                    client.recv(4096)
                    client.sendall(message)
                client.recv(4096)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)


ASKS_FOR_PASSWORD = b"R" + struct.pack("!II", 8, 3)


def refusal(sqlstate, text, severity="FATAL"):
    fields = f"S{severity}\0VFATAL\0C{sqlstate}\0M{text}\0\0".encode()
    return b"E" + struct.pack("!I", len(fields) + 4) + fields


# -- cannot open ------------------------------------------------------------------------------------


def test_a_wrong_password_is_told_at_once_with_one_attempt_and_one_that_diagnoses(
    wrong_pool, strict_proxy
):
    began = time.perf_counter()
    with strict_proxy.counting() as count, pytest.raises(ServerUnavailable) as caught:
        wrong_pool.open(wait=True, timeout=PATIENCE)
    seconds = time.perf_counter() - began
    print(f"wrong password told after {seconds:.3f} s")
    error = caught.value
    assert count.opened == 2
    assert 'password authentication failed for user "app"' in str(error)
    assert (error.sqlstate, error.heals, error.attempts) == ("28P01", False, 1)
    assert "check user and password" in str(error)
    assert isinstance(error.__cause__, psycopg.OperationalError)
    assert seconds < 5  # ten times what is promised


def test_after_a_wrong_password_borrowers_are_refused_at_once_without_a_login_each(
    wrong_pool, strict_proxy
):
    with pytest.raises(ServerUnavailable):
        wrong_pool.open(wait=True, timeout=PATIENCE)
    with strict_proxy.counting() as count:
        for _ in range(50):
            with pytest.raises(ServerUnavailable, match="password authentication failed"):
                wrong_pool.execute("select 1", timeout=PATIENCE)
    assert count.opened <= 5  # one a second at most
    assert not wrong_pool.health().ready
    assert "password authentication failed" in wrong_pool.health().why


@pytest.fixture
def german_server(tmp_path, monkeypatch):
    """A server with German messages; the locale is made for it where the system has the sources."""
    localedef = shutil.which("localedef")
    if localedef is None:
        pytest.skip("needs localedef (Debian: libc-bin) and its sources (Debian: locales)")
    made = subprocess.run(
        [localedef, "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"needs the locale de_DE.UTF-8 (Debian: locales): {made.stderr}")
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    settings = {"lc_messages": "de_DE.UTF-8"}
    with Server(settings=settings, hba=["host all all 127.0.0.1/32 scram-sha-256"]) as running:
        yield running


def test_a_wrong_password_is_known_without_reading_the_servers_words(german_server):
    german_server.execute(f"create role app login password '{PASSWORD}'")
    if "fehlgeschlagen" not in _refusal_of(german_server):
        pytest.skip(f"{german_server.binaries.path} has no German messages (Debian: locales-all)")
    with WireProxy("127.0.0.1", german_server.port) as proxy:
        conninfo = german_server.conninfo(user="app", password=WRONG, port=proxy.port)
        pool = ConnectionPool(conninfo, min_size=3, name="german")
        with proxy.counting() as count, pytest.raises(ServerUnavailable) as caught:
            pool.open(wait=True, timeout=PATIENCE)
        pool.close()
    print(caught.value)
    assert count.opened == 2
    assert "Passwort-Authentifizierung" in str(caught.value)
    assert (caught.value.heals, caught.value.sqlstate) in {(False, "28P01"), (False, None)}
    assert (caught.value.waited or 0) < PATIENCE / 2


def _refusal_of(server):
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(server.conninfo(user="app", password=WRONG))
    return str(caught.value)


def test_a_wrong_password_is_told_in_the_servers_language():
    """Where no real server speaks German: a socket that does."""
    german = "Passwort-Authentifizierung für Benutzer »app« fehlgeschlagen"
    with Answering(ASKS_FOR_PASSWORD, refusal("28P01", german, "FATAL")) as there:
        pool = ConnectionPool(there.conninfo, min_size=2, name="german")
        with pytest.raises(ServerUnavailable) as caught:
            pool.open(wait=True, timeout=PATIENCE)
        pool.close()
        assert german in str(caught.value)
        assert caught.value.heals is False
        assert caught.value.sqlstate == "28P01"
        assert there.asked == 2


def test_a_server_that_starts_up_is_waited_for():
    with Answering(refusal("57P03", "the database system is starting up")) as there:
        pool = ConnectionPool(there.conninfo, name="starting")
        with pytest.raises(ServerUnavailable) as caught:
            pool.open(wait=True, timeout=0.6)
        pool.close()
        assert (caught.value.sqlstate, caught.value.heals) == ("57P03", True)
        assert "is starting up" in str(caught.value)
        assert "comes back by itself" in str(caught.value)
        assert caught.value.attempts >= 2


@pytest.mark.parametrize(
    ("words", "sqlstate", "text", "step"),
    [
        ({"dbname": "nowhere"}, "3D000", 'database "nowhere" does not exist', "check dbname"),
        ({"user": "nobody"}, "28000", 'role "nobody" does not exist', "check that the role"),
        ({"host": "no-such-host.invalid", "over": "tcp"}, None, "could not resolve", "at host="),
        ({"port": "abc", "over": "tcp"}, None, "Servname", "libpq refuses an option"),
        ({"sslmode": "maybe"}, None, "sslmode", "libpq refuses an option"),
        ({"options": "-c nonsense=1"}, "42704", "nonsense", "no such parameter"),
    ],
)
def test_what_cannot_heal_is_told_at_once(words, sqlstate, text, step, *, server, pool_of):
    words = {"over": "unix", **words}
    pool = pool_of(conninfo=server.conninfo(**words))
    with pytest.raises(ServerUnavailable, match=text) as caught:
        pool.open(wait=True, timeout=PATIENCE)
    assert (caught.value.sqlstate, caught.value.heals) == (sqlstate, False)
    assert step in str(caught.value).partition("next step:")[2]
    assert (caught.value.waited or 0) < PATIENCE / 2


def test_a_role_at_its_connection_limit_says_so_and_is_served_when_there_is_room(server, pool_of):
    server.execute("create role crowded login connection limit 1")
    conninfo = server.conninfo(user="crowded", over="unix")
    pool = pool_of(conninfo=conninfo, max_size=3)
    with psycopg.connect(conninfo) as other, pytest.raises(ServerUnavailable) as caught:
        pool.execute("select 1", timeout=0.5)
    assert (caught.value.sqlstate, caught.value.heals) == ("53300", True)
    assert "CONNECTION LIMIT" in str(caught.value)
    other.close()
    assert pool.execute("select 1", timeout=PATIENCE).fetchone() == (1,)
    # One is open now, and no more can be had: who waits is told both, and gets it when it is back.
    with pool.connection(), pytest.raises(ServerUnavailable) as full:
        _in_thread(lambda: pool.execute("select 1", timeout=0.7))
    assert "1 of 3 in use" in str(full.value)
    assert "too many connections" in str(full.value)
    assert "CONNECTION LIMIT" in str(full.value)
    pool.close()
    until(lambda: not server.execute("select 1 from pg_stat_activity where usename = 'crowded'"))
    server.execute("drop role crowded")


def _in_thread(call):
    """What `call` returns or raises, from another thread: a borrower that holds nothing."""
    results, errors = [], []

    def run():
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results[0]


# -- four ways to get nothing -----------------------------------------------------------------------


def test_full_down_refused_early_and_closed_are_four_classes_with_four_texts(fresh_server):
    found = {}

    def try_it(pool, timeout):
        with pytest.raises(PenstockError) as caught:
            _in_thread(lambda: pool.execute("select 1", timeout=timeout))
        found[type(caught.value).__name__] = str(caught.value)
        assert isinstance(caught.value, psycopg.OperationalError)
        return caught.value

    pool = ConnectionPool(fresh_server.conninfo(over="tcp"), max_size=1, max_waiting=1, name="four")
    with pool.connection():
        full = try_it(pool, 0.3)
        assert type(full).__mro__[1] is PoolTimeout
        assert (full.counts.in_use, full.counts.max_size) == (1, 1)
        waiter = threading.Thread(target=lambda: pool.execute("select 1", timeout=PATIENCE))
        waiter.start()
        until(lambda: pool.stats().waiting == 1, "one waits")
        refused = try_it(pool, PATIENCE)
        assert isinstance(refused, TooManyRequests)
        assert (refused.max_waiting, refused.counts.waiting, refused.counts.in_use) == (1, 1, 1)
    waiter.join(PATIENCE)
    fresh_server.stop()
    until(lambda: pool.stats().closed.get("hung up") == 1)
    down = try_it(pool, 0.5)
    assert isinstance(down, ServerUnavailable)
    assert isinstance(down.__cause__, psycopg.OperationalError)
    pool.close()
    closed = try_it(pool, PATIENCE)
    assert isinstance(closed, PoolClosed)
    print(*found.values(), sep="\n")
    assert len(set(found.values())) == len(found) == 4
    assert "1 of 1 in use" in found["PoolTimeout"]
    assert "1 are waiting already" in found["TooManyRequests"]
    assert "Connection refused" in found["ServerUnavailable"]
    assert "was closed" in found["PoolClosed"]
    assert all("'four'" in text for text in found.values())


def test_a_full_pool_names_its_holders_with_file_and_line(pool_of):
    pool = pool_of(max_size=1)
    holding, done = threading.Event(), threading.Event()

    def hold():
        with pool.connection() as conn:
            conn.execute("select 1")
            holding.set()
            done.wait(PATIENCE)  # here it stands

    thread = threading.Thread(target=hold, name="the holder")
    thread.start()
    assert holding.wait(PATIENCE)
    lines, first = inspect.getsourcelines(hold)
    line = first + next(n for n, text in enumerate(lines) if "here it stands" in text)
    with pytest.raises(PoolTimeout) as caught:
        pool.execute("select 1", timeout=0.2)
    done.set()
    thread.join(PATIENCE)
    (holder,) = caught.value.holders
    assert (holder.thread, holder.line) == ("the holder", line)
    assert f"faults/test_errors_explain.py:{line}, idle in transaction" in str(caught.value)
    assert 'in thread "the holder"' in str(caught.value)


def test_timeout_0_takes_only_what_is_free(pool_of):
    pool = pool_of(max_size=1)
    pool.open(wait=True)
    assert pool.execute("select 1", timeout=0).fetchone() == (1,)
    with pool.connection(), pytest.raises(PoolTimeout, match="free at once"):
        _in_thread(lambda: pool.execute("select 1", timeout=0))


def test_who_would_wait_for_itself_is_told_at_once(pool_of):
    pool = pool_of(max_size=1)
    with pool.connection() as conn:
        with pytest.raises(MisuseError, match="would wait for itself") as caught:
            pool.execute("select 1", timeout=PATIENCE)
        assert not conn.closed
    assert isinstance(caught.value, psycopg.InterfaceError)
    assert "1 of 1 in use" in str(caught.value)
    assert pool.execute("select 1").fetchone() == (1,)


def test_two_that_would_wait_for_each_other_are_told_at_once(pool_of):
    pool = pool_of(max_size=2)
    both_hold = threading.Barrier(2)
    outcomes = []

    def hold_and_ask():
        try:
            with pool.connection() as conn:
                assert not conn.closed
                both_hold.wait(PATIENCE)
                outcomes.append(pool.execute("select 1", timeout=PATIENCE).fetchone())
        except MisuseError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=hold_and_ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    # The first waits, as it may be served; the second makes it a deadlock, is refused and leaves,
    # and so the first is served.
    assert sorted(map(str, outcomes)) == ["(1,)", "MisuseError"]
    assert pool.stats().timeouts == 0


# -- no secrets ---------------------------------------------------------------------------------------


def everything_said_by(error):
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(told.format()) + repr(error) + str(error) + repr(vars(error))


def test_no_text_of_an_error_holds_the_password(wrong_pool, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ServerUnavailable) as caught:
        wrong_pool.open(wait=True, timeout=PATIENCE)
    said = everything_said_by(caught.value)
    said += repr(wrong_pool) + repr(wrong_pool.health()) + repr(wrong_pool.stats()) + caplog.text
    with pytest.raises(ServerUnavailable) as caught, wrong_pool.dedicated(timeout=PATIENCE):
        pass
    said += everything_said_by(caught.value)
    assert "password authentication failed" in said
    assert WRONG not in said


UNREADABLE = {  # not a parameter of the test: it would be a local variable there
    "no pair": f"host=127.0.0.1 password={WRONG} x y",
    "no url": f"postgresql://app:{WRONG}@[::1/db",
    "no such word": f"host=127.0.0.1 passwort={WRONG}",
}


@pytest.mark.parametrize("why", UNREADABLE)
@pytest.mark.parametrize("from_callable", [False, True])
def test_a_conninfo_that_cannot_be_read_is_not_quoted(why, from_callable, pool_of, caplog):
    caplog.set_level(logging.DEBUG)
    pool = pool_of(conninfo=(lambda: UNREADABLE[why]) if from_callable else UNREADABLE[why])
    with pytest.raises(ServerUnavailable) as caught:
        pool.open(wait=True, timeout=PATIENCE)
    assert WRONG not in everything_said_by(caught.value) + caplog.text + repr(pool)
    assert (caught.value.waited or 0) < PATIENCE / 2


def test_a_password_in_kwargs_is_not_told(strict_server, pool_of, caplog):
    caplog.set_level(logging.DEBUG)
    pool = pool_of(
        conninfo=strict_server.conninfo(user="app"), kwargs=lambda: {"password": "".join(WRONG)}
    )
    with pytest.raises(ServerUnavailable, match="password authentication failed") as caught:
        pool.open(wait=True, timeout=PATIENCE)
    assert WRONG not in everything_said_by(caught.value) + caplog.text


# -- misuse -------------------------------------------------------------------------------------------


def test_a_connection_given_back_twice_is_refused(pool_of):
    pool = pool_of()
    conn = pool.getconn()
    pool.putconn(conn)
    with pytest.raises(MisuseError, match="give each connection back once") as caught:
        pool.putconn(conn)
    assert isinstance(caught.value, psycopg.InterfaceError)
    assert pool.stats().idle == 1


def test_a_connection_of_another_pool_is_refused(pool_of):
    one, other = pool_of(name="one"), pool_of(name="other")
    conn = one.getconn()
    with pytest.raises(MisuseError, match="'other'"):
        other.putconn(conn)
    one.putconn(conn)
    assert (one.stats().idle, other.stats().in_use) == (1, 0)
    with psycopg.connect(one.getconn().info.dsn) as stranger, pytest.raises(MisuseError):
        one.putconn(stranger)


def test_using_a_connection_after_its_return_raises(pool_of):
    pool = pool_of()
    with pool.connection() as conn:
        cursor = conn.cursor()
    for use in (
        lambda: conn.execute("select 1"),
        lambda: cursor.execute("select 1"),
        conn.commit,
        conn.rollback,
        lambda: conn.set_autocommit(True),
    ):
        with pytest.raises(psycopg.InterfaceError, match="given back"):
            use()
    assert conn.closed
    assert pool.execute("select 1").fetchone() == (1,)


def test_a_lease_that_lasts_too_long_is_warned_about_once_with_its_place(pool_of, caplog):
    # The idle one retires again and again, so that time is looked at again and again.
    pool = pool_of(overdue_after=0.05, name="overdue", min_size=2, max_size=2, max_lifetime=0.1)
    with pool.connection() as conn:
        conn.execute("select 1")
        until(lambda: "has been lent for" in caplog.text, "the warning")
        retired = pool.stats().closed.get("retired", 0)
        until(lambda: pool.stats().closed.get("retired", 0) >= retired + 3, "some later looks")
    found = [r.getMessage() for r in caplog.records if "has been lent for" in r.getMessage()]
    assert len(found) == 1
    assert "pool 'overdue'" in found[0]
    assert 'thread "MainThread"' in found[0]


def test_a_lease_that_is_dropped_is_discarded_and_replaced(pool_of):
    pool = pool_of(max_size=1)
    lease = pool.connection()
    conn = lease.__enter__()
    backend = conn.info.backend_pid
    del lease
    gc.collect()
    until(lambda: pool.stats().closed.get("orphaned") == 1, "it came home")
    with pytest.raises(psycopg.Error):
        conn.execute("select 1")
    assert pool.execute("select pg_backend_pid()", timeout=PATIENCE).fetchone() != (backend,)
    assert (pool.stats().orphaned, pool.stats().size) == (1, 1)


# -- the user's callables -----------------------------------------------------------------------------


def boom(conn):
    raise LookupError("configure went wrong")


def test_a_configure_that_raises_is_the_cause(pool_of, server):
    pool = pool_of(configure=boom, name="misconfigured")
    with pytest.raises(ServerUnavailable, match="configure went wrong") as caught:
        pool.open(wait=True, timeout=PATIENCE)
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.heals is False
    until(lambda: not server.execute(
        "select 1 from pg_stat_activity where application_name like '%/misconfigured/%'"
    ), "its sessions are gone")  # fmt: skip


def test_a_configure_that_leaves_a_transaction_open_is_told(pool_of):
    def set_up(conn):
        conn.execute("set search_path to public")

    pool = pool_of(configure=set_up)
    with pytest.raises(ServerUnavailable, match="set_up left the connection idle in transaction"):
        pool.open(wait=True, timeout=PATIENCE)


def test_a_check_that_raises_costs_a_connection_and_not_the_borrower(pool_of):
    refused: list[object] = []

    def check(conn):
        if len(refused) < 2:
            refused.append(conn)
            raise LookupError

    pool = pool_of(check=check, max_size=2)
    assert pool.execute("select 1", timeout=PATIENCE).fetchone() == (1,)
    assert len(refused) == 2
    until(lambda: pool.stats().closed == {"unclean": 2}, "two closed")


def test_a_check_that_never_agrees_ends_at_the_borrowers_timeout(pool_of):
    pool = pool_of(check=boom, max_size=2)
    began = time.monotonic()
    with pytest.raises(PenstockError):
        pool.execute("select 1", timeout=0.5)
    assert time.monotonic() - began < 5


def test_a_reset_that_raises_costs_the_connection_and_is_logged(pool_of, caplog):
    def reset(conn):
        raise LookupError("no reset today")

    pool = pool_of(reset=reset)
    assert pool.execute("select 1").fetchone() == (1,)
    assert "no reset today" in caplog.text
    until(lambda: pool.stats().closed == {"unclean": 1}, "it is closed")
    assert pool.execute("select 1").fetchone() == (1,)


def test_a_reset_that_leaves_a_transaction_costs_the_connection(pool_of):
    pool = pool_of(reset=lambda conn: conn.execute("select 1"))
    pool.execute("select 1")
    until(lambda: pool.stats().closed == {"unclean": 1}, "it is closed")


def test_on_borrow_is_called_with_each_and_its_error_reaches_the_borrower(pool_of):
    lent = []

    def note(conn):
        lent.append(conn.info.backend_pid)
        if len(lent) == 3:
            raise LookupError("third time")

    pool = pool_of(on_borrow=note)
    for _ in range(2):
        with pool.connection():
            pass
    with pytest.raises(LookupError, match="third time"), pool.connection():
        pass
    with pool.connection():
        assert len(lent) == 4
    pool.putconn(pool.getconn())
    assert len(lent) == 5
    assert (pool.stats().idle, pool.stats().in_use) == (1, 0)


# -- nothing reaches the next borrower ------------------------------------------------------------------


def test_settings_of_a_borrow_end_with_its_transaction(pool_of):
    pool = pool_of(max_size=1)
    shown = "select current_setting('app.user', true), current_setting('work_mem')"
    with pool.connection(settings={"app.user": "ann", "work_mem": "5MB"}) as conn:
        assert conn.execute(shown).fetchone() == ("ann", "5MB")
        conn.commit()
        assert conn.execute(shown).fetchone() in {("", "4MB"), (None, "4MB")}
    assert pool.execute(shown).fetchone() == ("", "4MB")
    with pytest.raises(MisuseError, match="settings= was asked for with autocommit"):
        pool.connection(settings={"app.user": "ann"}, autocommit=True).__enter__()
    with (
        pytest.raises(psycopg.errors.InvalidParameterValue),
        pool.connection(settings={"work_mem": "nonsense"}),
    ):
        pass
    assert (pool.stats().idle, pool.stats().in_use) == (1, 0)


@pytest.mark.parametrize("of_pool", [False, True])
def test_autocommit_of_a_borrow_does_not_leak(of_pool, pool_of):
    pool = pool_of(max_size=1, autocommit=of_pool)
    with pool.connection(autocommit=not of_pool) as conn:
        assert conn.autocommit is not of_pool
    with pool.connection() as conn:
        assert conn.autocommit is of_pool
        conn.rollback()
        conn.autocommit = not of_pool  # by hand
    with pool.connection() as conn:
        assert conn.autocommit is of_pool
    pool.execute("select 1")
    with pool.connection() as conn:
        assert conn.autocommit is of_pool


HELD_BY_A_SESSION = {
    "search_path": ("set search_path to nowhere", "select current_setting('search_path')"),
    "a setting": ("set work_mem to '7MB'", "select current_setting('work_mem')"),
    "a setting of the app's": ("set app.tenant to '7'", "select nullif(current_setting('app.tenant', true), '')"),
    "role": ("set role visitor", "select current_user::text"),
    "session authorization": ("set session authorization visitor", "select session_user::text"),
    "temp table": ("create temp table temporary (n int)", "select to_regclass('pg_temp.temporary')::text"),
    "advisory lock": ("select pg_advisory_lock(4712)", "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"),
    "LISTEN": ("listen news", "select count(*) from pg_listening_channels()"),
    "PREPARE": ("prepare mine as select 1", "select count(*) from pg_prepared_statements where from_sql"),
    "WITH HOLD cursor": ("declare mine cursor with hold for select 1", "select count(*) from pg_cursors where is_holdable"),
    "isolation level": ("set session characteristics as transaction isolation level serializable", "select current_setting('default_transaction_isolation')"),
    "read only": ("set default_transaction_read_only to on", "select current_setting('default_transaction_read_only')"),
}  # fmt: skip


@pytest.fixture
def visitor(server):
    server.execute("create role visitor; create sequence numbers")
    yield
    server.execute("drop sequence numbers; drop role visitor")


def test_reset_session_clears_all_that_a_session_can_hold(visitor, pool_of):
    pool = pool_of(max_size=1, reset="session", autocommit=True)
    with pool.connection() as conn:
        backend = conn.info.backend_pid
        before = {kind: conn.execute(q).fetchone() for kind, (_, q) in HELD_BY_A_SESSION.items()}
    for kind, (change, question) in HELD_BY_A_SESSION.items():
        with pool.connection() as conn:
            conn.execute(change)
            assert conn.execute(question).fetchone() != before[kind], f"{kind} changes nothing"
        with pool.connection() as conn:
            assert conn.execute(question).fetchone() == before[kind], kind
            assert conn.info.backend_pid == backend, kind
    with pool.connection() as conn:
        conn.execute("select nextval('numbers')")
        assert conn.execute("select lastval()").fetchone() == (1,)
    with pool.connection() as conn, pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        conn.execute("select lastval()")
    with pool.connection() as conn:
        conn.autocommit = False
        conn.row_factory = dict_row
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        conn.read_only = True
    with pool.connection() as conn:
        assert conn.execute("select 1").fetchone() == (1,)
        assert (conn.autocommit, conn.isolation_level, conn.read_only) == (True, None, None)
    assert pool.stats().opened == 1


def test_reset_session_keeps_what_configure_set(pool_of):
    def configure(conn):
        conn.execute("set search_path to pg_catalog, public")
        conn.execute("listen always")
        conn.execute("prepare always as select 42")
        conn.row_factory = dict_row

    pool = pool_of(max_size=1, reset="session", autocommit=True, configure=configure)
    for _ in range(12):  # psycopg prepares a statement of its own at the sixth
        with pool.connection() as conn:
            assert conn.execute("show search_path").fetchone() == {
                "search_path": "pg_catalog, public"
            }
            assert conn.execute("execute always").fetchone() == {"?column?": 42}
            assert conn.execute("select pg_listening_channels() c").fetchall() == [{"c": "always"}]
            conn.execute("set search_path to nowhere")
            conn.execute("unlisten *")
            conn.row_factory = tuple_row
    assert pool.stats().opened == 1
