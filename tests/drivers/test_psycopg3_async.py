"""The psycopg 3 driver for asyncio on a real PostgreSQL: what a link does, and what it never lets through.

Opening is in test_psycopg3_async_connect.py, cancelling in test_psycopg3_async_cancel.py; what both psycopg
drivers share is tested in test_psycopg3.py as well.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.rows import dict_row, tuple_row
from psycopg.types.json import set_json_loads
from tests.drivers.async_links import (
    LOOPS,
    SECONDS,
    async_test,
    one,
    opened,
    registered,
    until,
)

from penstock._drivers import load
from penstock._drivers.psycopg3.aio_driver import AsyncPsycopg3Link, driver
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.wire import WireProxy

    from penstock.drivers import AsyncDriver
    from pytest_penstock.postgres import Server

    conforming: AsyncDriver[psycopg.AsyncConnection[Any]] = driver  # to the protocol, for mypy

Link = AsyncPsycopg3Link
GIVEN_BACK = "given back to its pool"

on_both_loops = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(params=["unix", "tcp", "tls"])
def dsn(request: pytest.FixtureRequest) -> str:
    kind = "tls_server" if request.param == "tls" else "server"
    running: Server = request.getfixturevalue(kind)
    return running.conninfo(over=request.param)


def test_it_is_found_by_its_name_and_shaped_for_the_fast_lease() -> None:
    assert load("psycopg", asynchronous=True) is driver
    assert driver.pgconn_shaped
    assert driver.operational_error is psycopg.OperationalError
    assert driver.interface_error is psycopg.InterfaceError


# --- lent and parked


@on_both_loops
@async_test
async def test_a_parked_connection_raises_and_a_lent_one_works(dsn: str, loop: str) -> None:
    async with opened(dsn, autocommit=True) as link:
        for _ in range(3):
            assert link.park()
            with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
                await link.conn.execute("select 1")
            link.lend()
            cursor = await link.conn.execute("select 1")
            assert await cursor.fetchone() == (1,)
        assert link.fd == link.conn.pgconn.socket


async def _enter(block: Any) -> None:
    await block.__aenter__()


async def _set(conn: Any, name: str, value: object) -> None:
    setattr(conn, name, value)


async def _call(call: Callable[[], object]) -> None:
    call()


USES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "execute": lambda conn: conn.execute("select 1"),
    "cursor": lambda conn: _call(conn.cursor),
    "commit": lambda conn: conn.commit(),
    "rollback": lambda conn: conn.rollback(),
    "transaction": lambda conn: _enter(conn.transaction()),
    "pipeline": lambda conn: _enter(conn.pipeline()),
    "notifies": lambda conn: anext(conn.notifies(timeout=0)),
    "autocommit": lambda conn: conn.set_autocommit(True),
    "isolation_level": lambda conn: conn.set_isolation_level(IsolationLevel.SERIALIZABLE),
    "read_only": lambda conn: conn.set_read_only(True),
    "deferrable": lambda conn: conn.set_deferrable(True),
    "row_factory": lambda conn: _set(conn, "row_factory", dict_row),
    "cursor_factory": lambda conn: _set(conn, "cursor_factory", psycopg.AsyncClientCursor),
    "prepare_threshold": lambda conn: _set(conn, "prepare_threshold", 0),
    "prepared_max": lambda conn: _set(conn, "prepared_max", 0),
    "notice handler": lambda conn: _call(lambda: conn.add_notice_handler(print)),
    "notify handler": lambda conn: _call(lambda: conn.add_notify_handler(print)),
    "adapters": lambda conn: _call(lambda: set_json_loads(str, conn)),
    "fileno": lambda conn: _call(conn.fileno),
    "info": lambda conn: _call(lambda: conn.info.dbname),
    "handle": lambda conn: _call(lambda: conn.pgconn.exec_(b"select 1")),
    "tpc": lambda conn: conn.tpc_begin("x"),
}


@async_test
async def test_every_use_of_a_returned_connection_raises_and_changes_nothing(
    unix_dsn: str,
) -> None:
    async with opened(unix_dsn) as link:
        link.conn.adapters  # noqa: B018  # made, as after a first statement
        for use in USES.values():
            assert link.park()
            with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
                await use(link.conn)
            link.lend()
            assert link.park()
            link.lend()


@async_test
async def test_a_returned_connection_looks_closed_and_can_be_closed_and_left(
    unix_dsn: str,
) -> None:
    async with opened(unix_dsn) as link:
        assert link.park()
        assert link.conn.closed
        assert "BAD" in repr(link.conn)
        await link.conn.close()
        link.conn.cancel()
        await link.conn.cancel_safe()
        async with link.conn:
            pass
        link.lend()
        assert not link.conn.closed
        assert await one(link, "select 1") == 1


@async_test
async def test_what_was_made_before_the_return_raises_after_it(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        conn = link.conn
        cursor = conn.cursor()
        named = conn.cursor("named")
        await named.execute("select generate_series(1, 3)")
        assert await named.fetchone() == (1,)
        transaction = conn.transaction()
        link.park()
        assert await link.tidy(SECONDS)
        for use in (
            lambda: cursor.execute("select 1"),
            lambda: cursor.executemany("select %s", [(1,)]),
            lambda: _enter(cursor.copy("copy (select 1) to stdout")),
            lambda: anext(cursor.stream("select 1")),
            named.fetchone,
            lambda: anext(aiter(named)),
            lambda: _enter(transaction),
        ):
            with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
                await use()
        await cursor.close()
        await named.close()
        assert await link.ping(SECONDS)


@async_test
async def test_a_copy_that_was_begun_before_the_return_raises_after_it(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.conn.execute("create temp table t (a int)")
        block = link.conn.cursor().copy("copy t from stdin")
        copy = await block.__aenter__()
        await copy.write_row((1,))
        assert not link.park()
        with pytest.raises(psycopg.InterfaceError, match=GIVEN_BACK):
            await copy.write(b"2\n" * 10)
        assert not await link.tidy(SECONDS)
        link.lend()
        await block.__aexit__(None, None, None)


@async_test
async def test_psycopgs_own_with_does_not_close_a_borrowed_connection(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        async with link.conn as conn:
            await conn.execute("create temp table t (a int)")
        assert not link.conn.closed and link.activity() is Activity.IDLE
        assert await one(link, "select count(*) from t") == 0


@async_test
async def test_closing_in_a_lease_ends_the_session(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.conn.close()
        assert link.activity() is Activity.BROKEN
        await link.commit()  # a wish, and nothing to complain about
        assert not link.park()
        assert not await link.tidy(SECONDS) and not await link.ping(SECONDS)
        assert not link.start_reset()


# --- what is unclean


@on_both_loops
@async_test
async def test_a_transaction_makes_it_unclean_and_tidy_rolls_it_back(dsn: str, loop: str) -> None:
    async with opened(dsn) as link:
        await link.conn.execute("create table never (a int)")
        assert not link.park()
        assert link.activity() is Activity.IN_TRANSACTION
        assert await link.tidy(SECONDS)
        assert link.activity() is Activity.IDLE
        link.lend()
        assert await one(link, "select to_regclass('never')") is None
        with pytest.raises(psycopg.errors.DivisionByZero):
            await link.conn.execute("select 1/0")
        assert not link.park()
        assert link.activity() is Activity.IN_FAILED_TRANSACTION
        assert await link.tidy(SECONDS)


@async_test
async def test_tidy_after_prepared_statements_keeps_psycopgs_cache_right(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        for _ in range(3):
            for _ in range(8):
                await link.conn.execute("select %s::int", (1,))
            assert not link.park()
            assert await link.tidy(SECONDS)
            link.lend()
        assert await one(link, "select count(*) from pg_prepared_statements") == 0


CHANGES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "autocommit": lambda conn: conn.set_autocommit(True),
    "isolation_level": lambda conn: conn.set_isolation_level(IsolationLevel.SERIALIZABLE),
    "read_only": lambda conn: conn.set_read_only(True),
    "deferrable": lambda conn: conn.set_deferrable(True),
    "row_factory": lambda conn: _set(conn, "row_factory", dict_row),
    "cursor_factory": lambda conn: _set(conn, "cursor_factory", psycopg.AsyncClientCursor),
    "server_cursor_factory": lambda conn: _set(conn, "server_cursor_factory", None),
    "prepare_threshold": lambda conn: _set(conn, "prepare_threshold", None),
    "prepared_max": lambda conn: _set(conn, "prepared_max", 1),
    "notice handler": lambda conn: _call(lambda: conn.add_notice_handler(print)),
    "notify handler": lambda conn: _call(lambda: conn.add_notify_handler(print)),
    "loader": lambda conn: _call(lambda: set_json_loads(lambda text: "leaked", conn)),
}


async def visible(conn: Any) -> dict[str, Any]:
    json = await (await conn.execute("select '1'::json")).fetchone()
    await conn.rollback()
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
        "begin": conn._get_tx_start_command(),
    }


@async_test
async def test_no_client_side_setting_reaches_the_next_borrower(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.prepare()
        expected = await visible(link.conn)
        for change in CHANGES.values():
            await change(link.conn)
            assert link.park()  # set back on the spot: no round trip is needed
            link.lend()
            assert await visible(link.conn) == expected


@async_test
async def test_what_configure_set_is_what_a_connection_goes_back_to(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        link.conn.row_factory = dict_row
        set_json_loads(lambda text: "configured", link.conn)
        await link.prepare()
        link.conn.row_factory = tuple_row
        set_json_loads(lambda text: "borrower", link.conn)
        assert link.park()
        link.lend()
        cursor = await link.conn.execute("select '1'::json as j")
        assert await cursor.fetchone() == {"j": "configured"}


@async_test
async def test_autocommit_of_one_borrow_ends_with_it(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        link.set_autocommit(True)
        assert link.conn.autocommit
        assert link.park()
        link.lend()
        assert not link.conn.autocommit
        await link.conn.execute("select 1")
        with pytest.raises(psycopg.ProgrammingError):
            link.set_autocommit(True)


@async_test
async def test_begin_ends_autocommit_for_this_borrow_and_sends_nothing(
    server: Server, proxy: WireProxy
) -> None:
    async with opened(server.conninfo(port=proxy.port), autocommit=True) as link:
        with proxy.counting() as count:
            await link.begin()
        assert count.round_trips == 0
        await link.conn.execute("create temp table kept (a int)")
        assert link.activity() is Activity.IN_TRANSACTION
        await link.begin()  # nothing more to do
        await link.commit()
        assert link.park()
        link.lend()
        assert link.conn.autocommit


@on_both_loops
@async_test
async def test_a_statement_whose_answer_was_not_fetched_is_cancelled_and_read(
    dsn: str, loop: str
) -> None:
    async with opened(dsn) as link:
        link.conn.pgconn.send_query(b"select pg_sleep(60)")
        assert not link.park()
        assert link.activity() is Activity.ACTIVE
        started = monotonic()
        assert await link.tidy(SECONDS)
        assert monotonic() - started < 10
        link.lend()
        assert await one(link, "select 1") == 1


@async_test
async def test_it_is_cancelled_inside_a_transaction_too(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.conn.execute("create table never (a int)")
        link.conn.pgconn.send_query(b"select pg_sleep(60)")
        assert not link.park()
        assert await link.tidy(SECONDS)
        link.lend()
        assert await one(link, "select to_regclass('never')") is None


@async_test
async def test_where_libpq_cannot_cancel_without_blocking_a_thread_does(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)
    async with opened(server.conninfo()) as link:
        link.conn.pgconn.send_query(b"select pg_sleep(60)")
        assert not link.park()
        assert await link.tidy(SECONDS)
        link.lend()
        assert await one(link, "select 1") == 1


OLD_LIBPQ = """
import asyncio, sys
import psycopg
from penstock.drivers import Activity, Recipe
from penstock._drivers.psycopg3.aio_driver import driver

async def main(conninfo):
    link = await driver.open(Recipe(conninfo=conninfo, reset="session"), 20)
    try:
        async with asyncio.timeout(0.05):
            await link.execute("select pg_sleep(60)")
    except TimeoutError:
        pass
    assert link.activity() is Activity.ACTIVE
    link.park()
    assert await link.tidy(20)
    assert link.start_reset() and await link.finish_reset(20)
    link.lend()
    print((await link.execute("select 42")).rows)
    await link.close()

if psycopg.capabilities.has_cancel_safe():
    sys.exit("new")
asyncio.run(main(sys.argv[1]))
"""


def test_it_works_with_a_libpq_that_is_older_than_17(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OLD_LIBPQ, server.conninfo()],
        check=False,
        env={**os.environ, "PSYCOPG_IMPL": "python"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "ImportError" in done.stderr or done.stderr.strip() == "new":
        pytest.skip("the system has no libpq that is older than 17")
    assert (done.returncode, done.stdout) == (0, "[(42,)]\n"), done.stderr


@async_test
async def test_a_request_to_cancel_that_went_astray_makes_a_link_unfit(
    server: Server, proxy: WireProxy
) -> None:
    async with opened(server.conninfo(port=proxy.port)) as link:
        link.conn.pgconn.send_query(b"select pg_sleep(0.1)")
        link.park()
        proxy.refuse()
        assert not await link.tidy(SECONDS)
        proxy.accept()
        assert await asyncio.to_thread(select.select, [link.fd], [], [], SECONDS)
        assert not await link.tidy(SECONDS)  # whoever asked may still be heard


@async_test
async def test_a_stream_and_a_copy_left_open_are_found(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        stream: Any = link.conn.cursor().stream("select generate_series(1, 100000)")
        await anext(stream)
        assert not link.park() and not await link.tidy(SECONDS)
        link.lend()
        await stream.aclose()
    async with opened(unix_dsn) as link:
        copy = link.conn.cursor().copy("copy (select generate_series(1, 100000)) to stdout")
        await (await copy.__aenter__()).read()
        assert not link.park() and not await link.tidy(SECONDS)
        link.lend()
        await copy.__aexit__(None, None, None)


@async_test
async def test_pipeline_mode_left_on_is_found_and_left(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        link.conn.pgconn.enter_pipeline_mode()
        assert not link.park()
        assert await link.tidy(SECONDS)
        link.lend()
        link.conn.pgconn.enter_pipeline_mode()
        link.conn.pgconn.send_query_params(b"select 1", None)
        link.conn.pgconn.send_query_params(b"select 1/0", None)
        link.conn.pgconn.send_query_params(b"select pg_sleep(60)", None)
        assert not link.park()
        assert await link.tidy(SECONDS)
        link.lend()
        assert await one(link, "select 1") == 1


@async_test
async def test_a_block_that_somebody_is_still_inside_makes_a_link_unfit(unix_dsn: str) -> None:
    for block in ("transaction", "pipeline", "notifies"):
        async with opened(unix_dsn, autocommit=True) as link:
            if block == "notifies":
                await link.conn.execute("listen c")
                await link.conn.execute("notify c")
                inside: Any = link.conn.notifies(timeout=SECONDS)
                await anext(inside)
            else:
                inside = getattr(link.conn, block)()
                await inside.__aenter__()
            assert not link.park()
            assert not await link.tidy(SECONDS)
            link.lend()  # leave it properly, and it is fit again
            if block == "notifies":
                await inside.aclose()
            else:
                await inside.__aexit__(None, None, None)
            assert link.park()


@async_test
async def test_another_task_that_is_still_in_a_statement_makes_a_link_unfit(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        other = asyncio.ensure_future(link.conn.execute("select pg_sleep(60)"))
        await until(lambda: link.activity() is Activity.ACTIVE)
        assert not link.park()
        assert not await link.tidy(SECONDS)
        link.discard()
        with pytest.raises(psycopg.OperationalError):
            await other


@on_both_loops
@async_test
async def test_another_task_that_waits_on_a_copy_makes_a_link_unfit(
    unix_dsn: str, loop: str
) -> None:
    """A copy's reads take no lock."""
    async with opened(unix_dsn) as link:
        # The first rows fill the server's buffer, so that it sends something.
        rows = (
            "select repeat('x', 20000) from generate_series(1, 3) union all "
            "select pg_sleep(60)::text"
        )
        async with link.conn.cursor().copy(f"copy ({rows}) to stdout") as copy:
            read: list[int] = []

            async def read_all() -> None:
                while block := await copy.read():
                    read.append(len(block))

            other = asyncio.ensure_future(read_all())
            await until(lambda: bool(read))
            link.park()
            assert not await link.tidy(SECONDS)
            link.discard()
            with pytest.raises(psycopg.Error):
                await other
            link.lend()


@async_test
async def test_leaving_blocks_properly_leaves_a_clean_link(unix_dsn: str) -> None:
    async with opened(unix_dsn, autocommit=True) as link:
        async with link.conn.pipeline(), link.conn.transaction():
            await link.conn.execute("select 1")
        await link.conn.cursor().executemany("select %s", [(1,), (2,)])
        assert [each async for each in link.conn.notifies(timeout=0)] == []
        assert link.park()


# --- one statement


@on_both_loops
@async_test
async def test_execute_is_one_round_trip_and_keeps_the_autocommit_flag(
    server: Server, proxy: WireProxy, loop: str
) -> None:
    async with opened(server.conninfo(port=proxy.port)) as link:
        with proxy.counting() as count:
            reply = await link.execute("select %s::int as a", (7,))
        assert count.round_trips == 1
        assert reply.rows == [(7,)] and reply.rowcount == 1
        assert reply.statusmessage == "SELECT 1" and reply.description[0].name == "a"
        assert not link.conn.autocommit
        assert link.park()


@async_test
async def test_execute_answers_as_psycopg_shows_it(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        assert (await link.execute("create temp table t (a int)")).rows is None
        assert (await link.execute("insert into t values (1), (2)")).rowcount == 2
        assert (await link.execute("select 1; select 2")).rows == [(1,)]
        long = "x" * 5_000_000  # does not fit into the socket: written while it is read
        assert await one(link, f"select length('{long}')") == len(long)
        assert (await link.execute("select %s", (long,))).rows == [(long,)]
        link.conn.row_factory = dict_row
        assert (await link.execute("select 1 as a")).rows == [{"a": 1}]


@async_test
async def test_execute_keeps_the_flag_and_the_session_after_an_error(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await link.execute("select 1/0")
        assert not link.conn.autocommit and link.activity() is Activity.IDLE
        await link.conn.execute("select 1")
        with pytest.raises(psycopg.ProgrammingError, match="transaction"):
            await link.execute("select 1")
        assert link.activity() is Activity.IN_TRANSACTION


@async_test
async def test_settings_hold_for_the_transaction_and_end_with_it(
    server: Server, proxy: WireProxy
) -> None:
    for autocommit in (False, True):
        async with opened(
            server.conninfo(port=proxy.port),
            autocommit=autocommit,
            kwargs={"cursor_factory": psycopg.AsyncRawCursor},
        ) as link:
            with proxy.counting() as count:
                await link.apply_settings({"app.user": "o'brien", "work_mem": "3MB"})
            assert count.round_trips == 2
            query = "select current_setting('app.user'), current_setting('work_mem')"
            cursor = await link.conn.execute(query)
            assert await cursor.fetchone() == ("o'brien", "3MB")
            await link.commit()
            assert link.park()
            link.lend()
            assert await one(link, "show work_mem") != "3MB"
            await link.apply_settings({})
            assert link.activity() is Activity.IDLE


# --- commit


@on_both_loops
@async_test
async def test_commit_commits_only_what_was_begun(
    server: Server, proxy: WireProxy, loop: str
) -> None:
    async with opened(server.conninfo(port=proxy.port)) as link:
        with proxy.counting() as count:
            await link.commit()
        assert count.round_trips == 0
        await link.conn.execute("create temp table kept (a int)")
        with proxy.counting() as count:
            await link.commit()
        assert count.round_trips == 1
        assert link.park()


@async_test
async def test_commit_raises_what_the_server_says(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.execute("create temp table t (a int unique deferrable initially deferred)")
        await link.conn.execute("insert into t values (1), (1)")
        with pytest.raises(psycopg.errors.UniqueViolation) as caught:
            await link.commit()
        assert caught.value.diag.table_name == "t"
        assert link.activity() is Activity.IDLE
        assert link.park()


@async_test
async def test_commit_of_a_failed_transaction_ends_it_as_psycopgs_does(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await link.conn.execute("select 1/0")
        await link.commit()
        assert link.park()


@async_test
async def test_commit_raises_if_the_session_was_lost_with_the_transaction(
    server: Server, unix_dsn: str
) -> None:
    for noticed in (False, True):
        async with opened(unix_dsn) as link:
            await link.conn.execute("select 1")
            terminate(server, link)
            if noticed:
                assert link.hung_up()
            with pytest.raises(psycopg.OperationalError):
                await link.commit()
            assert link.activity() is Activity.BROKEN


@async_test
async def test_commit_leaves_to_psycopg_what_is_psycopgs(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        async with link.conn.transaction():
            with pytest.raises(psycopg.ProgrammingError, match="within a Transaction"):
                await link.commit()
        async with link.conn.pipeline():
            await link.conn.execute("create temp table t (a int)")
            await link.commit()
        assert link.park()
        link.lend()
        await link.conn.tpc_begin("x")
        with pytest.raises(psycopg.ProgrammingError, match="two-phase"):
            await link.commit()
        await link.conn.tpc_rollback()


@async_test
async def test_a_commit_of_the_users_class_is_called(unix_dsn: str) -> None:
    called: list[str] = []

    class Mine(psycopg.AsyncConnection[Any]):
        async def commit(self) -> None:
            called.append("commit")
            await super().commit()

    async with opened(unix_dsn, connection_class=Mine) as link:
        await link.conn.execute("select 1")
        await link.commit()
    assert called == ["commit"]


@async_test
async def test_commit_waits_for_a_statement_of_another_task(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        await link.conn.execute("select 1")
        other = asyncio.ensure_future(link.conn.execute("select pg_sleep(0.05)"))
        await asyncio.sleep(0)
        await link.commit()
        await other
        assert link.activity() is Activity.IDLE


# --- bounded exchanges


@asynccontextmanager
async def frozen(server: Server, begin: str = "") -> AsyncIterator[Link]:
    """A link whose server process is stopped: its kernel goes on acknowledging."""
    async with opened(server.conninfo(), reset="session") as link:
        if begin:
            await link.conn.execute(begin)
        pid = link.handle.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield link
        finally:
            os.kill(pid, signal.SIGCONT)


WITHIN: dict[str, Callable[[Link], Awaitable[bool]]] = {
    "ping": lambda link: link.ping(0.2),
    "tidy": lambda link: link.tidy(0.2),
    "reset": lambda link: link.finish_reset(0.2),
}


@on_both_loops
@pytest.mark.parametrize("what", WITHIN)
@async_test
async def test_a_frozen_server_is_given_up_at_the_deadline(
    server: Server, what: str, loop: str
) -> None:
    async with frozen(server, "select 1" if what == "tidy" else "") as link:
        link.park()
        if what == "reset":
            assert link.start_reset()
        started = monotonic()
        assert not await WITHIN[what](link)
        assert 0.19 < monotonic() - started < 5
        assert link.activity() is Activity.ACTIVE
        assert link.fd not in registered()


@async_test
async def test_cancelling_a_statement_of_a_frozen_server_is_given_up_at_the_deadline(
    server: Server,
) -> None:
    async with opened(server.conninfo()) as link:
        link.handle.send_query(b"select pg_sleep(60)")
        link.handle.flush()
        pid = link.handle.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            started = monotonic()
            link.park()
            assert not await link.tidy(0.2)
            assert 0.19 < monotonic() - started < 5
        finally:
            os.kill(pid, signal.SIGCONT)


@on_both_loops
@async_test
async def test_a_cancelled_statement_of_a_frozen_server_ends_at_once(
    server: Server, loop: str
) -> None:
    async with frozen(server) as link:
        started = monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await link.execute("select 1")
        assert monotonic() - started < 5
        assert link.activity() is Activity.ACTIVE


@async_test
async def test_close_does_not_wait_for_a_server_that_reads_nothing(server: Server) -> None:
    async with frozen(server) as link:
        link.handle.send_query(b"select '" + b"x" * 30_000_000 + b"'")
        assert link.handle.flush() == 1, "the socket took it all: make it larger"
        started = monotonic()
        await link.close()
        assert monotonic() - started < 5


@async_test
async def test_ping_works_parked_and_leaves_it_parked(dsn: str) -> None:
    async with opened(dsn) as link:
        link.park()
        assert await link.ping(SECONDS)
        assert link.conn.closed
        link.lend()
        assert link.park()


def test_it_works_under_anyio(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            with anyio.move_on_after(0.05) as scope:
                await link.execute("select pg_sleep(60)")
            assert scope.cancelled_caught
            link.park()
            assert await link.tidy(SECONDS)
            link.lend()
            assert await one(link, "select 1") == 1

    for options in ({}, {"use_uvloop": True}):
        anyio.run(main, backend="asyncio", backend_options=options)


# --- session reset


@on_both_loops
@async_test
async def test_a_reset_clears_what_a_session_holds_and_keeps_what_configure_set(
    dsn: str, loop: str
) -> None:
    async with opened(dsn, reset="session") as link:
        await link.execute("set work_mem to '7MB'")
        await link.execute("listen kept")
        await link.prepare()
        for _ in range(2):
            await link.execute("set work_mem to '9MB'")
            await link.execute("listen dirt")
            await link.execute("notify dirt")
            await link.conn.execute("create temp table dirt (a int)")
            await link.conn.execute("prepare dirt as select 1")
            assert not link.park()
            assert link.start_reset()  # ends the transaction, too
            assert link.activity() is Activity.ACTIVE
            assert await link.finish_reset(SECONDS)
            assert link.activity() is Activity.IDLE
            link.lend()
            assert await one(link, "show work_mem") == "7MB"
            assert await one(link, "select array_agg(c) from pg_listening_channels() c") == ["kept"]
            assert await one(link, "select to_regclass('pg_temp.dirt')") is None
            assert [each async for each in link.conn.notifies(timeout=0)] == []
            assert link.park()
            link.lend()


@async_test
async def test_a_reset_that_fails_or_is_cut_off_and_fails_is_not_clean(unix_dsn: str) -> None:
    for finish in ("finish", "tidy"):
        async with opened(unix_dsn, reset="session") as link:
            link._reset = b"select 1/0"
            assert link.start_reset()
            assert not await (
                link.finish_reset(SECONDS) if finish == "finish" else link.tidy(SECONDS)
            )


@async_test
async def test_a_reset_of_a_dead_session_is_refused_or_not_clean(
    server: Server, unix_dsn: str
) -> None:
    async with opened(unix_dsn, reset="session") as link:
        await link.prepare()
        terminate(server, link)
        assert not (link.start_reset() and await link.finish_reset(SECONDS))


# --- the end of a session


def terminate(server: Server, link: Link) -> None:
    """End its server process and wait until the end of the stream is here."""
    server.execute(f"select pg_terminate_backend({link.handle.backend_pid}, 10000)")
    assert select.select([link.fd], [], [], SECONDS)[0]


@async_test
async def test_hung_up_sees_the_end_and_only_the_end(
    dsn: str, server: Server, request: pytest.FixtureRequest
) -> None:
    over_tls = "sslrootcert" in dsn
    async with opened(dsn) as link:
        link.park()
        assert not link.hung_up()
        terminate(request.getfixturevalue("tls_server") if over_tls else server, link)
        assert link.hung_up() and link.hung_up()


@async_test
async def test_the_pool_is_to_watch_the_descriptor(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        assert not link.on_end(lambda: None)


def test_close_needs_no_loop_and_can_be_repeated(server: Server, unix_dsn: str) -> None:
    links: list[Link] = []

    @async_test
    async def main() -> None:
        links.append(await driver.open(Recipe(conninfo=unix_dsn), SECONDS))

    main()
    (link,) = links
    pid = link.handle.backend_pid
    link.park()
    for _ in range(2):
        with pytest.raises(StopIteration):  # at its first step: it waits for nothing
            link.close().send(None)
    assert link.conn.closed and not link.conn.broken
    wait_for_the_end_of(server, pid)


def wait_for_the_end_of(server: Server, pid: int) -> None:
    deadline = monotonic() + SECONDS
    while server.execute(f"select count(*) from pg_stat_activity where pid = {pid}") != [("0",)]:
        assert monotonic() < deadline


def test_discard_works_when_the_loop_is_closed_and_can_be_repeated(
    server: Server, dsn: str, request: pytest.FixtureRequest
) -> None:
    links: list[Link] = []

    @async_test
    async def main() -> None:
        links.append(await driver.open(Recipe(conninfo=dsn), SECONDS))

    main()
    (link,) = links
    pid = link.handle.backend_pid
    link.discard()
    link.discard()
    over_tls = "sslrootcert" in dsn
    wait_for_the_end_of(request.getfixturevalue("tls_server") if over_tls else server, pid)
    link.handle.finish()


@on_both_loops
@async_test
async def test_discard_wakes_whoever_waits_in_it(dsn: str, loop: str) -> None:
    async with opened(dsn, autocommit=True) as link:
        for statement in (link.conn.execute, link.execute):
            if link.activity() is Activity.BROKEN:
                break
            waiting = asyncio.ensure_future(statement("select pg_sleep(60)"))
            await until(lambda: link.activity() is Activity.ACTIVE)
            link.discard()
            with pytest.raises(psycopg.OperationalError):
                await asyncio.wait_for(waiting, SECONDS)


@async_test
async def test_discard_leaves_alone_a_stranger_with_the_same_number(unix_dsn: str) -> None:
    async with opened(unix_dsn) as link:
        ours, theirs = socket.socketpair()
        await link.close()
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


def test_a_dropped_link_ends_its_session_at_once_and_without_a_warning(unix_dsn: str) -> None:
    async def main() -> None:
        link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
        await link.execute("select 1")
        await link.conn.execute("select 1")
        await link.commit()
        link.park()
        fd = link.fd
        del link
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


@async_test
async def test_one_that_is_dropped_in_the_middle_of_a_statement_closes_its_socket(
    server: Server, unix_dsn: str
) -> None:
    link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
    pid = link.handle.backend_pid
    work = link.execute("select pg_sleep(60)")
    work.send(None)
    work.close()
    assert link.activity() is Activity.ACTIVE
    assert link.fd not in registered()
    link.park()
    link.discard()
    del link, work
    wait_for_the_end_of(server, pid)


# --- fork


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leads_nowhere(fd: int) -> bool:
    return os.path.samestat(os.fstat(fd), Path(os.devnull).stat())


@on_both_loops
@pytest.mark.parametrize("busy", [False, True])
@async_test
async def test_a_forked_child_lets_go_without_disturbing_the_parent(
    dsn: str, busy: bool, loop: str
) -> None:
    async with opened(dsn) as link:
        await link.conn.execute("create temp table mine (a int)")
        child = os.fork()
        if child == 0:  # no pytest from here on
            try:
                link.abandon(busy=busy)
                # A busy one keeps its descriptor, which leads to nowhere now; others have closed it.
                os._exit(0 if link.conn.closed and (not busy or leads_nowhere(link.fd)) else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(2)
        assert exit_code(child) == 0
        cursor = await link.conn.execute("select count(*) from mine")
        assert await cursor.fetchone() == (0,)


@async_test
async def test_a_wait_that_a_forked_child_drops_is_still_the_parents(server: Server) -> None:
    """asyncio's epoll is shared over a fork: who takes a registration away there takes it away here."""
    async with opened(server.conninfo()) as link:
        work = link.ping(SECONDS)
        pid = link.handle.backend_pid
        os.kill(pid, signal.SIGSTOP)  # so that the answer comes after the fork
        waiting = asyncio.ensure_future(work)
        await until(lambda: link.fd in registered())
        child = os.fork()
        if child == 0:
            work.close()  # GeneratorExit where it waits, as when it is freed
            os._exit(0)
        assert exit_code(child) == 0
        epoll = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGCONT)
        assert select.select([link.fd], [], [], SECONDS)[0]
        assert link.fd in {key.fd for key, _ in epoll.select(0)}
        assert await waiting


@async_test
async def test_what_is_closed_the_loop_knows_no_more(unix_dsn: str) -> None:
    """Else asyncio would take the next socket of that number for this one."""
    async with opened(unix_dsn) as link:
        asyncio.get_running_loop().add_reader(link.fd, print)  # as somebody does who still waits
        await link.close()
        assert link.fd not in registered()
