"""The psycopg2 driver on a real PostgreSQL: what a link does, and what it never lets through."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
import types
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions

from penstock import _drivers
from penstock._drivers.psycopg2 import deadline as psycopg2_deadline
from penstock._drivers.psycopg2.driver import driver
from penstock.drivers import Activity, NotAdopted, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.wire import WireProxy

    from penstock._drivers.psycopg2.link import Psycopg2Link
    from penstock.drivers import Driver
    from pytest_penstock.postgres import Server

    OpenLink = Callable[..., Psycopg2Link]

    conforming: Driver[extensions.connection] = driver  # to the protocol, for mypy to see

SECONDS = 20.0  # a bound for what is expected to work
GIVEN_BACK = "given back to its pool"


@pytest.fixture(params=["unix", "tcp", "tls"])
def dsn(request: pytest.FixtureRequest) -> str:
    kind = "tls_server" if request.param == "tls" else "server"
    running: Server = request.getfixturevalue(kind)
    return running.conninfo(over=request.param)


@pytest.fixture
def open_link(server: Server) -> Iterator[OpenLink]:
    links: list[Psycopg2Link] = []

    def open_link(conninfo: str | None = None, **options: Any) -> Psycopg2Link:
        recipe = Recipe(conninfo=conninfo or server.conninfo(over="unix"), **options)
        link = driver.open(recipe, SECONDS)
        links.append(link)
        return link

    yield open_link
    for link in links:
        link.close()


@pytest.fixture
def link(open_link: OpenLink) -> Psycopg2Link:
    link = open_link()
    link.prepare()
    return link


def one(link: Psycopg2Link, query: str) -> Any:
    reply = link.execute(query)
    assert reply.rows is not None
    return reply.rows[0][0]


def ask(conn: Any, query: str) -> Any:
    with conn.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()


def run(conn: Any, statement: str) -> None:
    with conn.cursor() as cursor:
        cursor.execute(statement)


def descriptors() -> set[str]:
    gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = monotonic() + SECONDS
    while not condition():
        if monotonic() > deadline:
            return False
    return True


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port where somebody listens and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# --- opening


def test_opens_and_answers_over_every_transport(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn)
    assert one(link, "select 1") == 1
    assert link.fd == link.conn.fileno()
    assert link.activity() is Activity.IDLE


class Mine(extensions.connection):
    """A class of the user's own, with attributes."""

    def greet(self) -> Any:
        return ask(self, "select 'hello'")


@pytest.mark.parametrize("way", ["connection_class", "connection_factory", "a function"])
def test_a_given_connection_class_stays_what_it_is(open_link: OpenLink, way: str) -> None:
    if way == "connection_class":
        link = open_link(connection_class=Mine)
    else:
        factory = Mine if way == "connection_factory" else partial(Mine)
        link = open_link(kwargs={"connection_factory": factory})
    conn = link.conn
    assert isinstance(conn, Mine)
    assert type(conn).__qualname__ == Mine.__qualname__
    assert type(conn).__module__ == Mine.__module__
    assert conn.greet() == ("hello",)
    conn.rollback()
    assert link.park()
    assert isinstance(conn, Mine)
    with pytest.raises(psycopg2.InterfaceError, match=GIVEN_BACK):
        conn.greet()
    link.lend()
    assert conn.greet() == ("hello",)


def test_psycopg2s_own_classes_work(open_link: OpenLink, tmp_path: Path) -> None:
    dicts = open_link(connection_class=psycopg2.extras.RealDictConnection)
    assert ask(dicts.conn, "select 1 as n") == {"n": 1}
    dicts.conn.rollback()
    assert dicts.execute("select 2 as n").rows == [{"n": 2}]
    logging: Any = open_link(connection_class=psycopg2.extras.LoggingConnection)
    log = tmp_path / "statements.log"
    with log.open("w") as file:
        logging.conn.initialize(file)
        logging.prepare()
        assert logging.execute("select 3").rows == [(3,)]
        assert logging.ping(SECONDS)
        assert logging.park()
    assert "select 3" in log.read_text()
    tuples = open_link(kwargs={"cursor_factory": psycopg2.extras.NamedTupleCursor})
    assert tuples.execute("select 4 as n").rows[0].n == 4  # type: ignore[index]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(kwargs={"connection_factory": dict}),
        Recipe(connection_class=int),
        Recipe(kwargs={"async_": True}),
    ],
)
def test_what_cannot_be_pooled_is_told_before_anything_is_opened(recipe: Recipe) -> None:
    with pytest.raises(psycopg2.ProgrammingError) as caught:
        driver.open(recipe, SECONDS)
    assert not driver.diagnose(caught.value, recipe, 1.0).heals


def test_a_function_that_makes_plain_connections_is_refused(server: Server) -> None:
    before = descriptors()
    recipe = Recipe(
        conninfo=server.conninfo(),
        kwargs={"connection_factory": partial(extensions.connection)},
    )
    with pytest.raises(NotAdopted, match="psycopg2's own class, which cannot be watched"):
        driver.open(recipe, SECONDS)
    assert descriptors() == before


def test_application_name_is_ours_only_if_the_user_named_none(
    server: Server, open_link: OpenLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = "show application_name"
    assert one(open_link(application_name="app/main/7"), show) == "app/main/7"
    theirs = server.conninfo(application_name="theirs")
    assert one(open_link(theirs, application_name="ours"), show) == "theirs"
    assert one(open_link(kwargs={"application_name": "kw"}, application_name="ours"), show) == "kw"
    monkeypatch.setenv("PGAPPNAME", "from environment")
    assert one(open_link(application_name="ours"), show) == "from environment"


def test_keepalives_are_ours_only_if_the_user_set_none(server: Server, open_link: OpenLink) -> None:
    def idle(link: Psycopg2Link) -> int:
        with socket.socket(fileno=os.dup(link.fd)) as raw:
            return int(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))

    ours = {"keepalives_idle": 31}
    assert idle(open_link(server.conninfo(), keepalive=ours)) == 31
    assert idle(open_link(server.conninfo(keepalives_idle=47), keepalive=ours)) == 47


def test_the_server_is_told_to_notice_dead_clients_at_one_round_trip(
    server: Server, proxy: WireProxy
) -> None:
    def round_trips(**options: Any) -> int:
        recipe = Recipe(conninfo=server.conninfo(port=proxy.port), **options)
        with proxy.counting() as count:
            driver.open(recipe, SECONDS).close()
        return count.round_trips

    assert round_trips() - round_trips(server_check_interval=None) == 1


@pytest.mark.parametrize(("option", "shown"), [("", "500ms"), ("2s", "2s")])
def test_the_check_interval_of_the_user_is_left_alone(
    server: Server, open_link: OpenLink, option: str, shown: str
) -> None:
    extra: dict[str, Any] = (
        {"options": f"-c client_connection_check_interval={option}"} if option else {}
    )
    link = open_link(server.conninfo(**extra))
    assert one(link, "show client_connection_check_interval") == shown


def test_a_deaf_server_costs_about_what_the_deadline_says_and_no_descriptor(deaf: int) -> None:
    recipe = Recipe(conninfo=f"host=127.0.0.1 port={deaf}", kwargs={"connect_timeout": 1})
    before = descriptors()
    started = monotonic()
    with pytest.raises(psycopg2.OperationalError):
        driver.open(recipe, 30.0)  # the user's own is shorter
    assert monotonic() - started < 10
    assert descriptors() == before


def test_every_address_gets_its_share_of_the_time(server: Server, deaf: int) -> None:
    recipe = Recipe(conninfo=f"host=127.0.0.1,127.0.0.1 port={deaf},{server.port} user=postgres")
    link = driver.open(recipe, 2.0)
    assert one(link, "select 1") == 1
    link.close()


def test_a_host_name_is_resolved_by_python_and_stays_the_name(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = socket.getaddrinfo

    def recorded(host: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", recorded)
    link = driver.open(Recipe(conninfo=server.conninfo(host="localhost")), SECONDS)
    assert asked == ["localhost"]
    assert link.conn.info.host == "localhost"
    assert "hostaddr=" in link.conn.dsn
    link.close()


def test_hosts_that_are_sockets_may_stand_beside_names(server: Server) -> None:
    recipe = Recipe(
        conninfo=server.conninfo(host="/nowhere/at/all,localhost", port=f"1,{server.port}")
    )
    link = driver.open(recipe, SECONDS)
    assert link.conn.info.host == "localhost"
    link.close()


def test_environment_names_the_host_too(
    server: Server, monkeypatch: pytest.MonkeyPatch, open_link: OpenLink
) -> None:
    monkeypatch.setenv("PGHOST", "localhost")
    monkeypatch.setenv("PGPORT", str(server.port))
    monkeypatch.setenv("PGUSER", "postgres")
    link = driver.open(Recipe(conninfo="dbname=postgres"), SECONDS)
    assert link.conn.info.port == server.port
    assert "hostaddr=" in link.conn.dsn
    link.close()


def test_an_interrupt_while_setting_up_leaves_no_descriptor(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock._drivers.psycopg2.link.Bound", interrupted)
    before = descriptors()
    with pytest.raises(KeyboardInterrupt):
        driver.open(Recipe(conninfo=server.conninfo()), SECONDS)
    assert descriptors() == before


SECRET = "hunter-two-and-a-half"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(conninfo=f"host=h password={SECRET} and more"),
        Recipe(conninfo=f"postgresql://u:{SECRET}%zz@h/d"),
        Recipe(conninfo=f"postgresql://u@h:5432/d?pass={SECRET}"),
        Recipe(conninfo="host=h", kwargs={"password": SECRET, "no_such": SECRET}),
    ],
)
def test_a_wrong_connection_string_is_told_without_its_secrets(recipe: Recipe) -> None:
    with pytest.raises(psycopg2.ProgrammingError) as caught:
        driver.open(recipe, SECONDS)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert SECRET not in "".join(shown.format())
    assert caught.value.__context__ is None
    assert not driver.diagnose(caught.value, recipe, 1.0).heals


def test_the_password_is_in_no_traceback_of_a_failed_connect() -> None:
    for recipe in (
        Recipe(conninfo="host=127.0.0.1 port=1", kwargs={"password": SECRET}),
        Recipe(conninfo=f"host=127.0.0.1 port=1 password={SECRET}"),
    ):
        with pytest.raises(psycopg2.OperationalError) as caught:
            driver.open(recipe, SECONDS)
        shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        assert SECRET not in "".join(shown.format())


def test_nothing_of_it_needs_psycopg_3(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name in sys.modules if name.startswith("penstock._drivers.psycopg2")]
    theirs = [name for name in sys.modules if name == "psycopg" or name.startswith("psycopg.")]
    for name in ours:
        package, _, last = name.rpartition(".")
        monkeypatch.setattr(sys.modules[package], last, sys.modules[name])  # put back later
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    for name in [*theirs, "psycopg", "penstock._drivers.psycopg3.diagnose"]:
        monkeypatch.setitem(sys.modules, name, None)
    alone = _drivers.load("psycopg2")
    assert alone is not driver
    link = alone.open(Recipe(conninfo=server.conninfo()), SECONDS)
    assert link.ping(SECONDS)
    link.close()
    recipe = Recipe(conninfo=server.conninfo(dbname="nowhere"))
    with pytest.raises(psycopg2.OperationalError) as caught:
        alone.open(recipe, SECONDS)
    found = alone.diagnose(caught.value, recipe, 1.0)
    assert (found.sqlstate, found.heals) == ("3D000", False)
    assert "nowhere" in found.text
    bad = Recipe(conninfo="host=127.0.0.1 port=1 sslmode=banana")
    with pytest.raises(psycopg2.OperationalError) as caught:
        alone.open(bad, SECONDS)
    assert not alone.diagnose(caught.value, bad, 1.0).heals


# --- lent and parked


def test_a_parked_connection_raises_and_a_lent_one_works(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn, autocommit=True)
    for _ in range(3):
        assert link.park()
        with pytest.raises(psycopg2.InterfaceError, match=GIVEN_BACK):
            link.conn.cursor()
        link.lend()
        assert ask(link.conn, "select 1") == (1,)


USES: dict[str, Callable[[Any], Any]] = {
    "cursor": lambda conn: conn.cursor(),
    "commit": lambda conn: conn.commit(),
    "rollback": lambda conn: conn.rollback(),
    "with": lambda conn: conn.__enter__(),
    "autocommit": lambda conn: setattr(conn, "autocommit", True),
    "reading autocommit": lambda conn: conn.autocommit,
    "isolation_level": lambda conn: setattr(conn, "isolation_level", 2),
    "readonly": lambda conn: setattr(conn, "readonly", True),
    "deferrable": lambda conn: setattr(conn, "deferrable", True),
    "cursor_factory": lambda conn: setattr(conn, "cursor_factory", psycopg2.extras.DictCursor),
    "set_session": lambda conn: conn.set_session(autocommit=True),
    "set_isolation_level": lambda conn: conn.set_isolation_level(0),
    "set_client_encoding": lambda conn: conn.set_client_encoding("LATIN1"),
    "notices": lambda conn: conn.notices,
    "notifies": lambda conn: conn.notifies.clear(),
    "fileno": lambda conn: conn.fileno(),
    "poll": lambda conn: conn.poll(),
    "info": lambda conn: conn.info.dbname,
    "cancel": lambda conn: conn.cancel(),
    "reset": lambda conn: conn.reset(),
    "lobject": lambda conn: conn.lobject(),
    "tpc": lambda conn: conn.tpc_begin("x"),
    "transaction status": lambda conn: conn.get_transaction_status(),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_returned_connection_raises_and_changes_nothing(
    link: Psycopg2Link, use: str
) -> None:
    assert link.park()
    with pytest.raises(psycopg2.InterfaceError, match=GIVEN_BACK):
        USES[use](link.conn)
    link.lend()
    assert link.park()


def test_every_method_and_attribute_of_psycopg2s_connection_is_thought_of(
    link: Psycopg2Link,
) -> None:
    link.park()
    harmless = {"closed", "close", "status"}
    for name in vars(extensions.connection):
        if name.startswith("__") or isinstance(getattr(psycopg2, name, None), type):
            continue
        if name in harmless:
            continue
        with pytest.raises(psycopg2.InterfaceError, match=GIVEN_BACK):
            found = getattr(link.conn, name)
            if isinstance(found, types.MethodType):
                found()
    assert link.conn.Error is psycopg2.Error  # a handler may still name it


def test_a_returned_connection_looks_closed_and_can_be_closed(link: Psycopg2Link) -> None:
    assert link.park()
    assert link.conn.closed
    assert GIVEN_BACK in repr(link.conn)
    link.conn.close()
    with pytest.raises(psycopg2.InterfaceError, match=GIVEN_BACK), link.conn:
        pass
    link.lend()
    assert not link.conn.closed
    assert one(link, "select 1") == 1


def test_registering_works_on_a_lent_connection_and_ends_with_the_lease(
    open_link: OpenLink,
) -> None:
    link = open_link()
    link.prepare()
    loud = extensions.new_type((25,), "LOUD", lambda value, _cursor: value and value.upper())
    for _ in range(2):
        extensions.register_type(loud, link.conn)
        psycopg2.extras.register_uuid(conn_or_curs=link.conn)
        psycopg2.extras.register_default_json(link.conn, loads=lambda text: f"json {text}")
        assert one(link, "select 'a'::text") == "A"
        assert one(link, "select '1'::json") == "json 1"
        assert link.park()
        link.lend()
        assert one(link, "select 'a'::text") == "a"
        assert one(link, "select '1'::json") == 1


def test_types_that_configure_registered_stay(link: Psycopg2Link) -> None:
    loud = extensions.new_type((25,), "LOUD", lambda value, _cursor: value and value.upper())
    quiet = extensions.new_type((25,), "QUIET", lambda value, _cursor: value and value.lower())
    extensions.register_type(loud, link.conn)
    link.prepare()
    assert link.park()
    link.lend()
    extensions.register_type(quiet, link.conn)  # the same key: it is the value that differs
    assert one(link, "select 'Ab'::text") == "ab"
    assert link.park()
    link.lend()
    assert one(link, "select 'Ab'::text") == "AB"


def test_a_dropped_link_ends_its_session_at_once_without_the_garbage_collector(
    server: Server,
) -> None:
    gc.disable()
    try:
        link = driver.open(Recipe(conninfo=server.conninfo()), SECONDS)
        ask(link.conn, "select 1")
        link.park()
        fd = link.fd
        del link
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    finally:
        gc.enable()


def test_a_discarded_connection_that_is_collected_says_nothing(
    server: Server, proxy: WireProxy
) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    ask(link.conn, "select 1")
    with proxy.counting() as count:
        link.discard()
        conn = link.conn
        del link
        gc.collect()
        del conn
        gc.collect()
    assert count.round_trips == 0


def test_psycopg2s_own_with_commits_and_does_not_close(link: Psycopg2Link) -> None:
    with link.conn as conn:
        run(conn, "create temp table t (a int)")
    assert not link.conn.closed and link.activity() is Activity.IDLE
    assert link.park()
    link.lend()
    assert one(link, "select count(*) from t") == 0
    with pytest.raises(KeyError), link.conn as conn:
        run(conn, "insert into t values (1)")
        raise KeyError
    assert link.park()
    link.lend()
    assert one(link, "select count(*) from t") == 0


def test_closing_in_a_lease_ends_the_session(link: Psycopg2Link) -> None:
    link.conn.close()
    assert link.activity() is Activity.BROKEN
    link.commit()  # closing was the borrower's wish
    assert not link.park() and not link.tidy(SECONDS) and not link.ping(SECONDS)


def test_a_transaction_makes_it_unclean_and_tidy_rolls_it_back(link: Psycopg2Link) -> None:
    run(link.conn, "create table never (a int)")
    assert not link.park()
    assert link.activity() is Activity.IN_TRANSACTION
    assert link.tidy(SECONDS)
    assert link.activity() is Activity.IDLE
    link.lend()
    assert one(link, "select to_regclass('never')") is None


def test_a_failed_transaction_is_tidied_too(link: Psycopg2Link) -> None:
    with pytest.raises(psycopg2.errors.DivisionByZero):
        run(link.conn, "select 1/0")
    assert not link.park()
    assert link.activity() is Activity.IN_FAILED_TRANSACTION
    assert link.tidy(SECONDS)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_that_sql_ended_is_not_open_for_psycopg2_either(
    link: Psycopg2Link, server: Server, end: str
) -> None:
    """Else psycopg2 sends no BEGIN for the next borrower, and his rollback rolls nothing back."""
    run(link.conn, "select 1")
    run(link.conn, end)
    assert link.activity() is Activity.IDLE
    assert not link.park()
    assert link.tidy(SECONDS)
    link.lend()
    run(link.conn, "create table never (a int)")
    assert link.activity() is Activity.IN_TRANSACTION
    link.conn.rollback()
    assert one(link, "select to_regclass('never')") is None


def test_a_transaction_that_sql_began_is_rolled_back_and_committed(open_link: OpenLink) -> None:
    """In autocommit psycopg2's own commit() and rollback() do nothing."""
    link = open_link(autocommit=True)
    link.prepare()
    run(link.conn, "create temp table t (a int)")
    run(link.conn, "begin")
    run(link.conn, "insert into t values (1)")
    assert not link.park()
    assert link.tidy(SECONDS)
    link.lend()
    assert one(link, "select count(*) from t") == 0
    run(link.conn, "begin")
    run(link.conn, "insert into t values (1)")
    link.commit()
    assert link.park()
    link.lend()
    assert one(link, "select count(*) from t") == 1


def test_a_two_phase_commit_left_in_the_middle_makes_a_link_unfit(link: Psycopg2Link) -> None:
    link.conn.tpc_begin(link.conn.xid(1, "gtrid", "bqual"))
    assert not link.park() and not link.tidy(SECONDS)


def setting(**values: Any) -> Callable[[Any], Any]:
    """What sets these attributes, one after the other."""

    def change(conn: Any) -> None:
        for name, value in values.items():
            setattr(conn, name, value)

    return change


def running(*statements: str) -> Callable[[Any], Any]:
    """What runs these statements and commits."""

    def change(conn: Any) -> None:
        for statement in statements:
            run(conn, statement)
        conn.commit()

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "autocommit": setting(autocommit=True),
    "isolation_level": setting(isolation_level="SERIALIZABLE"),
    "readonly": setting(readonly=True),
    "deferrable": setting(deferrable=True),
    "set_session": lambda conn: conn.set_session(readonly=True, autocommit=True),
    "set_isolation_level": lambda conn: conn.set_isolation_level(0),
    "autocommit, then readonly": setting(
        autocommit=True, readonly=True, isolation_level="SERIALIZABLE"
    ),
    "readonly, then autocommit": setting(readonly=True, autocommit=True),
    "cursor_factory": setting(cursor_factory=psycopg2.extras.DictCursor),
    "encoding": lambda conn: conn.set_client_encoding("LATIN1"),
    "other notices": setting(notices=["theirs"]),
    "other notifies": setting(notifies=["theirs"]),
    "a notice": running("do $$begin raise notice 'psst'; end$$"),
    "a notification": running("listen c", "notify c", "unlisten c"),
    "reset": lambda conn: conn.reset(),
}


def visible(conn: Any) -> dict[str, Any]:
    found = {
        "autocommit": conn.autocommit,
        "isolation": conn.isolation_level,
        "readonly": conn.readonly,
        "deferrable": conn.deferrable,
        "cursors": conn.cursor_factory,
        "encoding": conn.encoding,
        "notices": list(conn.notices),
        "notifies": list(conn.notifies),
    }
    shown = "select current_setting(name) from unnest(%s) name"
    names = ["transaction_read_only", "transaction_isolation", "transaction_deferrable"]
    names += ["default_transaction_read_only", "default_transaction_isolation", "client_encoding"]
    with conn.cursor() as cursor:
        cursor.execute(shown, (names,))
        found["server"] = cursor.fetchall()
    conn.rollback()
    return found


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_client_side_setting_reaches_the_next_borrower(
    open_link: OpenLink, change: str, autocommit: bool
) -> None:
    link = open_link(autocommit=autocommit)
    link.prepare()
    expected = visible(link.conn)
    for _ in range(2):  # the way back must leave the watch as it was
        CHANGES[change](link.conn)
        assert link.park() or link.tidy(SECONDS)
        link.lend()
        assert visible(link.conn) == expected
        assert link.park()
        link.lend()


def test_what_psycopg2_keeps_to_itself_is_set_back_without_a_round_trip(
    server: Server, proxy: WireProxy
) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    link.prepare()
    with proxy.counting() as count:
        for change in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory"):
            CHANGES[change](link.conn)
            assert link.park()
            link.lend()
    assert count.round_trips == 0
    link.close()


def test_what_configure_set_is_what_a_connection_goes_back_to(link: Psycopg2Link) -> None:
    link.conn.set_session(isolation_level="SERIALIZABLE", readonly=True)
    link.conn.cursor_factory = psycopg2.extras.RealDictCursor
    link.prepare()
    expected = visible(link.conn)
    link.conn.set_session(isolation_level="DEFAULT", readonly=False, autocommit=True)
    link.conn.cursor_factory = None  # type: ignore[assignment]  # psycopg2's own
    assert link.park() or link.tidy(SECONDS)
    link.lend()
    assert visible(link.conn) == expected
    assert link.execute("select 1 as n").rows == [{"n": 1}]
    assert link.ping(SECONDS)
    assert visible(link.conn) == expected


def test_no_more_notices_are_kept_than_by_psycopg2(link: Psycopg2Link) -> None:
    run(link.conn, "do $$begin for n in 1..70 loop raise notice '%', n; end loop; end$$")
    assert isinstance(link.conn.notices, list)
    assert len(link.conn.notices) == 50
    assert link.conn.notices[-1] == "NOTICE:  70\n"


def test_autocommit_of_one_borrow_ends_with_it(link: Psycopg2Link) -> None:
    link.set_autocommit(True)
    assert link.conn.autocommit
    assert link.park()
    link.lend()
    assert not link.conn.autocommit
    run(link.conn, "select 1")
    with pytest.raises(psycopg2.ProgrammingError):
        link.set_autocommit(True)


def test_a_with_block_that_somebody_is_still_inside_makes_a_link_unfit(
    link: Psycopg2Link,
) -> None:
    link.conn.__enter__()
    assert not link.park() and not link.tidy(SECONDS)
    link.lend()  # leave it properly, and it is fit again
    link.conn.__exit__(None, None, None)
    assert link.park()


def test_a_statement_under_way_in_another_thread_is_found(link: Psycopg2Link) -> None:
    raised: list[BaseException] = []

    def sleep() -> None:
        try:
            run(link.conn, "select pg_sleep(60)")
        except psycopg2.Error as error:
            raised.append(error)

    thread = threading.Thread(target=sleep)
    thread.start()
    assert eventually(lambda: link.activity() is Activity.ACTIVE)
    assert not link.park() and not link.tidy(SECONDS)
    link.close()  # does not wait for its end
    thread.join(SECONDS)
    assert isinstance(raised[0], psycopg2.OperationalError)


# --- one statement


def test_execute_is_one_round_trip_and_keeps_the_autocommit_flag(
    server: Server, proxy: WireProxy
) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    link.prepare()
    with proxy.counting() as count:
        reply = link.execute("select %s::int as a", (7,))
    assert count.round_trips == 1
    assert reply.rows == [(7,)] and reply.rowcount == 1 and reply.statusmessage == "SELECT 1"
    assert reply.description[0].name == "a"
    assert not link.conn.autocommit
    assert link.park()
    link.close()


def test_execute_answers_as_psycopg2_shows_it(link: Psycopg2Link) -> None:
    assert link.execute("create temp table t (a int)").rows is None
    assert link.execute("insert into t values (1), (2)").rowcount == 2
    assert link.execute("select 1; select 2").rows == [(2,)]
    link.conn.cursor_factory = psycopg2.extras.RealDictCursor
    assert link.execute("select 1 as a").rows == [{"a": 1}]


def test_execute_keeps_the_flag_and_the_session_after_an_error_or_interrupt(
    link: Psycopg2Link,
) -> None:
    with pytest.raises(psycopg2.errors.DivisionByZero):
        link.execute("select 1/0")
    assert not link.conn.autocommit and link.activity() is Activity.IDLE

    class Interrupted(extensions.cursor):
        def execute(self, *_: Any) -> None:
            raise KeyboardInterrupt

    link.conn.cursor_factory = Interrupted
    with pytest.raises(KeyboardInterrupt):
        link.execute("select 1")
    assert not link.conn.autocommit and link.park()


def test_execute_refuses_to_commit_somebodys_transaction(link: Psycopg2Link) -> None:
    run(link.conn, "select 1")
    with pytest.raises(psycopg2.ProgrammingError, match="transaction"):
        link.execute("select 1")
    assert link.activity() is Activity.IN_TRANSACTION


def test_commit_commits_only_what_was_begun(server: Server, proxy: WireProxy) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    with proxy.counting() as count:
        link.commit()
    assert count.round_trips == 0
    run(link.conn, "create temp table kept (a int)")
    link.commit()
    assert link.park()
    link.close()


def test_commit_of_a_lost_session_raises_though_its_error_was_caught(
    link: Psycopg2Link, server: Server
) -> None:
    run(link.conn, "create temp table gone (a int)")
    terminate(server, link)
    with suppress(psycopg2.OperationalError):
        run(link.conn, "select 1")
    with pytest.raises(psycopg2.OperationalError, match="lost"):
        link.commit()
    assert link.conn.broken  # type: ignore[attr-defined]  # as psycopg 3 has it


@pytest.mark.parametrize("autocommit", [False, True])
def test_settings_hold_for_the_transaction_and_end_with_it(
    server: Server, proxy: WireProxy, autocommit: bool
) -> None:
    recipe = Recipe(
        conninfo=server.conninfo(port=proxy.port),
        autocommit=autocommit,
        kwargs={"cursor_factory": psycopg2.extras.DictCursor},
    )
    link = driver.open(recipe, SECONDS)
    link.prepare()
    with proxy.counting() as count:
        link.apply_settings({"app.user": "o'brien", "work_mem": "3MB", "app.number": 7})
    assert count.round_trips == 2
    query = "select current_setting('app.user'), current_setting('work_mem')"
    assert list(ask(link.conn, query)) == ["o'brien", "3MB"]
    run(link.conn, "create temp table kept (a int)")
    link.commit()
    assert link.park()
    link.lend()
    assert one(link, "select coalesce(current_setting('app.user', true), '')") == ""
    assert one(link, "show work_mem") != "3MB"
    link.apply_settings({})
    assert link.activity() is Activity.IDLE
    link.close()


# --- bounded calls


@contextmanager
def stopped(link: Psycopg2Link) -> Iterator[None]:
    """Its server process does nothing, and its kernel goes on acknowledging.

    After a while it runs again, so that what waits for it without a deadline fails and does not hang.
    """
    pid = link.conn.get_backend_pid()
    rescue = threading.Timer(SECONDS, os.kill, (pid, signal.SIGCONT))
    rescue.start()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        rescue.cancel()
        rescue.join()


@pytest.fixture
def frozen(server: Server, open_link: OpenLink) -> Iterator[Psycopg2Link]:
    link = open_link(server.conninfo(), reset="session")
    link.prepare()
    with stopped(link):
        yield link


def took(call: Callable[[], Any], at_least: float) -> Any:
    started = monotonic()
    answer = call()
    assert at_least < monotonic() - started < 10
    return answer


def test_a_ping_of_a_frozen_server_ends_at_the_deadline(frozen: Psycopg2Link) -> None:
    assert took(lambda: frozen.ping(0.2), 0.19) is False
    assert frozen.activity() is Activity.BROKEN
    assert not frozen.tidy(0.2)


def test_a_rollback_on_a_frozen_server_ends_at_the_deadline(
    server: Server, open_link: OpenLink
) -> None:
    link = open_link(server.conninfo())
    link.prepare()
    run(link.conn, "select 1")
    with stopped(link):
        assert not link.park()
        assert took(lambda: link.tidy(0.2), 0.19) is False


def test_a_reset_on_a_frozen_server_ends_at_its_bound(
    frozen: Psycopg2Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock._drivers.psycopg2.link.RESET_SECONDS", 0.2)
    assert took(frozen.start_reset, 0.19) is False


def test_deadlines_of_many_calls_are_kept_in_whatever_order_they_come() -> None:
    class Noted:
        def __init__(self) -> None:
            self.rang = threading.Event()

        def discard(self) -> None:
            self.rang.set()

    def bound(link: Noted, seconds: float) -> psycopg2_deadline.Bound:
        return psycopg2_deadline.Bound(link, monotonic() + seconds)

    late, soon, over, unbounded = Noted(), Noted(), Noted(), Noted()
    with (
        bound(late, 1000) as not_yet,
        psycopg2_deadline.Bound(unbounded, float("inf")),
        bound(soon, 0.05) as first,
    ):
        with bound(over, 0.02):
            pass
        assert soon.rang.wait(SECONDS)
        with bound(soon, -1) as past:
            assert eventually(lambda: past.rang)
    assert first.rang and not not_yet.rang
    assert not over.rang.is_set() and not unbounded.rang.is_set() and not late.rang.is_set()


def test_a_deadline_is_kept_in_a_forked_child_too(server: Server, open_link: OpenLink) -> None:
    """There the thread of the parent does not run."""
    open_link().ping(SECONDS)  # starts it
    child = os.fork()
    if child == 0:  # no pytest from here on
        try:
            own = driver.open(Recipe(conninfo=server.conninfo()), SECONDS)
            with stopped(own):
                answer = own.ping(0.2)
            os._exit(0 if answer is False else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_ping_works_parked_and_leaves_it_parked(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn)
    link.prepare()
    link.park()
    assert link.ping(SECONDS)
    assert link.conn.closed
    link.lend()
    assert link.park()


def test_a_wait_callback_that_knows_nothing_of_pools_works_on_a_parked_connection(
    open_link: OpenLink,
) -> None:
    """As psycogreen's: under gevent psycopg2 waits by calling it with the connection."""
    heard: list[bool] = []

    def wait_for(conn: Any) -> None:
        heard.append(bool(conn.closed))
        if conn.closed:  # for everybody else
            with pytest.raises(psycopg2.InterfaceError, match=GIVEN_BACK):
                conn.cursor()
        while (state := conn.poll()) != extensions.POLL_OK:
            wanted = ([conn], []) if state == extensions.POLL_READ else ([], [conn])
            select.select(*wanted, [], SECONDS)

    extensions.set_wait_callback(wait_for)
    try:
        link = open_link(reset="session")
        link.prepare()
        run(link.conn, "select 1")
        assert not link.park()
        assert link.tidy(SECONDS)
        assert link.ping(SECONDS)
        assert link.start_reset() and link.finish_reset(SECONDS)
        assert heard[-1]
        link.lend()
        assert one(link, "select 1") == 1
        assert link.park()
    finally:
        extensions.set_wait_callback(None)


def test_ping_is_one_round_trip(server: Server, proxy: WireProxy) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    link.prepare()
    with proxy.counting() as count:
        assert link.ping(SECONDS)
    assert count.round_trips == 1
    link.close()


# --- session reset

DIRT = [
    "set search_path to pg_catalog",
    "set statement_timeout to '77s'",
    "create temp table dirt (a int)",
    "prepare dirt as select 1",
    "declare dirt cursor with hold for select 1",
    "listen dirt",
    "select pg_advisory_lock(77)",
    "create temp sequence dirty; select nextval('dirty')",
    "set role pg_monitor",
]
STATE = """
select current_setting('search_path'), current_setting('statement_timeout'), current_user::text,
 session_user::text, to_regclass('pg_temp.dirt')::text,
 (select count(*) from pg_prepared_statements where from_sql), (select count(*) from pg_cursors),
 (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
 array(select pg_listening_channels() order by 1), current_setting('application_name'),
 current_setting('client_connection_check_interval'), current_setting('work_mem'),
 current_setting('datestyle')"""


def dirty(link: Psycopg2Link) -> None:
    for statement in DIRT:
        link.execute(statement)


def reset(link: Psycopg2Link) -> None:
    assert link.park() or link.tidy(SECONDS)
    assert link.start_reset()
    assert link.finish_reset(SECONDS)
    link.lend()


def test_a_reset_clears_all_that_a_session_holds(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn, reset="session")
    link.prepare()
    expected = link.execute(STATE).rows
    dirty(link)
    reset(link)
    assert link.execute(STATE).rows == expected


def test_a_reset_is_one_round_trip(server: Server, proxy: WireProxy) -> None:
    recipe = Recipe(conninfo=server.conninfo(port=proxy.port), reset="session")
    link = driver.open(recipe, SECONDS)
    with proxy.counting() as learning:
        link.prepare()
    with proxy.counting() as count:
        reset(link)
    assert (learning.round_trips, count.round_trips) == (1, 1)
    link.close()


def test_a_reset_keeps_what_configure_set(server: Server, open_link: OpenLink) -> None:
    link = open_link(reset="session")
    for statement in (
        "set work_mem to '7MB'",
        'set search_path to "we\'ird \\", public',
        "set datestyle to 'German, DMY'",
        'listen "chan\'nel "',
        "prepare kept as select 1",
        "set role pg_read_all_data",
    ):
        link.execute(statement)
    link.prepare()
    expected = link.execute(STATE).rows
    for _ in range(2):
        link.execute("reset role")
        dirty(link)
        reset(link)
        assert link.execute(STATE).rows == expected


def test_a_reset_is_learned_whatever_configure_makes_of_texts(open_link: OpenLink) -> None:
    link = open_link(reset="session")
    shout = extensions.new_type((19, 25), "SHOUT", lambda value, _cursor: value and value.upper())
    extensions.register_type(shout, link.conn)
    link.execute("set search_path to pg_catalog, public")
    link.prepare()
    link.execute("set search_path to public")
    reset(link)
    assert one(link, "select current_setting('search_path') = 'pg_catalog, public'")


def test_a_reset_in_an_open_transaction_ends_it(open_link: OpenLink) -> None:
    link = open_link(reset="session")
    run(link.conn, "select 1")
    assert link.start_reset()
    assert link.finish_reset(SECONDS)
    assert link.activity() is Activity.IDLE


def test_notifications_of_the_last_borrower_are_gone_after_a_reset(open_link: OpenLink) -> None:
    link = open_link(reset="session", autocommit=True)
    link.prepare()
    run(link.conn, "listen c")
    other = open_link(autocommit=True)
    run(other.conn, "notify c")
    assert select.select([link.fd], [], [], SECONDS)[0]  # it is here, and nobody has read it
    reset(link)
    link.conn.poll()
    assert list(link.conn.notifies) == []


def test_a_reset_that_fails_is_not_clean(open_link: OpenLink) -> None:
    link = open_link(reset="session")
    link._reset = "select 1/0"
    assert not link.start_reset()


def test_a_reset_of_a_dead_session_is_refused(server: Server, open_link: OpenLink) -> None:
    link = open_link(reset="session")
    link.prepare()
    terminate(server, link)
    assert not (link.start_reset() and link.finish_reset(SECONDS))


# --- the end of a session


def terminate(server: Server, link: Psycopg2Link) -> None:
    """End its server process and wait until the end of the stream is here."""
    pid = extensions.connection.get_backend_pid(link.conn)
    server.execute(f"select pg_terminate_backend({pid}, 10000)")
    assert select.select([link.fd], [], [], SECONDS)[0]


def test_hung_up_sees_the_end_and_only_the_end(
    dsn: str, open_link: OpenLink, server: Server, request: pytest.FixtureRequest
) -> None:
    link = open_link(dsn)
    link.park()
    assert not link.hung_up()
    over_tls = "sslrootcert" in dsn
    terminate(request.getfixturevalue("tls_server") if over_tls else server, link)
    assert link.hung_up() and link.hung_up()


def test_a_notification_is_no_hang_up(open_link: OpenLink) -> None:
    link = open_link(autocommit=True)
    run(link.conn, "listen c")
    other = open_link(autocommit=True)
    run(other.conn, "notify c")
    assert select.select([link.fd], [], [], SECONDS)[0]
    assert not link.hung_up()
    assert link.ping(SECONDS)


def test_close_ends_the_session_and_can_be_repeated(server: Server, open_link: OpenLink) -> None:
    link = open_link()
    pid = link.conn.get_backend_pid()
    link.park()
    link.close()
    link.close()
    assert link.conn.closed
    ended = f"select count(*) from pg_stat_activity where pid = {pid}"
    assert eventually(lambda: server.execute(ended) == [("0",)])


def test_discard_wakes_whoever_is_blocked_in_it_and_frees_nothing(
    dsn: str, open_link: OpenLink
) -> None:
    link = open_link(dsn, autocommit=True)
    raised: list[BaseException] = []

    def blocked() -> None:
        try:
            run(link.conn, "select pg_sleep(60)")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=blocked)
    thread.start()
    assert eventually(lambda: link.activity() is Activity.ACTIVE)
    link.discard()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert isinstance(raised[0], psycopg2.OperationalError)
    link.discard()


def test_discard_leaves_alone_a_stranger_with_the_same_number(link: Psycopg2Link) -> None:
    ours, theirs = socket.socketpair()
    link.close()
    os.dup2(ours.fileno(), link.fd)
    try:
        link.discard()
        link.abandon(busy=False)
        theirs.send(b"still here")
        assert os.read(link.fd, 20) == b"still here"
    finally:
        os.close(link.fd)
        ours.close()
        theirs.close()


def leads_nowhere(fd: int) -> bool:
    return os.path.samestat(os.fstat(fd), Path(os.devnull).stat())


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_lets_go_without_disturbing_the_parent(
    dsn: str, open_link: OpenLink, busy: bool
) -> None:
    link = open_link(dsn)
    run(link.conn, "create temp table mine (a int)")
    child = os.fork()
    if child == 0:  # no pytest from here on
        try:
            link.abandon(busy=busy)
            with pytest.raises(psycopg2.InterfaceError, match="before the fork"):
                link.conn.cursor()
            # A busy one keeps its descriptor, which leads to nowhere now; others have closed it.
            os._exit(0 if link.conn.closed and (not busy or leads_nowhere(link.fd)) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(link.conn, "select count(*) from mine") == (0,)


def test_a_child_forked_while_a_statement_is_under_way_does_not_hang(
    dsn: str, open_link: OpenLink
) -> None:
    """psycopg2's lock of that connection is held for ever in the child, so close() would never end."""
    link = open_link(dsn, autocommit=True)
    thread = threading.Thread(target=run, args=(link.conn, "select pg_sleep(0.5)"))
    thread.start()
    assert eventually(lambda: link.activity() is Activity.ACTIVE)
    child = os.fork()
    if child == 0:  # no pytest from here on
        try:
            signal.alarm(20)
            link.abandon(busy=True)
            del link
            gc.collect()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join(SECONDS)
    assert ask(link.conn, "select 1") == (1,)


@pytest.mark.parametrize(
    ("sqlstate", "read_write", "ends"),
    [
        ("57P01", False, True),
        ("57P02", False, True),
        ("57P03", False, True),
        ("08006", False, True),
        ("25006", True, True),
        ("25006", False, False),
        ("57014", True, False),
        ("40001", True, False),
    ],
)
def test_which_codes_end_a_session(
    link: Psycopg2Link, sqlstate: str, read_write: bool, ends: bool
) -> None:
    body = f"do $$begin raise sqlstate '{sqlstate}'; end$$"
    with pytest.raises(psycopg2.Error) as caught:
        run(link.conn, body)
    assert caught.value.pgcode == sqlstate
    assert driver.ends_session(caught.value, read_write=read_write) is ends


def test_a_network_that_gave_up_ends_a_session_and_a_plain_bug_does_not() -> None:
    assert driver.ends_session(psycopg2.OperationalError("x"), read_write=False)
    assert not driver.ends_session(psycopg2.InterfaceError("x"), read_write=True)
    assert not driver.ends_session(ValueError("x"), read_write=True)


# --- why a connect failed


def diagnosis(recipe: Recipe) -> tuple[str | None, bool]:
    with pytest.raises(psycopg2.Error) as caught:
        driver.open(recipe, SECONDS)
    assert caught.value.pgcode is None, "psycopg2 tells now? then psycopg 3 need not be asked"
    before = descriptors()
    found = driver.diagnose(caught.value, recipe, SECONDS)
    assert descriptors() == before
    return found.sqlstate, found.heals


def test_what_the_server_refuses_is_told_with_the_help_of_psycopg_3(server: Server) -> None:
    nowhere = Recipe(conninfo=server.conninfo(dbname="nowhere"))
    assert diagnosis(nowhere) == ("3D000", False)
    assert diagnosis(replace(nowhere, connection_class=Mine)) == ("3D000", False)
    assert diagnosis(Recipe(conninfo=server.conninfo(user="nobody_here"))) == ("28000", False)


def test_nobody_listening_heals(deaf: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert diagnosis(Recipe(conninfo=f"host=127.0.0.1 port={port}")) == (None, True)
    assert diagnosis(Recipe(conninfo=f"host=/nowhere/at/all port={port}")) == (None, True)


@pytest.mark.parametrize(("code", "heals"), [("EAI_NONAME", False), ("EAI_AGAIN", True)])
def test_an_unknown_host_name_does_not_heal_but_a_silent_resolver_does(
    monkeypatch: pytest.MonkeyPatch, code: str, heals: bool
) -> None:
    def unresolved(*_: Any, **__: Any) -> None:
        raise socket.gaierror(getattr(socket, code), "in some language")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert diagnosis(Recipe(conninfo="host=db.example")) == (None, heals)


def test_a_bad_value_of_an_option_does_not_heal() -> None:
    for bad in ("sslmode=banana", "target_session_attrs=x", "channel_binding=x"):
        assert diagnosis(Recipe(conninfo=f"host=127.0.0.1 port=1 {bad}")) == (None, False)
