"""`asyncpg.connect` and `Connection.fetch` where they are not asyncpg's own, and adopted connections."""

from __future__ import annotations

import asyncio
import functools
import gc
from typing import Any

import asyncpg
import asyncpg.connection
import pytest
import wrapt

from penstock import AsyncConnectionPool, MisuseError, ServerUnavailable, StatementTimeout
from penstock._drivers.asyncpg import driver as own
from penstock._drivers.asyncpg import guard as asyncpg_guard
from penstock.config.conninfo import parse
from penstock.drivers import AsyncAdopts, NotAdopted, Recipe

PATIENCE = 20.0
conforming: AsyncAdopts[Any] = own.driver
plain = asyncpg.connect
seen: list[str] = []


class Traced(asyncpg.Connection):  # type: ignore[misc]  # asyncpg is untyped
    """A tracer's own class of connections."""

    async def fetch(self, query, *args, **options):
        seen.append(query)
        return await super().fetch(query, *args, **options)

    async def execute(self, query, *args, **options):
        seen.append(query)
        return await super().execute(query, *args, **options)


class Proxy(wrapt.ObjectProxy):
    """What Datadog's tracer puts around a connection."""

    async def fetch(self, query, *args, **options):
        seen.append(query)
        return await self.__wrapped__.fetch(query, *args, **options)

    async def execute(self, query, *args, **options):
        seen.append(query)
        return await self.__wrapped__.execute(query, *args, **options)


async def by_a_class(*args, **options):
    return await plain(*args, **{**options, "connection_class": Traced})


@functools.wraps(plain)
async def by_a_proxy(*args, **options):
    return Proxy(await plain(*args, **options))


async def recorded(wrapped, instance, args, options):
    seen.append(args[0])
    return await wrapped(*args, **options)


def instrument(way, patch):
    if way == "by_methods":
        for name in ("fetch", "execute"):
            wrapper = wrapt.FunctionWrapper(vars(asyncpg.Connection)[name], recorded)
            patch.setattr(asyncpg.Connection, name, wrapper)
    elif way == "as_asyncpgs_pool_does":
        patch.setattr(asyncpg.connection, "connect", by_a_proxy)
    else:
        patch.setattr(asyncpg, "connect", {"by_a_class": by_a_class, "by_a_proxy": by_a_proxy}[way])


@pytest.fixture(params=["by_methods", "by_a_class", "by_a_proxy", "as_asyncpgs_pool_does"])
def way(request, monkeypatch):
    instrument(request.param, monkeypatch)
    return request.param


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


@pytest.fixture
def play(server):
    """Run a coroutine function with a pool of one connection."""

    def run(act, conninfo=None, **options):
        async def main():
            where = conninfo or server.conninfo()
            options_ = {"name": "traced", "max_size": 1, "timeout": PATIENCE, **options}
            async with AsyncConnectionPool(where, driver="asyncpg", **options_) as pool:
                return await act(pool)

        return asyncio.run(main())

    return run


def asked(*queries):
    return [each for each in seen if each in queries]


def test_every_door_shows_a_tracer_its_statements(play, way):
    queries = ("select 'execute'", "select 'connection'", "select 'getconn'", "select 'dedicated'")

    async def act(pool):
        found = await pool.execute(queries[0])
        assert (found.fetchall(), found.rowcount) == ([("execute",)], 1)
        async with pool.connection() as conn:
            await conn.fetch(queries[1])
        conn = await pool.getconn()
        await conn.fetch(queries[2])
        await pool.putconn(conn)
        async with pool.dedicated() as conn:
            await conn.fetch(queries[3])

    play(act)
    assert asked(*queries) == list(queries)


def test_what_execute_gives_is_the_same_with_a_tracer(play, monkeypatch):
    async def act(pool):
        answers = []
        for query, params in (
            ("select $1::int as n, 'b' as t", [1]),
            ("create table if not exists traced_answers (n int)", None),
            ("insert into traced_answers values (1), (2)", None),
            ("select 1; select 2", None),
            ("drop table traced_answers", None),
        ):
            found = await pool.execute(query, params)
            rows = found.fetchall() if found.description else None
            names = found.description and [each.name for each in found.description]
            answers.append((rows, found.rowcount, found.statusmessage, names))
        return answers

    without = play(act)
    instrument("by_methods", monkeypatch)
    assert play(act) == without
    assert seen


def test_a_tracer_that_comes_and_goes_is_heard(play, monkeypatch):
    async def act(pool):
        await pool.execute("select 'before'")
        with monkeypatch.context() as patch:
            instrument("by_methods", patch)
            await pool.execute("select 'meanwhile'")
        await pool.execute("select 'after'")

    play(act)
    assert asked("select 'before'", "select 'meanwhile'", "select 'after'") == [
        "select 'meanwhile'"
    ]


def test_a_query_logger_of_configure_sees_execute(play):
    logged = []

    def configure(conn):
        conn.add_query_logger(lambda record: logged.append(record.query))

    async def act(pool):
        await pool.execute("select 'logged'")

    play(act, configure=configure)
    assert logged == ["select 'logged'"]


def test_a_connection_class_that_overrides_fetch_sees_execute(play):
    async def act(pool):
        await pool.execute("select 'own class'")

    play(act, connection_class=Traced)
    assert asked("select 'own class'")


def test_a_connection_that_was_given_back_raises_and_is_lent_again(play, way):
    async def act(pool):
        first = await pool.getconn()
        await first.add_listener("news", print)
        await pool.putconn(first)
        with pytest.raises(MisuseError, match="given back"):
            await first.fetch("select 1")
        async with pool.connection() as again:
            assert again is first
            listens = await again.fetch("select pg_listening_channels()")
            assert not listens, "what one borrower changed does not reach the next"

    play(act)


@pytest.mark.parametrize("options", [{"guard": True}, {"reset": "session"}])
def test_an_adopted_connection_takes_the_pools_options(play, way, options):
    async def act(pool):
        kept = await pool.getconn()
        await kept.execute("set application_name to 'of one borrower'")
        pid = kept.get_server_pid()
        await pool.putconn(kept)
        ((name,),) = (await pool.execute("show application_name")).fetchall()
        async with pool.connection() as conn:
            if options.get("guard"):
                assert conn is not kept
                with pytest.raises(asyncpg.InterfaceError):
                    await kept.fetch("select 1")
            if options.get("reset"):
                assert name != "of one borrower"
                assert conn.get_server_pid() == pid
            await conn.fetch("select 'last'")

    play(act, **options)
    assert asked("select 'last'")


def test_guard_keeps_an_adopted_connection_that_nobody_holds(play, way):
    async def act(pool):
        pids = set()
        for _ in range(3):
            async with pool.connection() as conn:
                pids.add(conn.get_server_pid())
            del conn
        assert len(pids) == 1

    play(act, guard=True)


def test_a_statement_of_an_adopted_connection_is_given_up_in_time(play, way):
    async def act(pool):
        with pytest.raises(StatementTimeout):
            await pool.execute("select pg_sleep(60)")
        assert (await pool.execute("select 1")).fetchall() == [(1,)]

    play(act, statement_timeout_client=0.2)


def refused(play, monkeypatch, connect):
    monkeypatch.setattr(asyncpg, "connect", connect)

    async def act(pool):
        with pytest.raises(ServerUnavailable) as caught:
            await pool.execute("select 1")
        return str(caught.value)

    return play(act)


def test_what_a_replaced_connect_raises_is_told_as_itself_at_once(play, monkeypatch):
    async def broken(*args, **options):
        raise KeyError("no vault")

    text = refused(play, monkeypatch, broken)
    assert "asyncpg.connect() raised: KeyError: 'no vault'" in text
    assert "look at asyncpg.connect()" in text


async def closed(conn):
    conn.terminate()
    return conn


async def in_a_transaction(conn):
    await conn.execute("begin")
    return conn


async def nothing(conn):
    conn.terminate()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (closed, "it is closed"),
        (in_a_transaction, "it is in a transaction"),
        (nothing, "it is a NoneType, and no asyncpg.connection.Connection"),
    ],
)
def test_what_cannot_be_adopted_is_refused_at_once(play, monkeypatch, spoil, why):
    async def connect(*args, **options):
        return await spoil(await plain(*args, **options))

    text = refused(play, monkeypatch, connect)
    assert f"asyncpg.connect() gave a connection that cannot be used: {why}" in text


def as_asyncpg_wants_it(server):
    words = parse(server.conninfo())
    return {"host": words["host"], "port": words["port"], "user": words["user"], "ssl": False}


def test_an_open_connection_becomes_a_link_and_leaves_nothing_behind(server):
    before = len(asyncpg_guard._watches)

    async def main():
        conn = await asyncpg.connect(**as_asyncpg_wants_it(server))
        logged = []
        conn.add_query_logger(lambda record: logged.append(record.query))
        link: Any = await own.driver.adopt(conn, Recipe(), PATIENCE)
        assert link.conn is conn
        await link.prepare()
        for name in ("one", "two"):
            await conn.add_listener(name, print)
        assert not link.park()
        assert await link.tidy(PATIENCE)
        with pytest.raises(NotAdopted, match="in a pool already"):
            await own.driver.adopt(conn, Recipe(), PATIENCE)
        link.lend()
        await conn.fetch("select 'kept'")
        await asyncio.sleep(0)  # asyncpg calls its loggers in the loop's next turn
        assert "select 'kept'" in logged, "its loggers as they were when it was adopted"
        held = conn
        assert link.park()
        assert link.renew()
        link.lend()
        assert link.conn is not held
        assert await link.conn.fetchval("select 1") == 1
        with pytest.raises(MisuseError):
            await held.fetchval("select 1")
        await link.close()

    asyncio.run(main())
    gc.collect()
    assert len(asyncpg_guard._watches) == before


def test_a_connection_of_another_loop_or_of_asyncpgs_pool_is_refused(server):
    async def connected():
        return await asyncpg.connect(**as_asyncpg_wants_it(server))

    async def adopted(conn):
        await own.driver.adopt(conn, Recipe(), PATIENCE)

    async def of_a_pool():
        async with (
            asyncpg.create_pool(**as_asyncpg_wants_it(server), min_size=1, max_size=1) as pool,
            pool.acquire() as proxy,
        ):
            with pytest.raises(NotAdopted):
                await adopted(proxy)
            with pytest.raises(NotAdopted, match="in a pool already"):
                await adopted(proxy._con)
            assert await proxy.fetchval("select 1") == 1

    asyncio.run(of_a_pool())
    other = asyncio.new_event_loop()
    try:
        conn = other.run_until_complete(connected())
        with pytest.raises(NotAdopted, match="another event loop"):
            asyncio.run(adopted(conn))
        other.run_until_complete(conn.close())
    finally:
        other.close()


def test_options_pass_a_connect_that_does_not_list_them(play, monkeypatch):
    original = asyncpg.connect

    async def passes_on(*args, **options):
        return await original(*args, **options)

    monkeypatch.setattr(asyncpg, "connect", passes_on)
    options = {"server_settings": {"jit": "off"}, "statement_cache_size": 0, "timeout": 5}

    async def act(pool):
        async with pool.connection() as conn:
            assert await conn.fetchval("show jit") == "off"

    play(act, kwargs=options)
