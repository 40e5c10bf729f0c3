"""The asyncpg driver on a real PostgreSQL: what a link does, and what it never lets through."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from tests.drivers.async_links import LOOPS, run
from tests.drivers.asyncpg_links import GIVEN_BACK, SECONDS, comes_true, one, opened, sockets
from tests.forks import until

from penstock._drivers.asyncpg.driver import driver
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.wire import WireProxy

    from penstock._drivers.asyncpg.link import AsyncpgLink
    from pytest_penstock.postgres import Server

on_each_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(params=["unix", "tcp", "tls"])
def dsn(request: pytest.FixtureRequest) -> str:
    kind = "tls_server" if request.param == "tls" else "server"
    running: Server = request.getfixturevalue(kind)
    return running.conninfo(over=request.param)


async def ready(link: AsyncpgLink) -> None:
    await link.prepare()
    assert link.park()
    link.lend()


# --- lent and parked


@on_each_loop
def test_a_parked_connection_raises_and_a_lent_one_works(dsn: str, loop: str) -> None:
    async def main() -> None:
        async with opened(dsn) as link:
            for _ in range(3):
                assert link.park()
                with pytest.raises(asyncpg.InterfaceError, match=GIVEN_BACK):
                    await link.conn.fetch("select 1")
                link.lend()
                assert await link.conn.fetchval("select 1") == 1

    run(main(), loop)


async def fetch_by_cursor(conn: Any) -> None:
    async for _ in conn.cursor("select 1"):
        pass


async def use_transaction(conn: Any) -> None:
    async with conn.transaction():
        pass


async def at_once(what: object) -> None:
    del what


USES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "execute": lambda conn: conn.execute("select 1"),
    "execute with parameters": lambda conn: conn.execute("select $1::int", 1),
    "executemany": lambda conn: conn.executemany("select $1::int", [(1,)]),
    "fetch": lambda conn: conn.fetch("select 1"),
    "fetchrow": lambda conn: conn.fetchrow("select 1"),
    "prepare": lambda conn: conn.prepare("select 1"),
    "cursor": fetch_by_cursor,
    "transaction": use_transaction,
    "copy in": lambda conn: conn.copy_records_to_table("t", records=[(1,)]),
    "copy out": lambda conn: conn.copy_from_query("select 1", output=at_once),
    "codec": lambda conn: conn.set_type_codec("json", encoder=str, decoder=str),
    "builtin codec": lambda conn: conn.set_builtin_type_codec("json", codec_name="text"),
    "no codec": lambda conn: conn.reset_type_codec("json", schema="pg_catalog"),
    "listen": lambda conn: conn.add_listener("c", print),
    "reset": lambda conn: conn.reset(),
    "log listener": lambda conn: at_once(conn.add_log_listener(print)),
    "no log listener": lambda conn: at_once(conn.remove_log_listener(print)),
    "termination listener": lambda conn: at_once(conn.add_termination_listener(print)),
    "no termination listener": lambda conn: at_once(conn.remove_termination_listener(print)),
    "query logger": lambda conn: at_once(conn.add_query_logger(print)),
    "no query logger": lambda conn: at_once(conn.remove_query_logger(print)),
    "settings": lambda conn: at_once(conn.get_settings()),
    "pid": lambda conn: at_once(conn.get_server_pid()),
    "in transaction": lambda conn: at_once(conn.is_in_transaction()),
}


def test_every_use_of_a_returned_connection_raises_and_changes_nothing(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            await ready(link)
            for name, use in USES.items():
                assert link.park(), name
                with pytest.raises(asyncpg.InterfaceError, match=GIVEN_BACK):
                    await use(link.conn)
                assert not link.touched, name
                link.lend()
            assert link.park()

    run(main())


@on_each_loop
def test_a_returned_connection_looks_closed_and_closing_it_does_not_hurt(
    unix_dsn: str, loop: str
) -> None:
    async def main() -> None:
        told: list[int] = []
        async with opened(unix_dsn) as link:
            assert await one(link, "select $1::int", 1) == 1
            await ready(link)
            link.on_end(lambda: told.append(1))
            link.park()
            assert link.conn.is_closed()
            await link.conn.close()
            link.conn.terminate()
            await link.conn.remove_listener("x", print)
            assert link.activity() is Activity.IDLE
            assert len(link.conn._stmt_cache) == 1
            link.lend()
            assert not link.conn.is_closed()
            assert await one(link, "select $1::int", 2) == 2
            assert link.park() and not told

    run(main(), loop)


def test_what_was_made_before_the_return_is_dead_for_good(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            conn = link.conn
            statement: Any = await conn.prepare("select 1")
            transaction: Any = conn.transaction()
            await transaction.start()
            portal = await conn.cursor("select generate_series(1, 9)")
            assert not link.park()
            assert await link.tidy(SECONDS)
            for lent in (False, True):
                if lent:
                    link.lend()
                uses: list[Callable[[], Any]] = [
                    statement.fetch,
                    lambda: portal.fetch(1),
                    transaction.commit,
                    transaction.rollback,
                ]
                for use in uses:
                    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                        await use()
            assert link.park()
            uses.clear()
            del statement, transaction, use
            link.lend()
            assert await one(link, "select 2") == 2
            assert link.park()

    run(main())


def test_a_statement_of_one_borrower_is_dead_in_the_next_ones_hands(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            await ready(link)
            statement = await link.conn.prepare("select 1")
            assert link.park()
            link.lend()
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                await statement.fetch()
            assert link.park()

    run(main())


def test_a_block_left_after_the_return_raises_and_does_not_end_the_next_transaction(
    unix_dsn: str,
) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            with pytest.raises(asyncpg.InterfaceError, match="released back"):
                async with link.conn.transaction():
                    assert not link.park() and await link.tidy(SECONDS)
                    link.lend()
                    await link.begin()
            assert link.activity() is Activity.IN_TRANSACTION
            await link.commit()
            assert link.park()

    run(main())


@on_each_loop
def test_dropped_without_a_word_a_link_ends_its_session_and_complains_about_nothing(
    server: Server, loop: str
) -> None:
    async def main() -> None:
        before = sockets()
        link = await driver.open(Recipe(conninfo=server.conninfo()), SECONDS)
        await link.conn.fetch("select 1")
        link.park()
        del link
        await comes_true(lambda: sockets() <= before)

    run(main(), loop)
    gc.collect()


# --- clean or not


def test_a_transaction_makes_it_unclean_and_tidy_rolls_it_back(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            await ready(link)
            for how in ("begin", "begin; select 1/0"):
                with pytest.MonkeyPatch.context():
                    try:
                        await link.conn.execute("begin")
                        await link.conn.execute("create table leaked (a int)")
                        if "/" in how:
                            await link.conn.execute("select 1/0")
                    except asyncpg.DivisionByZeroError:
                        pass
                assert link.activity() is Activity.IN_TRANSACTION
                assert not link.park()
                assert await link.tidy(SECONDS)
                assert link.park()
                link.lend()
                assert await one(link, "select to_regclass('leaked')") is None

    run(main())


BUSY: dict[str, Callable[[Any], Any]] = {
    "fetch": lambda conn: conn.fetch("select pg_sleep(20)"),
    "execute": lambda conn: conn.execute("select pg_sleep(20)"),
    "executemany": lambda conn: conn.executemany("select pg_sleep($1)", [(20,)]),
    "copy": lambda conn: conn.copy_from_query("select pg_sleep(20)", output=print),
}


@on_each_loop
@pytest.mark.parametrize("what", BUSY)
def test_a_statement_of_another_task_is_seen_and_makes_a_link_unfit(
    unix_dsn: str, what: str, loop: str
) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            await ready(link)
            other = asyncio.ensure_future(BUSY[what](link.conn))
            await comes_true(link._is_busy)
            assert not link.park()
            assert link.activity() is Activity.ACTIVE
            assert not await link.tidy(SECONDS)
            link.discard()
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
                await other
            assert link.activity() is Activity.BROKEN

    run(main(), loop)


@on_each_loop
@pytest.mark.parametrize("how", ["cancelled", "timed out"])
@pytest.mark.parametrize("over", ["unix", "tls"])
def test_a_statement_that_was_cut_off_is_cancelled_on_the_server_and_the_session_comes_back(
    request: pytest.FixtureRequest, how: str, loop: str, over: str
) -> None:
    running: Server = request.getfixturevalue("tls_server" if over == "tls" else "server")

    async def main() -> None:
        async with opened(running.conninfo(over=over)) as link:  # type: ignore[arg-type]
            await ready(link)
            if how == "cancelled":
                pid = link.conn.get_server_pid()
                task = asyncio.ensure_future(link.conn.fetch("select pg_sleep(20)"))
                asleep = f"select 1 from pg_stat_activity where pid={pid} and wait_event='PgSleep'"
                # A request to cancel what the server has not begun is not heard.
                await asyncio.to_thread(until, lambda: running.execute(asleep))
                task.cancel()
                await asyncio.wait({task})
            else:
                with pytest.raises(TimeoutError):
                    await link.conn.fetch("select pg_sleep(20)", timeout=0.02)
            assert not link.park()
            assert link.activity() is Activity.ACTIVE
            assert await link.tidy(SECONDS)
            assert link.activity() is Activity.IDLE and link.park()
            link.lend()
            assert await one(link, "select 42") == 42

    run(main(), loop)


# --- what is per connection on the client's side


async def heard(conn: Any, listened: list[Any]) -> None:
    """What reaches the listeners and loggers of a connection."""
    listened.clear()
    await conn.execute("do $$ begin raise notice 'hey'; end $$; notify news, 'n'; notify old, 'o'")
    await asyncio.sleep(0.01)


def hears(into: list[Any]) -> Callable[..., None]:
    return lambda *said: into.append(said)


def test_listeners_and_loggers_of_one_borrower_do_not_reach_the_next(unix_dsn: str) -> None:
    async def main() -> None:
        mine: list[Any] = []
        theirs: list[Any] = []
        async with opened(unix_dsn) as link:
            conn = link.conn
            own = hears(theirs)
            await conn.add_listener("old", own)
            conn.add_log_listener(own)
            await ready(link)
            for leak in (
                lambda: conn.add_listener("news", hears(mine)),
                lambda: at_once(conn.add_log_listener(hears(mine))),
                lambda: at_once(conn.add_query_logger(hears(mine))),
                lambda: at_once(conn.add_termination_listener(hears(mine))),
                lambda: conn.remove_listener("old", own),
                lambda: at_once(conn.remove_log_listener(own)),
                conn.reset,
            ):
                await leak()
                link.park() or await link.tidy(SECONDS)
                assert link.park() and not link.touched
                link.lend()
                await heard(conn, mine)
                assert not mine
                assert len(theirs) == 2, leak
                theirs.clear()
                assert await one(link, "select array_agg(c) from pg_listening_channels() c") == [
                    "old"
                ]
            link.park()
        await asyncio.sleep(0.01)
        assert not mine

    run(main())


def test_codecs_of_one_borrower_do_not_reach_the_next_and_those_of_configure_stay(
    unix_dsn: str,
) -> None:
    json = {"schema": "pg_catalog", "encoder": str, "decoder": lambda _: "configured"}
    other = {"schema": "pg_catalog", "encoder": str, "decoder": lambda _: "borrower's"}

    async def main() -> None:
        async with opened(unix_dsn, reset="session") as link:
            conn = link.conn
            await conn.set_type_codec("json", **json)
            await ready(link)
            for leak in (
                lambda: conn.set_type_codec("json", **other),
                lambda: conn.set_type_codec("jsonb", **other),
                lambda: conn.set_builtin_type_codec("xml", schema="pg_catalog", codec_name="text"),
                lambda: conn.reset_type_codec("json", schema="pg_catalog"),
                conn.reset,
                conn.reload_schema_state,
            ):
                await leak()
                link.park() or await link.tidy(SECONDS)
                assert link.park()
                assert link.start_reset() and await link.finish_reset(SECONDS)
                link.lend()
                row = await conn.fetchrow("select '1'::json, '1'::jsonb")
                assert tuple(row) == ("configured", "1")
                assert await conn.fetchval("select $1::json", "1") == "configured"

    run(main())


def test_a_codec_whose_type_is_gone_makes_a_link_unfit(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            await link.conn.execute("create type pg_temp.mood as enum ('a')")
            schema = await one(
                link, "select nspname from pg_namespace where oid=pg_my_temp_schema()"
            )
            await ready(link)
            await link.conn.set_type_codec("mood", schema=schema, encoder=str, decoder=str)
            await link.conn.execute("drop type pg_temp.mood")
            assert not link.park()
            assert not await link.tidy(SECONDS)

    run(main())


# --- statements


def test_execute_answers_with_rows_count_tag_and_columns(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            reply = await link.execute("select $1::int as a, 'x' as b", [7])
            assert reply.rows is not None
            assert [tuple(row) for row in reply.rows] == [(7, "x")]
            assert [column.name for column in reply.description] == ["a", "b"]
            assert (reply.rowcount, reply.statusmessage) == (1, "SELECT 1")
            reply = await link.execute("select 1 where false")
            assert reply.rows == [] and reply.rowcount == 0 and reply.description
            reply = await link.execute("create temp table t (a int)")
            assert (reply.rows, reply.rowcount) == (None, -1)
            assert reply.statusmessage == "CREATE TABLE" and reply.description is None
            reply = await link.execute("insert into t select generate_series(1, 3)")
            assert (reply.rows, reply.rowcount, reply.statusmessage) == (None, 3, "INSERT 0 3")
            reply = await link.execute("update t set a = a + 1 returning a")
            assert reply.rows is not None
            assert (len(reply.rows), reply.rowcount, reply.statusmessage) == (3, 3, "UPDATE 3")
            reply = await link.execute("insert into t values (8); delete from t")
            assert (reply.rows, reply.rowcount, reply.statusmessage) == (None, 4, "DELETE 4")
            with pytest.raises(asyncpg.PostgresSyntaxError):
                await link.execute("selec 1")
            with pytest.raises(asyncpg.InterfaceError):
                await link.execute("select $1::int", ())
            assert link.park()
            with pytest.raises(asyncpg.InterfaceError, match=GIVEN_BACK):
                await link.execute("select 1")

    run(main())


def test_execute_is_one_round_trip_once_the_statement_is_known(
    server: Server, proxy: WireProxy
) -> None:
    async def main() -> None:
        async with opened(server.conninfo(port=proxy.port)) as link:
            await link.execute("select $1::int", (1,))
            with proxy.counting() as count:
                await link.execute("select $1::int", (2,))
                assert link.park()
                link.lend()
                assert link.park()
            assert count.round_trips == 1

    run(main())


def test_execute_works_without_a_statement_cache_and_is_seen_by_loggers(unix_dsn: str) -> None:
    async def main() -> None:
        said: list[Any] = []
        async with opened(unix_dsn, kwargs={"statement_cache_size": 0}) as link:
            link.conn.add_query_logger(said.append)
            for value in (1, 2):
                assert await one(link, "select $1::int", value) == value
            assert await one(link, "select count(*) from pg_prepared_statements") == 0
            await asyncio.sleep(0)
            assert len(said) == 3

    run(main())


def test_execute_refuses_to_commit_somebodys_transaction(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            await link.conn.execute("begin")
            with pytest.raises(asyncpg.InterfaceError, match="idle in transaction"):
                await link.execute("select 1")

    run(main())


# --- transactions


@pytest.fixture
def table(server: Server) -> Any:
    server.execute("create table ledger (a int)")
    yield server
    server.execute("drop table ledger")


def test_commit_ends_what_begin_opened_with_all_in_it(table: Server) -> None:
    async def main() -> None:
        async with opened(table.conninfo()) as link:
            await link.begin()
            async with link.conn.transaction():  # a savepoint
                await link.conn.execute("insert into ledger values (1)")
            await link.commit()
            assert link.park()
            link.lend()
            assert await one(link, "select count(*) from ledger") == 1
            await link.begin()
            await link.conn.execute("insert into ledger values (2)")
            assert not link.park() and await link.tidy(SECONDS)
            link.lend()
            await link.commit()  # there is nothing to commit
            assert await one(link, "select count(*) from ledger") == 1

    run(main())


def test_a_transaction_that_the_borrower_opened_by_hand_is_not_committed(table: Server) -> None:
    async def main() -> None:
        async with opened(table.conninfo()) as link:
            await link.conn.execute("begin; insert into ledger values (1)")
            await link.commit()
            assert link.activity() is Activity.IN_TRANSACTION
            assert not link.park() and await link.tidy(SECONDS)
            link.lend()
            assert await one(link, "select count(*) from ledger") == 0

    run(main())


def test_commit_says_nothing_after_the_borrower_has_ended_it_by_sql(table: Server) -> None:
    async def main() -> None:
        said: list[Any] = []
        async with opened(table.conninfo()) as link:
            link.conn.add_log_listener(hears(said))
            for word in ("commit", "rollback"):
                await link.begin()
                await link.conn.execute(word)
                await link.commit()
                assert link.park() or await link.tidy(SECONDS)
                link.lend()
            await asyncio.sleep(0)
            assert not said

    run(main())


def test_a_commit_of_a_session_that_broke_raises_and_of_one_that_was_closed_does_not(
    server: Server,
) -> None:
    async def main() -> None:
        async with opened(server.conninfo()) as link:
            await link.begin()
            pid = link.conn.get_server_pid()
            server.execute(f"select pg_terminate_backend({pid})")
            await comes_true(link.hung_up)
            with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
                await link.commit()
        async with opened(server.conninfo()) as link:
            await link.begin()
            link.discard()
            with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
                await link.commit()
        for how in ("close", "terminate"):
            async with opened(server.conninfo()) as link:
                await link.begin()
                done = getattr(link.conn, how)()
                if done is not None:
                    await done
                await link.commit()
                assert not link.park() and link.activity() is Activity.BROKEN

    run(main())


def test_autocommit_cannot_be_switched_off(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn, autocommit=False) as link:
            link.set_autocommit(True)
            with pytest.raises(asyncpg.InterfaceError, match="transaction=True"):
                link.set_autocommit(False)

    run(main())


def test_settings_hold_for_the_transaction_and_end_with_it(
    server: Server, proxy: WireProxy
) -> None:
    async def main() -> None:
        async with opened(server.conninfo(port=proxy.port)) as link:
            weird = "it's \\ odd"
            with proxy.counting() as count:
                await link.apply_settings(
                    {"app.tenant": weird, "work_mem": "7MB", "enable_seqscan": False}
                )
            assert count.round_trips == 2
            fetch = link.conn.fetchval
            assert await fetch("select current_setting('app.tenant')") == weird
            assert await fetch("show work_mem") == "7MB"
            assert await fetch("show enable_seqscan") == "off"
            with proxy.counting() as count:
                await link.apply_settings({"work_mem": None})
            assert count.round_trips == 1
            assert await fetch("show work_mem") != "7MB"
            await link.commit()
            assert await fetch("show enable_seqscan") == "on"
            assert link.park()

    run(main())


def test_a_setting_that_the_server_refuses_raises_and_is_rolled_back(unix_dsn: str) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            with pytest.raises(asyncpg.PostgresError):
                await link.apply_settings({"work_mem": "much"})
            assert not link.park() and await link.tidy(SECONDS)

    run(main())


# --- the session's reset

SESSION = """
create temp table leaked (a int);
set work_mem to '7MB'; set search_path to pg_catalog; listen leaked;
select pg_advisory_lock(42); prepare leaked as select 1;
declare leaked cursor with hold for select 1; set role pg_monitor
"""


async def state(link: AsyncpgLink) -> list[Any]:
    queries = (
        "show work_mem",
        "show search_path",
        "select count(*) from pg_listening_channels()",
        "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        "select count(*) from pg_prepared_statements where from_sql",
        "select count(*) from pg_cursors where name = 'leaked'",
        "select current_user",
        "select to_regclass('pg_temp.leaked')::text",
    )
    return [await one(link, query) for query in queries]


@on_each_loop
def test_a_reset_clears_all_that_a_session_holds(dsn: str, loop: str) -> None:
    async def main() -> None:
        async with opened(dsn, reset="session") as link:
            await ready(link)
            before = await state(link)
            for ending in ("", "begin"):
                await link.conn.execute(SESSION)
                assert await state(link) != before
                if ending:
                    await link.conn.execute(ending)
                    assert not link.park()
                else:
                    assert link.park()
                assert link.start_reset()
                assert await link.finish_reset(SECONDS)
                assert link.park()
                link.lend()
                assert await state(link) == before

    run(main(), loop)


def test_a_reset_keeps_what_configure_set(server: Server) -> None:
    server.execute("create role configured login; grant pg_monitor to configured")

    async def main() -> None:
        async with opened(server.conninfo(user="configured"), reset="session") as link:
            await link.conn.execute(
                "set work_mem to '9MB'; set application_name to 'it''s \\'; "
                "prepare mine as select 3; set role pg_monitor"
            )
            said: list[Any] = []
            await link.conn.add_listener("news", hears(said))
            await ready(link)
            before = await state(link)
            await link.conn.execute("reset role; set work_mem to '1MB'; unlisten *")
            await link.conn.execute("prepare other as select 4")
            assert link.park() and link.start_reset() and await link.finish_reset(SECONDS)
            link.lend()
            assert await state(link) == before
            assert await one(link, "show application_name") == "it's \\"
            await link.conn.execute("notify news")
            await comes_true(lambda: said)

    run(main())
    server.execute("drop role configured")


def test_asyncpgs_prepared_statements_outlive_resets(server: Server, proxy: WireProxy) -> None:
    async def main() -> None:
        async with opened(server.conninfo(port=proxy.port), reset="session") as link:
            await ready(link)
            await link.execute("select $1::int", (0,))
            for value in range(20):
                with proxy.counting() as count:
                    assert await one(link, "select $1::int", value) == value
                    assert link.park()
                assert count.round_trips == 1
                assert link.start_reset() and await link.finish_reset(SECONDS)
                link.lend()

    run(main())


@pytest.mark.parametrize("command", ["discard all", "deallocate all"])
def test_a_borrower_who_discards_all_does_not_break_the_statement_cache(
    unix_dsn: str, command: str
) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            for value in range(3):
                assert await one(link, "select $1::int", value) == value
                await link.conn.execute(command)
                assert link.park()
                link.lend()

    run(main())


def test_the_statement_cache_is_right_after_other_peoples_changes_of_the_schema(
    table: Server,
) -> None:
    async def main() -> None:
        async with opened(table.conninfo()) as link:
            await link.execute("insert into ledger values (1)")
            assert len((await link.execute("select * from ledger")).description) == 1
            assert link.park()
            table.execute("alter table ledger add b int")
            link.lend()
            reply = await link.execute("select * from ledger")
            assert len(reply.description) == 2 and len(reply.rows or ()) == 1

    run(main())


def test_what_one_connection_learns_of_a_changed_schema_its_siblings_need_not(
    table: Server,
) -> None:
    async def main() -> None:
        async with opened(table.conninfo()) as link, opened(table.conninfo()) as sibling:
            for each in (link, sibling):
                assert not (await each.execute("select * from ledger")).rows
            table.execute("alter table ledger add b int")
            sibling.park()
            await link.execute("select * from ledger")
            sibling.lend()
            await sibling.begin()
            assert not await sibling.conn.fetch("select * from ledger")
            await sibling.commit()
            assert sibling.park()

    run(main())


def test_a_reset_is_sent_without_waiting_and_counts_as_under_way(
    server: Server, proxy: WireProxy
) -> None:
    async def main() -> None:
        async with opened(server.conninfo(port=proxy.port), reset="session") as link:
            await ready(link)
            assert link.park()
            with proxy.counting() as count:
                proxy.freeze()  # or the answer may be there before the first look
                assert link.start_reset()
                await comes_true(lambda: link.activity() is Activity.ACTIVE)
                proxy.thaw()
                assert await link.finish_reset(SECONDS)
            assert count.round_trips == 1

    run(main())


def test_a_reset_that_fails_or_is_late_is_not_clean(server: Server, proxy: WireProxy) -> None:
    async def main() -> None:
        async with opened(server.conninfo(port=proxy.port), reset="session") as link:
            assert link.park()
            proxy.freeze()
            assert link.start_reset()
            assert not await link.finish_reset(0.1)
            proxy.thaw()
        async with opened(server.conninfo(port=proxy.port), reset="session") as link:
            assert link.park() and link.start_reset()
            await asyncio.sleep(0)
            proxy.cut()
            await comes_true(link.hung_up)
            assert not link.start_reset()
            assert not await link.finish_reset(SECONDS)

    run(main())


# --- which errors


@pytest.mark.parametrize(
    ("sqlstate", "read_write", "ends"),
    [
        ("57P01", False, True),
        ("57P03", False, True),
        ("08006", False, True),
        ("25006", True, True),
        ("25006", False, False),
        ("23505", True, False),
        ("57014", False, False),
    ],
)
def test_which_codes_end_a_session(sqlstate: str, read_write: bool, ends: bool) -> None:
    error = asyncpg.PostgresError.new({"C": sqlstate, "M": "why"})
    assert driver.ends_session(error, read_write=read_write) is ends


def test_a_lost_connection_ends_a_session_and_plain_bugs_do_not(server: Server) -> None:
    async def main() -> None:
        async with opened(server.conninfo()) as link:
            pid = link.conn.get_server_pid()
            with pytest.raises(asyncpg.PostgresError) as caught:
                await link.conn.execute(f"select pg_terminate_backend({pid}), pg_sleep(20)")
            assert driver.ends_session(caught.value, read_write=False)
        for error in (ValueError(), TimeoutError(), OSError(), asyncpg.InterfaceError("misuse")):
            assert not driver.ends_session(error, read_write=True)

    run(main())


def test_a_failed_warning_filter_would_show_leaks() -> None:
    """The tests above count on it: asyncpg warns of connections that are dropped unclosed."""
    assert any(action == "error" for action, *_ in warnings.filters)
