"""The psycopg 3 driver on a real PostgreSQL: what a link does, and what it never lets through."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import struct
import threading
import traceback
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.rows import dict_row, tuple_row
from psycopg.types import TypeInfo
from psycopg.types.json import set_json_loads

from penstock._drivers.psycopg3.driver import Psycopg3Link, driver
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.wire import WireProxy

    from penstock.drivers import Driver
    from pytest_penstock.postgres import Server

    OpenLink = Callable[..., Psycopg3Link]

    conforming: Driver[psycopg.Connection[Any]] = driver  # to the protocol, for mypy to see

SECONDS = 20.0  # a bound for what is expected to work
GIVEN_BACK = "given back to its pool"


@pytest.fixture(params=["unix", "tcp", "tls"])
def dsn(request: pytest.FixtureRequest) -> str:
    kind = "tls_server" if request.param == "tls" else "server"
    running: Server = request.getfixturevalue(kind)
    return running.conninfo(over=request.param)


@pytest.fixture
def open_link(server: Server) -> Iterator[OpenLink]:
    links: list[Psycopg3Link] = []

    def open_link(conninfo: str | None = None, **options: Any) -> Psycopg3Link:
        recipe = Recipe(conninfo=conninfo or server.conninfo(over="unix"), **options)
        link = driver.open(recipe, SECONDS)
        links.append(link)
        return link

    yield open_link
    for link in links:
        link.close()


@pytest.fixture
def link(open_link: OpenLink) -> Psycopg3Link:
    link = open_link()
    link.prepare()
    return link


def one(link: Psycopg3Link, query: str) -> Any:
    reply = link.execute(query)
    assert reply.rows is not None
    return reply.rows[0][0]


def descriptors() -> set[str]:
    gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port where somebody listens and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# --- opening


def test_opens_and_answers_over_every_transport(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn)
    assert one(link, "select 1") == 1
    assert link.fd == link.conn.pgconn.socket
    assert link.activity() is Activity.IDLE


def test_a_given_connection_class_stays_what_it_is(open_link: OpenLink) -> None:
    class Mine(psycopg.Connection[Any]):
        pass

    link = open_link(connection_class=Mine)
    assert isinstance(link.conn, Mine)
    assert type(link.conn).__qualname__ == Mine.__qualname__
    assert type(link.conn).__module__ == Mine.__module__
    assert "Mine" in repr(link.conn)


def test_settings_are_those_that_connect_would_make(open_link: OpenLink) -> None:
    class Cursor(psycopg.Cursor[Any]):
        pass

    context = psycopg.adapt.AdaptersMap(psycopg.adapters)
    set_json_loads(lambda text: "mine", context)
    kwargs = {
        "row_factory": dict_row,
        "cursor_factory": Cursor,
        "prepare_threshold": None,
        "context": context,
        "connect_timeout": 5,
    }
    conn = open_link(kwargs=kwargs, autocommit=True).conn
    assert conn.autocommit and conn.prepare_threshold is None
    assert isinstance(conn.cursor(), Cursor)
    assert conn.execute("select '1'::json as j").fetchone() == {"j": "mine"}


def test_what_is_registered_globally_before_the_first_use_is_known(open_link: OpenLink) -> None:
    before = psycopg.adapt.AdaptersMap(psycopg.adapters)
    link = open_link()
    loader = before.get_loader(25, psycopg.pq.Format.TEXT)
    assert loader is not None

    class Loud(psycopg.adapt.Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    psycopg.adapters.register_loader("text", Loud)
    try:
        assert one(link, "select 'a'::text") == "A"
    finally:
        psycopg.adapters.register_loader("text", loader)


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
    def idle(link: Psycopg3Link) -> int:
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


@pytest.mark.parametrize("extra", [{}, {"connect_timeout": 1}])
def test_a_deaf_server_costs_what_the_deadline_says_and_no_descriptor(
    deaf: int, extra: dict[str, Any]
) -> None:
    recipe = Recipe(conninfo=f"host=127.0.0.1 port={deaf}", kwargs=extra)
    before = descriptors()
    started = monotonic()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        driver.open(recipe, None if extra else 0.2)
    assert (0.9 if extra else 0.19) < monotonic() - started < 5
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
    recipe = Recipe(conninfo=server.conninfo(host="localhost"))
    link = driver.open(recipe, SECONDS)
    assert asked == ["localhost"]
    assert link.conn.info.host == "localhost" and link.conn.info.hostaddr in ("127.0.0.1", "::1")
    link.close()


def test_environment_names_the_host_too(
    server: Server, monkeypatch: pytest.MonkeyPatch, open_link: OpenLink
) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(server.port))
    monkeypatch.setenv("PGUSER", "postgres")
    link = driver.open(Recipe(conninfo="dbname=postgres"), SECONDS)
    assert link.conn.info.port == server.port
    link.close()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_connecting_leaves_no_descriptor(
    deaf: int, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    def interrupted(*_: Any) -> int:
        raise interrupt

    monkeypatch.setattr("penstock._drivers.psycopg3.connect.wait", interrupted)
    before = descriptors()
    with pytest.raises(interrupt):
        driver.open(Recipe(conninfo=f"host=127.0.0.1 port={deaf}"), SECONDS)
    assert descriptors() == before


def test_an_interrupt_while_setting_up_leaves_no_descriptor(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock._drivers.psycopg3.driver.ask", interrupted)
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
    with pytest.raises(psycopg.ProgrammingError) as caught:
        driver.open(recipe, SECONDS)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert SECRET not in "".join(shown.format())
    assert caught.value.__context__ is None
    assert not driver.diagnose(caught.value, recipe, 1.0).heals


def test_the_password_is_in_no_traceback_of_a_failed_connect() -> None:
    recipe = Recipe(conninfo="host=127.0.0.1 port=1", kwargs={"password": SECRET})
    with pytest.raises(psycopg.OperationalError) as caught:
        driver.open(recipe, SECONDS)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert SECRET not in "".join(shown.format())


# --- lent and parked


def test_a_parked_connection_raises_and_a_lent_one_works(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn, autocommit=True)
    for _ in range(3):
        assert link.park()
        with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
            link.conn.execute("select 1")
        link.lend()
        assert link.conn.execute("select 1").fetchone() == (1,)


USES: dict[str, Callable[[Any], Any]] = {
    "execute": lambda conn: conn.execute("select 1"),
    "cursor": lambda conn: conn.cursor(),
    "commit": lambda conn: conn.commit(),
    "rollback": lambda conn: conn.rollback(),
    "transaction": lambda conn: conn.transaction().__enter__(),
    "pipeline": lambda conn: conn.pipeline().__enter__(),
    "notifies": lambda conn: next(conn.notifies(timeout=0)),
    "autocommit": lambda conn: setattr(conn, "autocommit", True),
    "isolation_level": lambda conn: setattr(conn, "isolation_level", 2),
    "read_only": lambda conn: conn.set_read_only(True),
    "deferrable": lambda conn: conn.set_deferrable(True),
    "row_factory": lambda conn: setattr(conn, "row_factory", dict_row),
    "cursor_factory": lambda conn: setattr(conn, "cursor_factory", psycopg.ClientCursor),
    "prepare_threshold": lambda conn: setattr(conn, "prepare_threshold", 0),
    "prepared_max": lambda conn: setattr(conn, "prepared_max", 0),
    "notice handler": lambda conn: conn.add_notice_handler(print),
    "notify handler": lambda conn: conn.add_notify_handler(print),
    "adapters": lambda conn: set_json_loads(str, conn),
    "fileno": lambda conn: conn.fileno(),
    "info": lambda conn: conn.info.dbname,
    "handle": lambda conn: conn.pgconn.exec_(b"select 1"),
    "tpc": lambda conn: conn.tpc_begin("x"),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_returned_connection_raises_and_changes_nothing(
    link: Psycopg3Link, use: str
) -> None:
    link.conn.adapters  # noqa: B018  # made, as after a first statement
    assert link.park()
    with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
        USES[use](link.conn)
    link.lend()
    assert link.park()


def test_a_returned_connection_looks_closed_and_can_be_closed_and_left(link: Psycopg3Link) -> None:
    assert link.park()
    assert link.conn.closed
    assert "BAD" in repr(link.conn)
    link.conn.close()
    link.conn.cancel()
    with link.conn:
        pass
    link.lend()
    assert not link.conn.closed
    assert one(link, "select 1") == 1


def test_what_was_made_before_the_return_raises_after_it(link: Psycopg3Link) -> None:
    conn = link.conn
    cursor = conn.cursor()
    named = conn.cursor("named")
    named.execute("select generate_series(1, 3)")
    assert named.fetchone() == (1,)
    link.park()
    assert link.tidy(SECONDS)
    for use in (
        lambda: cursor.execute("select 1"),
        lambda: cursor.executemany("select %s", [(1,)]),
        lambda: cursor.copy("copy (select 1) to stdout").__enter__(),
        lambda: next(cursor.stream("select 1")),
        named.fetchone,
    ):
        with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
            use()
    cursor.close()
    named.close()
    assert link.ping(SECONDS)


def test_dropped_objects_of_a_returned_connection_complain_about_nothing(
    open_link: OpenLink,
) -> None:
    link = open_link()
    cursor = link.conn.cursor()
    cursor.execute("select 1")
    link.park()
    link.tidy(SECONDS)
    del cursor
    gc.collect()
    link.close()
    del link
    gc.collect()  # filterwarnings = error: an unraisable exception would fail this test


def test_a_dropped_link_ends_its_session_at_once_without_the_garbage_collector(
    server: Server,
) -> None:
    gc.disable()
    try:
        link = driver.open(Recipe(conninfo=server.conninfo()), SECONDS)
        link.conn.execute("select 1").fetchall()
        link.park()
        fd = link.fd
        del link
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    finally:
        gc.enable()


def test_psycopgs_own_with_does_not_close_a_borrowed_connection(link: Psycopg3Link) -> None:
    with link.conn as conn:
        conn.execute("create temp table t (a int)")
    assert not link.conn.closed and link.activity() is Activity.IDLE
    assert one(link, "select count(*) from t") == 0


def test_closing_in_a_lease_ends_the_session(link: Psycopg3Link) -> None:
    link.conn.close()
    assert link.activity() is Activity.BROKEN
    assert not link.park() and not link.tidy(SECONDS) and not link.ping(SECONDS)


def test_a_transaction_makes_it_unclean_and_tidy_rolls_it_back(link: Psycopg3Link) -> None:
    link.conn.execute("create table never (a int)")
    assert not link.park()
    assert link.activity() is Activity.IN_TRANSACTION
    assert link.tidy(SECONDS)
    assert link.activity() is Activity.IDLE
    link.lend()
    assert one(link, "select to_regclass('never')") is None


def test_a_failed_transaction_is_tidied_too(link: Psycopg3Link) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        link.conn.execute("select 1/0")
    assert not link.park()
    assert link.activity() is Activity.IN_FAILED_TRANSACTION
    assert link.tidy(SECONDS)


def test_tidy_after_prepared_statements_keeps_psycopgs_cache_right(link: Psycopg3Link) -> None:
    for _ in range(3):
        for _ in range(8):
            link.conn.execute("select %s::int", (1,)).fetchall()
        assert not link.park()
        assert link.tidy(SECONDS)
        link.lend()
    assert one(link, "select count(*) from pg_prepared_statements") == 0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "autocommit": lambda conn: setattr(conn, "autocommit", True),
    "set_autocommit": lambda conn: conn.set_autocommit(True),
    "isolation_level": lambda conn: setattr(conn, "isolation_level", IsolationLevel.SERIALIZABLE),
    "read_only": lambda conn: setattr(conn, "read_only", True),
    "deferrable": lambda conn: conn.set_deferrable(True),
    "row_factory": lambda conn: setattr(conn, "row_factory", dict_row),
    "cursor_factory": lambda conn: setattr(conn, "cursor_factory", psycopg.ClientCursor),
    "server_cursor_factory": lambda conn: setattr(conn, "server_cursor_factory", None),
    "prepare_threshold": lambda conn: setattr(conn, "prepare_threshold", None),
    "prepared_max": lambda conn: setattr(conn, "prepared_max", 1),
    "notice handler": lambda conn: conn.add_notice_handler(print),
    "notify handler": lambda conn: conn.add_notify_handler(print),
    "loader": lambda conn: set_json_loads(lambda text: "leaked", conn),
    "dumper": lambda conn: conn.adapters.register_dumper(int, psycopg.types.string.StrDumper),
    "type": lambda conn: conn.adapters.types.add(TypeInfo("leaked", 99_999, 0)),
}


def visible(conn: Any) -> dict[str, Any]:
    json = conn.execute("select '1'::json").fetchone()
    one = conn.execute("select %s", (1,)).fetchone()
    conn.rollback()
    return {
        "autocommit": conn.autocommit,
        "isolation": conn.isolation_level,
        "read_only": conn.read_only,
        "deferrable": conn.deferrable,
        "rows": conn.row_factory,
        "cursors": conn.cursor_factory,
        "server cursors": conn.server_cursor_factory,
        "threshold": conn.prepare_threshold,
        "max": conn.prepared_max,
        "notices": list(conn._notice_handlers),
        "notifies": list(conn._notify_handlers),
        "json": json,
        "one": one,
        "begin": conn._get_tx_start_command(),
        "type": conn.adapters.types.get("leaked"),
    }


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_no_client_side_setting_reaches_the_next_borrower(
    open_link: OpenLink, change: str, used_before: bool
) -> None:
    expected = visible(open_link().conn)
    link = open_link()
    link.prepare()
    for _ in range(2):  # the way back must leave the watch as it was
        if used_before:
            visible(link.conn)
        CHANGES[change](link.conn)
        assert link.park()  # set back on the spot: no round trip is needed
        link.lend()
        assert visible(link.conn) == expected


def test_what_configure_set_is_what_a_connection_goes_back_to(link: Psycopg3Link) -> None:
    link.conn.row_factory = dict_row
    link.conn.prepare_threshold = 9
    set_json_loads(lambda text: "configured", link.conn)
    link.prepare()
    link.conn.row_factory = tuple_row
    link.conn.prepare_threshold = None
    set_json_loads(lambda text: "borrower", link.conn)
    assert link.park()
    link.lend()
    assert link.conn.prepare_threshold == 9
    assert link.conn.execute("select '1'::json as j").fetchone() == {"j": "configured"}


def test_settings_changed_in_a_transaction_are_set_back_with_it(link: Psycopg3Link) -> None:
    link.conn.row_factory = dict_row
    link.conn.execute("select 1")
    assert not link.park()
    assert link.tidy(SECONDS)
    link.lend()
    assert link.conn.execute("select 1").fetchone() == (1,)


def test_autocommit_of_one_borrow_ends_with_it(link: Psycopg3Link) -> None:
    link.set_autocommit(True)
    assert link.conn.autocommit
    assert link.park()
    link.lend()
    assert not link.conn.autocommit
    link.conn.execute("select 1")
    with pytest.raises(psycopg.ProgrammingError):
        link.set_autocommit(True)


def test_a_statement_whose_answer_was_not_fetched_is_found(link: Psycopg3Link) -> None:
    link.conn.pgconn.send_query(b"select 1")
    assert not link.park()
    assert link.activity() is Activity.ACTIVE
    assert not link.tidy(SECONDS)


def test_a_stream_and_a_copy_left_open_are_found(open_link: OpenLink) -> None:
    link = open_link()
    stream: Any = link.conn.cursor().stream("select generate_series(1, 100000)")
    next(stream)
    assert not link.park() and not link.tidy(SECONDS)
    link.lend()
    stream.close()
    link = open_link()
    copy = link.conn.cursor().copy("copy (select generate_series(1, 100000)) to stdout")
    copy.__enter__().read()
    assert not link.park() and not link.tidy(SECONDS)
    link.lend()
    copy.__exit__(None, None, None)


def test_pipeline_mode_left_on_is_found_and_left(link: Psycopg3Link) -> None:
    link.conn.pgconn.enter_pipeline_mode()
    assert not link.park()
    assert link.tidy(SECONDS)
    link.lend()
    link.conn.pgconn.enter_pipeline_mode()
    link.conn.pgconn.send_query_params(b"select 1", None)
    link.conn.pgconn.send_query_params(b"select 1/0", None)
    link.conn.pgconn.send_query_params(b"select 2", None)
    assert not link.park()
    assert link.tidy(SECONDS)
    link.lend()
    assert one(link, "select 1") == 1


@pytest.mark.parametrize("block", ["transaction", "pipeline", "notifies"])
def test_a_block_that_somebody_is_still_inside_makes_a_link_unfit(
    open_link: OpenLink, block: str
) -> None:
    link = open_link(autocommit=True)
    if block == "notifies":
        link.conn.execute("listen c")
        link.conn.execute("notify c")
        inside: Any = link.conn.notifies(timeout=SECONDS)
        next(inside)
    else:
        inside = getattr(link.conn, block)()
        inside.__enter__()
    assert not link.park()
    assert not link.tidy(SECONDS)
    link.lend()  # leave it properly, and it is fit again
    if block == "notifies":
        inside.close()
    else:
        inside.__exit__(None, None, None)
    assert link.park()


def test_leaving_blocks_properly_leaves_a_clean_link(open_link: OpenLink) -> None:
    link = open_link(autocommit=True)
    with link.conn.pipeline(), link.conn.transaction():
        link.conn.execute("select 1")
    link.conn.cursor().executemany("select %s", [(1,), (2,)])
    assert list(link.conn.notifies(timeout=0)) == []
    assert link.park()


# --- one statement


def test_execute_is_one_round_trip_and_keeps_the_autocommit_flag(
    server: Server, proxy: WireProxy
) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    with proxy.counting() as count:
        reply = link.execute("select %s::int as a", (7,))
    assert count.round_trips == 1
    assert reply.rows == [(7,)] and reply.rowcount == 1 and reply.statusmessage == "SELECT 1"
    assert reply.description[0].name == "a"
    assert not link.conn.autocommit
    assert link.park()
    link.close()


def test_execute_answers_as_psycopg_shows_it(link: Psycopg3Link) -> None:
    assert link.execute("create temp table t (a int)").rows is None
    assert link.execute("insert into t values (1), (2)").rowcount == 2
    assert link.execute("select 1; select 2").rows == [(1,)]
    link.conn.row_factory = dict_row
    assert link.execute("select 1 as a").rows == [{"a": 1}]


def test_execute_keeps_the_flag_and_the_session_after_an_error_or_interrupt(
    link: Psycopg3Link,
) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        link.execute("select 1/0")
    assert not link.conn.autocommit and link.activity() is Activity.IDLE

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    link.conn.row_factory = interrupted
    with pytest.raises(KeyboardInterrupt):
        link.execute("select 1")
    assert not link.conn.autocommit and link.park()


def test_execute_refuses_to_commit_somebodys_transaction(link: Psycopg3Link) -> None:
    link.conn.execute("select 1")
    with pytest.raises(psycopg.ProgrammingError, match="transaction"):
        link.execute("select 1")
    assert link.activity() is Activity.IN_TRANSACTION


def test_commit_commits_only_what_was_begun(server: Server, proxy: WireProxy) -> None:
    link = driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
    with proxy.counting() as count:
        link.commit()
    assert count.round_trips == 0
    link.conn.execute("create temp table kept (a int)")
    link.commit()
    assert link.park()
    link.close()


@pytest.mark.parametrize("autocommit", [False, True])
def test_settings_hold_for_the_transaction_and_end_with_it(
    server: Server, proxy: WireProxy, autocommit: bool
) -> None:
    recipe = Recipe(
        conninfo=server.conninfo(port=proxy.port),
        autocommit=autocommit,
        kwargs={"cursor_factory": psycopg.RawCursor},
    )
    link = driver.open(recipe, SECONDS)
    with proxy.counting() as count:
        link.apply_settings({"app.user": "o'brien", "work_mem": "3MB", "app.number": 7})
    assert count.round_trips == 2
    query = "select current_setting('app.user'), current_setting('work_mem')"
    assert link.conn.execute(query).fetchone() == ("o'brien", "3MB")
    link.conn.execute("create temp table kept (a int)")
    link.commit()
    assert link.park()
    link.lend()
    assert one(link, "select coalesce(current_setting('app.user', true), '')") == ""
    assert one(link, "show work_mem") != "3MB"
    link.apply_settings({})
    assert link.activity() is Activity.IDLE
    link.close()


# --- bounded exchanges


@pytest.fixture
def frozen(server: Server, open_link: OpenLink) -> Iterator[Psycopg3Link]:
    """A link in a transaction whose server process is stopped: its kernel goes on acknowledging."""
    link = open_link(server.conninfo())
    link.conn.execute("select 1")
    pid = link.handle.backend_pid
    os.kill(pid, signal.SIGSTOP)
    yield link
    os.kill(pid, signal.SIGCONT)


def test_ping_and_tidy_of_a_frozen_server_end_at_the_deadline(frozen: Psycopg3Link) -> None:
    assert not frozen.park()
    started = monotonic()
    assert not frozen.tidy(0.2)
    assert 0.19 < monotonic() - started < 5
    assert frozen.activity() is Activity.ACTIVE


def test_ping_of_a_frozen_server_ends_at_the_deadline(server: Server, open_link: OpenLink) -> None:
    link = open_link(server.conninfo())
    os.kill(link.handle.backend_pid, signal.SIGSTOP)
    try:
        started = monotonic()
        assert not link.ping(0.2)
        assert 0.19 < monotonic() - started < 5
    finally:
        os.kill(link.handle.backend_pid, signal.SIGCONT)


def test_close_does_not_wait_for_a_server_that_reads_nothing(
    server: Server, open_link: OpenLink
) -> None:
    link = open_link(server.conninfo())
    os.kill(link.handle.backend_pid, signal.SIGSTOP)
    pid = link.handle.backend_pid
    try:
        link.handle.send_query(b"select '" + b"x" * 30_000_000 + b"'")
        assert link.handle.flush() == 1, "the socket took it all: make it larger"
        started = monotonic()
        link.close()
        assert monotonic() - started < 5
    finally:
        os.kill(pid, signal.SIGCONT)


def test_ping_works_parked_and_leaves_it_parked(dsn: str, open_link: OpenLink) -> None:
    link = open_link(dsn)
    link.park()
    assert link.ping(SECONDS)
    assert link.conn.closed
    link.lend()
    assert link.park()


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


def dirty(link: Psycopg3Link) -> None:
    for statement in DIRT:
        link.execute(statement)


def reset(link: Psycopg3Link) -> None:
    assert link.park()
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


def test_a_reset_in_an_open_transaction_ends_it(open_link: OpenLink) -> None:
    link = open_link(reset="session")
    link.conn.execute("select 1")
    assert link.start_reset()
    assert link.finish_reset(SECONDS)
    assert link.activity() is Activity.IDLE


def test_a_reset_keeps_psycopgs_prepared_statements(open_link: OpenLink) -> None:
    link = open_link(reset="session", autocommit=True)
    link.prepare()
    for _ in range(12):
        link.conn.execute("select %s::int", (1,)).fetchall()
        reset(link)
    assert one(link, "select count(*) from pg_prepared_statements where not from_sql") == 1


def test_notifications_of_the_last_borrower_are_gone_after_a_reset(open_link: OpenLink) -> None:
    link = open_link(reset="session", autocommit=True)
    link.prepare()
    link.conn.execute("listen c")
    link.conn.execute("notify c")
    link.conn.execute("notify c")
    reset(link)
    assert list(link.conn.notifies(timeout=0)) == []


def test_a_notice_while_a_returned_session_is_reset_reaches_handlers_without_noise(
    open_link: OpenLink, caplog: pytest.LogCaptureFixture
) -> None:
    link = open_link(reset="session")
    heard: list[str | None] = []
    link.conn.add_notice_handler(lambda notice: heard.append(notice.message_primary))
    link.prepare()
    assert link._reset is not None
    link._reset += b"; do 'begin raise notice ''psst''; end'"
    reset(link)
    assert heard == ["psst"]
    assert not caplog.records


def test_a_reset_that_fails_or_is_late_is_not_clean(
    frozen: Psycopg3Link, open_link: OpenLink
) -> None:
    link = open_link(reset="session")
    link._reset = b"select 1/0"
    assert link.start_reset()
    assert not link.finish_reset(SECONDS)
    started = monotonic()
    frozen.start_reset()
    assert not frozen.finish_reset(0.2)
    assert monotonic() - started < 5


def test_a_reset_of_a_dead_session_is_refused_or_not_clean(
    server: Server, open_link: OpenLink
) -> None:
    link = open_link(reset="session")
    link.prepare()
    terminate(server, link)
    assert not (link.start_reset() and link.finish_reset(SECONDS))


# --- the end of a session


def terminate(server: Server, link: Psycopg3Link) -> None:
    """End its server process and wait until the end of the stream is here."""
    server.execute(f"select pg_terminate_backend({link.handle.backend_pid}, 10000)")
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
    link.conn.execute("listen c")
    other = open_link(autocommit=True)
    other.conn.execute("notify c")
    assert select.select([link.fd], [], [], SECONDS)[0]
    assert not link.hung_up()
    assert link.ping(SECONDS)


def test_close_ends_the_session_and_can_be_repeated(server: Server, open_link: OpenLink) -> None:
    link = open_link()
    pid = link.handle.backend_pid
    link.park()
    link.close()
    link.close()
    assert link.conn.closed and not link.conn.broken
    ended = f"select count(*) from pg_stat_activity where pid = {pid}"
    assert eventually(lambda: server.execute(ended) == [("0",)])


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = monotonic() + SECONDS
    while not condition():
        if monotonic() > deadline:
            return False
    return True


def test_discard_wakes_whoever_is_blocked_in_it_and_frees_nothing(
    dsn: str, open_link: OpenLink
) -> None:
    link = open_link(dsn, autocommit=True)
    link.conn.execute("select 1")
    raised: list[BaseException] = []

    def blocked() -> None:
        try:
            link.conn.execute("select pg_sleep(60)")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=blocked)
    thread.start()
    assert eventually(lambda: link.activity() is Activity.ACTIVE)
    started = perf_counter()
    link.discard()
    thread.join(SECONDS)
    assert not thread.is_alive() and perf_counter() - started < 10
    assert isinstance(raised[0], psycopg.OperationalError)
    link.discard()


def test_discard_leaves_alone_a_stranger_with_the_same_number(link: Psycopg3Link) -> None:
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
    link.conn.execute("create temp table mine (a int)")
    child = os.fork()
    if child == 0:  # no pytest from here on
        try:
            link.abandon(busy=busy)
            # A busy one keeps its descriptor, which leads to nowhere now; others have closed it.
            os._exit(0 if link.conn.closed and (not busy or leads_nowhere(link.fd)) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert link.conn.execute("select count(*) from mine").fetchone() == (0,)


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
def test_which_codes_end_a_session(sqlstate: str, read_write: bool, ends: bool) -> None:
    error = psycopg.errors.lookup(sqlstate)("x")
    assert driver.ends_session(error, read_write=read_write) is ends


def test_a_network_that_gave_up_ends_a_session_and_a_plain_bug_does_not() -> None:
    assert driver.ends_session(psycopg.OperationalError("x"), read_write=False)
    assert not driver.ends_session(psycopg.InterfaceError("x"), read_write=True)
    assert not driver.ends_session(ValueError("x"), read_write=True)


# --- why a connect failed


def failure(recipe: Recipe) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        driver.open(recipe, SECONDS)
    assert caught.value.sqlstate is None, "libpq tells now? then the second attempt can go"
    return caught.value


def diagnosis(recipe: Recipe) -> tuple[str | None, bool]:
    before = descriptors()
    found = driver.diagnose(failure(recipe), recipe, SECONDS)
    assert descriptors() == before
    return found.sqlstate, found.heals


def test_no_such_database_and_no_such_role_do_not_heal(server: Server) -> None:
    assert diagnosis(Recipe(conninfo=server.conninfo(dbname="nowhere"))) == ("3D000", False)
    assert diagnosis(Recipe(conninfo=server.conninfo(user="nobody_here"))) == ("28000", False)
    wrong = server.conninfo(options="-c no_such_setting=1")
    assert diagnosis(Recipe(conninfo=wrong)) == ("42704", False)


def test_a_wrong_and_a_missing_password_do_not_heal(
    fresh_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hba = fresh_server.data_dir / "pg_hba.conf"
    hba.write_text("host all checked 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
    fresh_server.execute("create role checked login password 'right'")
    fresh_server.execute("select pg_reload_conf()")
    right = fresh_server.conninfo(user="checked", password="right")
    wrong = fresh_server.conninfo(user="checked", password="wrong")
    missing = fresh_server.conninfo(user="checked", passfile=os.devnull)
    assert eventually(lambda: refused(wrong))
    driver.open(Recipe(conninfo=right), SECONDS).close()
    assert diagnosis(Recipe(conninfo=wrong)) in (("28P01", False), (None, False))  # libpq 18, 17
    assert diagnosis(Recipe(conninfo=missing)) == (None, False)


def refused(conninfo: str) -> bool:
    try:
        driver.open(Recipe(conninfo=conninfo), SECONDS).close()
    except psycopg.OperationalError:
        return True
    return False


def test_over_tls_the_code_is_heard_too(tls_server: Server) -> None:
    recipe = Recipe(conninfo=tls_server.conninfo(over="tls", dbname="nowhere"))
    assert diagnosis(recipe) == ("3D000", False)


def test_too_many_connections_heals(server: Server) -> None:
    server.execute("create role crowded login connection limit 0")
    recipe = Recipe(conninfo=server.conninfo(user="crowded"))
    try:
        assert diagnosis(recipe) == ("53300", True)
    finally:
        server.execute("drop role crowded")


def test_nobody_listening_heals(deaf: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert diagnosis(Recipe(conninfo=f"host=127.0.0.1 port={port}")) == (None, True)
    assert diagnosis(Recipe(conninfo=f"host=/nowhere/at/all port={port}")) == (None, True)


def test_a_timeout_heals_and_is_not_tried_again(deaf: int) -> None:
    recipe = Recipe(conninfo=f"host=127.0.0.1 port={deaf}")
    with pytest.raises(psycopg.OperationalError) as caught:
        driver.open(recipe, 0.1)
    started = monotonic()
    assert driver.diagnose(caught.value, recipe, None).heals
    assert monotonic() - started < 5


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


class FakeServer:
    """Refuses everybody with the given fields of an error message; can also just go silent."""

    def __init__(self, fields: bytes, *, silent_from: int | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._fields = fields
        self._silent_from = silent_from
        self.port = self._listener.getsockname()[1]
        self.clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.clients.append(client)
            if self._silent_from is not None and len(self.clients) > self._silent_from:
                continue
            (length,) = struct.unpack("!i", client.recv(4, socket.MSG_WAITALL))
            client.recv(length - 4, socket.MSG_WAITALL)
            client.sendall(b"E" + struct.pack("!i", len(self._fields) + 5) + self._fields + b"\0")
            client.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(SECONDS)
        for client in self.clients:
            client.close()

    @property
    def recipe(self) -> Recipe:
        words = "sslmode=disable gssencmode=disable user=u password=p"
        return Recipe(conninfo=f"host=127.0.0.1 port={self.port} {words}")


GERMAN = "Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen".encode()


@pytest.mark.skipif(
    psycopg.pq.version() < 180000, reason="older libpq do not trace errors before authentication"
)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (b"SFATAL\0VFATAL\0C28P01\0M" + GERMAN + b"\0", ("28P01", False)),
        (b"SFATAL\0C28P01\0M" + GERMAN + b"\0", ("28P01", False)),  # before 9.6, poolers
        (b"SSCHWERWIEGEND\0VFATAL\0C57P03\0Mdas Datenbanksystem startet\0", ("57P03", True)),
        # Words are never looked at, and cannot pass for a code.
        (b'SFATAL\0VFATAL\0C53300\0Mx\nB\t9\tErrorResponse\t S "x" C "28P01"\0', ("53300", True)),
        (b'SFATAL\0VFATAL\0C53300\0MErrorResponse\t S "x" C "28P01"\0', ("53300", True)),
    ],
)
def test_the_code_decides_in_every_language(
    fields: bytes, expected: tuple[str | None, bool]
) -> None:
    with FakeServer(fields) as server:
        found = driver.diagnose(failure(server.recipe), server.recipe, SECONDS)
    assert (found.sqlstate, found.heals) == expected


def test_the_words_of_the_server_are_kept() -> None:
    with FakeServer(b"SFATAL\0VFATAL\0C28P01\0M" + GERMAN + b"\0") as server:
        assert "fehlgeschlagen" in str(failure(server.recipe))


def test_a_diagnosis_is_bounded() -> None:
    with FakeServer(b"SFATAL\0VFATAL\0C28P01\0Mx\0", silent_from=1) as server:
        error = failure(server.recipe)
        started = monotonic()
        found = driver.diagnose(error, server.recipe, 0.2)
        assert (found.sqlstate, found.heals) == (None, True)
        assert 0.19 < monotonic() - started < 5
