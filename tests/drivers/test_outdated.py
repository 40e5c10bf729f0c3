"""What drivers remember of a schema that a migration has changed: what tells it, and what is forgotten.

What every pool promises of it is in tests/contract/scenarios/migrations.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from penstock import AsyncConnectionPool, ConnectionPool
from penstock._drivers.asyncpg.guard import outdated as outdated_for_asyncpg
from penstock._drivers.outdated import outdated_by, take_from
from penstock._drivers.psycopg3 import outdated as psycopgs
from penstock.drivers import Outdated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUERY = "select * from migrated"

#: (how the table is made, what the migration does)
MIGRATIONS = {
    "a column more": ("create table migrated (id int)", "alter table migrated add column more int"),
    "a column less": (
        "create table migrated (id int, less int)",
        "alter table migrated drop column less",
    ),
    "another type": (
        "create table migrated (id int)",
        "alter table migrated alter column id type bigint",
    ),
    "a table made anew": (
        "create table migrated (id int)",
        "drop table migrated; create table migrated (id text)",
    ),
    "a view made anew": (
        "create view migrated as select 1 as id",
        "drop view migrated; create view migrated as select 'a'::text as id",
    ),
    "another search_path": (
        "create table migrated (id int); create schema other; create table other.migrated (id text)",
        (
            "alter role {role} set search_path = other; "
            "alter table migrated rename to was; alter table other.migrated set schema public"
        ),
    ),
}


@pytest.fixture
def database(server: Any) -> Iterator[str]:
    """A database of the test's own."""
    with psycopg.connect(server.conninfo(over="unix"), autocommit=True) as admin:
        admin.execute("drop database if exists outdated with (force)")
        admin.execute("create database outdated")
        yield psycopg.conninfo.make_conninfo(server.conninfo(over="unix"), dbname="outdated")
        admin.execute("alter role current_user reset search_path")
        admin.execute("drop database outdated with (force)")


@pytest.fixture
def do(database: str) -> Iterator[Callable[[str], Any]]:
    with psycopg.connect(database, autocommit=True) as admin:
        yield lambda text: admin.execute(text.replace("{role}", "current_user"))


def pool_of(database: str, threshold: int | None = 0, **options: Any) -> ConnectionPool[Any]:
    options.setdefault("kwargs", {})["prepare_threshold"] = threshold
    return ConnectionPool(database, max_size=1, **options)


@pytest.mark.parametrize("migration", MIGRATIONS)
@pytest.mark.parametrize("threshold", [0, 1, 5, None])
def test_execute_says_no_error_whatever_the_migration(database, do, migration, threshold):
    make, migrate = MIGRATIONS[migration]
    do(make)
    with pool_of(database, threshold) as pool:
        for _ in range(7):
            pool.execute(QUERY)
        do(migrate)
        for _ in range(7):
            pool.execute(QUERY)
        assert pool.stats().opened == 1


@pytest.mark.parametrize(
    "options",
    [{"guard": True}, {"statement_timeout_client": 30.0}, {"reset": "session"}, {"reset": None}],
    ids=str,
)
def test_it_is_forgotten_with_these_options_too(database, do, options):
    do(MIGRATIONS["a column more"][0])
    with pool_of(database, **options) as pool:
        for _ in range(3):
            pool.execute(QUERY)
        do(MIGRATIONS["a column more"][1])
        for _ in range(2):  # asked once more unprepared, and prepared again
            pool.execute(QUERY)
        do(MIGRATIONS["a column less"][1].replace("less", "more"))
        with pool.connection(autocommit=True) as conn:
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                conn.execute(QUERY)
            assert conn.execute(QUERY).fetchall() == [], "psycopg has forgotten at once"
        pool.execute(QUERY)
        assert pool.stats().opened == 1


def several(conn, what):
    with conn.cursor() as cursor:
        cursor.executemany(f"{QUERY} where id = %s", [(1,), (2,)], returning=True)
        while cursor.nextset():
            pass


def in_a_pipeline(conn, what):
    with conn.pipeline():
        conn.execute(QUERY)
        conn.execute(QUERY)


def copying(conn, what):
    with conn.cursor().copy("copy migrated to stdout") as copy:
        list(copy)
    conn.execute(QUERY)


def by_a_servers_cursor(conn, what):
    with conn.transaction(), conn.cursor(f"cursor_{what}") as cursor:
        cursor.execute(QUERY)
        cursor.fetchall()
    conn.execute(QUERY)


@pytest.mark.parametrize("ask", [several, in_a_pipeline, copying, by_a_servers_cursor])
@pytest.mark.parametrize("autocommit", [True, False])
def test_however_it_is_asked_one_block_fails(database, do, ask, autocommit):
    do(MIGRATIONS["a column more"][0])
    with pool_of(database) as pool:
        failed = 0
        for number in range(10):
            if number == 4:
                do(MIGRATIONS["a column more"][1])
            try:
                with pool.connection(autocommit=autocommit) as conn:
                    ask(conn, number)
            except psycopg.Error:
                failed += 1
        assert failed <= 1


def test_a_savepoint_that_swallows_the_error_leaves_a_connection_that_has_forgotten(database, do):
    do(MIGRATIONS["a column more"][0])
    with pool_of(database) as pool:
        for _ in range(3):
            pool.execute(QUERY)
        do(MIGRATIONS["a column more"][1])
        with pool.connection() as conn:
            with pytest.raises(psycopg.errors.FeatureNotSupported), conn.transaction():
                conn.execute(QUERY)
            conn.execute(QUERY)
        with pool.connection() as conn:
            conn.execute(QUERY)


def test_the_server_forgets_what_psycopg_has_forgotten(database, do):
    do(MIGRATIONS["a column more"][0])
    with pool_of(database) as pool:
        for number in range(5):
            pool.execute(f"{QUERY} where id = {number}")
        do(MIGRATIONS["a column more"][1])
        pool.execute(f"{QUERY} where id = 1")
        count = "select count(*) from pg_prepared_statements"
        assert [pool.execute(count).fetchone() for _ in range(2)] == [(1,), (1,)], "only this one"


def test_a_name_that_the_user_has_not_prepared_leaves_psycopgs_statements_alone(database):
    with pool_of(database, autocommit=True) as pool, pool.connection() as conn:
        conn.execute("select 1")
        with pytest.raises(psycopg.errors.InvalidSqlStatementName):
            conn.execute("execute mine")
        assert conn._prepared._names
        conn.execute("prepare mine as select 2")
        assert conn.execute("execute mine").fetchall() == [(2,)]


def test_a_statement_of_the_users_is_not_asked_twice(database, do):
    """It is executed when it finds that the user's own statement is outdated, and may have done something."""
    do("create table migrated (id int); create table done (n int)")
    do(
        "create procedure act() language plpgsql as $$ begin insert into done values (1); commit;"
        " execute 'execute mine'; end $$"
    )
    with pool_of(database, autocommit=True) as pool:
        pool.execute("prepare mine as select * from migrated")
        pool.execute("call act()")
        do("alter table migrated add column more int")
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            pool.execute("call act()")
    assert do("select count(*) from done").fetchone() == (2,)


def test_a_class_with_a_wait_of_its_own_forgets_too(database, do):
    class Waits(psycopg.AsyncConnection[Any]):
        async def wait(self, gen, *how, **more):
            return await super().wait(gen, *how, **more)

    async def main():
        async with AsyncConnectionPool(
            database, max_size=1, connection_class=Waits, kwargs={"prepare_threshold": 0}
        ) as pool:
            for _ in range(3):
                await pool.execute(QUERY)
            do(MIGRATIONS["a column more"][1])
            for _ in range(3):
                await pool.execute(QUERY)

    do(MIGRATIONS["a column more"][0])
    asyncio.run(main())


def test_types_that_psycopg_was_told_of_are_learnt_anew_by_configure(database, do):
    from psycopg.types.enum import EnumInfo, register_enum

    do("create type mood as enum ('sad', 'glad')")
    kinds: list[Any] = []

    def configure(conn):
        info = EnumInfo.fetch(conn, "mood")
        conn.rollback()
        register_enum(info, conn)
        kinds.append(info.enum)

    with ConnectionPool(database, max_size=2, configure=configure) as pool:

        def ask():
            with pool.connection() as conn:
                return conn.execute("select %s::text", (kinds[-1].sad,)).fetchone()

        with pool.connection(), pool.connection():
            pass
        assert ask() == ("sad",)
        do("drop type mood; create type mood as enum ('sad', 'glad')")
        with pytest.raises(psycopg.Error):
            ask()
        assert [ask() for _ in range(3)] == [("sad",)] * 3


@pytest.mark.parametrize("kind", ["cursor", "prepared"])
def test_asyncpgs_cursors_and_prepared_statements_fail_once(database, do, kind):
    asyncpg = pytest.importorskip("asyncpg")

    async def ask(pool):
        async with pool.connection(transaction=True) as conn:
            if kind == "cursor":
                async for _ in conn.cursor(QUERY):
                    pass
            else:
                await (await conn.prepare(QUERY)).fetch()
            await conn.fetch(QUERY)

    async def main():
        failed = 0
        async with AsyncConnectionPool(database, driver="asyncpg", max_size=1) as pool:
            for number in range(6):
                if number == 2:
                    do(MIGRATIONS["a column more"][1])
                try:
                    await ask(pool)
                except asyncpg.PostgresError:
                    failed += 1
        assert failed <= 1

    do(MIGRATIONS["a column more"][0])
    asyncio.run(main())


@pytest.mark.parametrize("kind", ["cursor", "prepared"])
@pytest.mark.parametrize("change", ["add attribute more int", "drop attribute other"])
def test_asyncpgs_composite_type_of_other_attributes_fails_once(database, do, kind, change):
    asyncpg = pytest.importorskip("asyncpg")

    async def ask(pool):
        async with pool.connection(transaction=True) as conn:
            if kind == "cursor":
                return [row async for row in conn.cursor("select made from pairs")]
            return await (await conn.prepare("select made from pairs")).fetch()

    async def main():
        failed = 0
        async with AsyncConnectionPool(database, driver="asyncpg", max_size=1) as pool:
            for number in range(6):
                if number == 2:
                    do(f"alter type pair {change}")
                try:
                    await ask(pool)
                except asyncpg.OutdatedSchemaCacheError:
                    failed += 1
            assert pool.stats().opened == 1
        assert failed <= 1

    do("create type pair as (one int, other int)")
    do("create table pairs as select row(1, 2)::pair as made")
    asyncio.run(main())


def test_asyncpgs_codecs_are_set_anew_for_a_type_that_was_made_anew(database, do):
    pytest.importorskip("asyncpg")

    async def configure(conn):
        await conn.set_type_codec("mood", encoder=str, decoder=str.upper)

    async def main():
        async with AsyncConnectionPool(
            database, driver="asyncpg", max_size=2, configure=configure
        ) as pool:
            async with pool.connection() as one, pool.connection() as other:
                for conn in (one, other):
                    assert await conn.fetchval("select $1::mood", "sad") == "SAD"
            do("drop type mood; create type mood as enum ('sad', 'glad')")
            with contextlib.suppress(Exception):
                await pool.execute("select $1::mood", ["sad"])
            async with pool.connection() as one, pool.connection() as other:
                for conn in (one, other):
                    assert await conn.fetchval("select $1::mood", "sad") == "SAD"

    do("create type mood as enum ('sad', 'glad')")
    asyncio.run(main())


# --- what tells it


@pytest.mark.parametrize(
    ("code", "function", "text", "found"),
    [
        ("0A000", "RevalidateCachedQuery", "in any language", Outdated.STATEMENTS),
        ("0A000", "PreventInTransactionBlock", "not supported", None),
        ("26000", "FetchPreparedStatement", "« _pg3_7 » n'existe pas", Outdated.STATEMENTS),
        ("26000", "FetchPreparedStatement", 'prepared statement "mine" does not exist', None),
        ("42704", "lookup_type_cache", "type with OID 7 does not exist", Outdated.TYPES),
        ("42704", "typenameType", 'type "mood" does not exist', None),
        ("XX000", "getTypeInputInfo", "cache lookup failed for type 7", Outdated.TYPES),
        ("XX000", "get_func_name", "cache lookup failed for function 7", None),
        ("XX000", "relation_open", "could not open relation with OID 7", Outdated.SESSION),
        ("XX000", None, None, None),
        ("23505", "_bt_check_unique", "duplicate key", None),
        (None, None, None, None),
    ],
)
def test_the_servers_function_tells_and_never_a_text_that_it_translates(
    code, function, text, found
):
    assert outdated_by(code, function, text, "_pg3_") is found


def test_the_worst_of_several_is_told_once():
    touched = {"_autocommit", Outdated.STATEMENTS, Outdated.TYPES}
    assert take_from(touched) is Outdated.TYPES
    assert touched == {"_autocommit"}
    assert take_from(touched) is None


def test_errors_of_others_say_nothing():
    assert psycopgs.outdated(ValueError()) is None
    assert outdated_for_asyncpg(ValueError()) is None


def test_psycopgs_prepare_manager_has_these_private_parts(database):
    """Private: `_names` and `_counts` of `_prepared`, by `key()`; a cursor's `_tx` and `_convert_query`."""
    with psycopg.connect(database, prepare_threshold=0) as conn:
        conn.execute("select %s::int", (1,))
        assert [name[:5] for name in conn._prepared._names.values()] == [b"_pg3_"]
        cursor = conn.cursor()
        cursor._tx = psycopg.adapt.Transformer(cursor)
        query = cursor._convert_query("select %s::int", (1,))
        assert conn._prepared.key(query) in conn._prepared._names
        conn._prepared._names.clear()
        conn.execute("select %s::int", (1,))


def test_a_name_that_psycopg_has_used_is_not_used_again(database):
    """Private: psycopg counts on after its memory was emptied, so that the server's statements are no trouble."""
    with psycopg.connect(database, prepare_threshold=0) as conn:
        for _ in range(3):
            conn.execute("select 1")
            conn._prepared._names.clear()
            conn._prepared._counts.clear()
        rows = conn.execute("select name from pg_prepared_statements", prepare=False).fetchall()
        assert len(rows) == 3
