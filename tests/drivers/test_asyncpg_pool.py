"""AsyncConnectionPool over asyncpg on a real PostgreSQL, as its users write it."""

from __future__ import annotations

import asyncio
import gc
import pickle
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from tests.drivers.async_links import LOOPS, CancelledAt, run
from tests.drivers.asyncpg_links import GIVEN_BACK, comes_true

from penstock import AsyncConnectionPool, MisuseError, PoolClosed, PoolTimeout, ServerUnavailable

if TYPE_CHECKING:
    import random

    from pytest_penstock.postgres import Server

on_each_loop = pytest.mark.parametrize("loop", LOOPS)


def pool_of(server: Server, **options: Any) -> Any:
    return AsyncConnectionPool(server.conninfo(over="unix"), driver="asyncpg", **options)


@pytest.fixture
def table(server: Server) -> Any:
    server.execute("create table bought (a int)")
    yield server
    server.execute("drop table bought")


@on_each_loop
def test_it_commits_rolls_back_and_answers(table: Server, loop: str) -> None:
    async def main() -> None:
        async with pool_of(table, max_size=2) as pool:
            async with pool.connection() as conn:
                assert await conn.fetchval("select 40 + $1", 2) == 42
            with pytest.raises(asyncpg.InterfaceError, match=GIVEN_BACK):
                await conn.fetchval("select 1")
            async with pool.connection(transaction=True) as conn:
                await conn.execute("insert into bought values (1)")
                async with conn.transaction():
                    await conn.execute("insert into bought values (2)")
            with pytest.raises(ZeroDivisionError):
                async with pool.connection(transaction=True) as conn:
                    await conn.execute("insert into bought values (3)")
                    raise ZeroDivisionError
            result = await pool.execute("select a from bought where a > $1 order by a", [0])
            assert [tuple(row) for row in result] == [(1,), (2,)]
            async with pool.connection(settings={"work_mem": "7MB"}) as conn:
                assert await conn.fetchval("show work_mem") == "7MB"
            assert (await pool.execute("show work_mem")).fetchone()[0] != "7MB"

    run(main(), loop)
    gc.collect()


@on_each_loop
def test_an_ended_session_is_never_lent(server: Server, loop: str) -> None:
    async def main() -> None:
        async with pool_of(server, min_size=1, max_size=1) as pool:
            async with pool.connection() as conn:
                pid = conn.get_server_pid()
            server.execute(f"select pg_terminate_backend({pid})")
            await comes_true(lambda: pool.stats().idle == 0 or pool.stats().opening)
            async with pool.connection() as conn:
                assert conn.get_server_pid() != pid

    run(main(), loop)


def test_errors_are_asyncpgs_too(server: Server) -> None:
    async def main() -> None:
        async with pool_of(server, max_size=1, name="small") as pool, pool.connection():
            others = asyncio.ensure_future(pool.getconn(timeout=0.01))
            with pytest.raises(PoolTimeout) as caught:
                await others
        for error in (caught.value, await closed(pool), await down()):
            assert isinstance(error, asyncpg.PostgresConnectionError)
            again = pickle.loads(pickle.dumps(error))
            assert type(again) is type(error) and str(again) == str(error)
        assert "small" in str(caught.value)
        assert isinstance(caught.value, TimeoutError)  # as of asyncpg's own pool

    async def closed(pool: Any) -> PoolClosed:
        with pytest.raises(PoolClosed) as caught:
            await pool.execute("select 1")
        return caught.value

    async def down() -> ServerUnavailable:
        pool = AsyncConnectionPool("host=127.0.0.1 port=1 user=me", driver="asyncpg", timeout=0.3)
        async with pool:
            with pytest.raises(ServerUnavailable) as caught:
                await pool.execute("select 1")
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        return caught.value

    run(main())
    pool = pool_of(server)
    with pytest.raises(RuntimeError):
        pool.execute("select 1").send(None)
    assert issubclass(MisuseError, Exception)


@on_each_loop
def test_a_session_pool_leaks_nothing_and_keeps_codecs_and_statements(
    server: Server, loop: str
) -> None:
    async def configure(conn: Any) -> None:
        await conn.set_type_codec(
            "json", schema="pg_catalog", encoder=str, decoder=lambda _: "mine"
        )

    async def main() -> None:
        async with pool_of(server, max_size=1, reset="session", configure=configure) as pool:
            for _ in range(20):
                async with pool.connection() as conn:
                    assert await conn.fetchval("select '1'::json") == "mine"
                    assert await conn.fetchval("show work_mem") != "7MB"
                    await conn.execute("set work_mem = '7MB'")
                    await conn.reset_type_codec("json", schema="pg_catalog")
                    conn.add_query_logger(print)
            assert pool.stats().opened == 1

    run(main(), loop)


@on_each_loop
def test_cancelled_and_timed_out_at_random_nothing_is_lost_and_nothing_is_wrong(
    server: Server, loop: str, rng: random.Random
) -> None:
    async def ask(pool: Any, number: int) -> None:
        async with pool.connection() as conn:
            assert await conn.fetchval("select $1::int from pg_sleep(0.001)", number) == number

    async def main() -> None:
        async with pool_of(server, min_size=4, max_size=4, name="stormy") as pool:
            for _ in range(20):
                tasks = [asyncio.ensure_future(ask(pool, number)) for number in range(20)]
                for task in tasks:
                    asyncio.get_running_loop().call_later(rng.uniform(0, 0.03), task.cancel)
                done = await asyncio.gather(*tasks, return_exceptions=True)
                wrong = [one for one in done if isinstance(one, Exception)]
                assert not wrong
            await comes_true(lambda: pool.stats().idle == 4 and not pool.stats().in_use)
            conns = [await pool.getconn(timeout=10) for _ in range(4)]
            assert len({conn.get_server_pid() for conn in conns}) == 4
            for conn in conns:
                assert await conn.fetchval("select 1") == 1
                await pool.putconn(conn)
            found = server.execute(
                "select count(*) from pg_stat_activity where application_name like '%stormy%'"
            )
            assert found == [("4",)]

    run(main(), loop)
    gc.collect()


@on_each_loop
@pytest.mark.parametrize("options", [{}, {"transaction": True}])
def test_a_statement_that_was_cut_off_is_ended_on_the_server_and_its_session_is_lent_again(
    server: Server, loop: str, options: dict[str, Any]
) -> None:
    async def main() -> None:
        async with pool_of(server, max_size=1) as pool:
            async with pool.connection() as conn:
                pid = conn.get_server_pid()
            sleeping = (
                f"select 1 from pg_stat_activity where pid = {pid} and query ~ '^select pg_sl'"
            )
            running = f"{sleeping} and wait_event = 'PgSleep'"

            async def work() -> None:
                async with pool.connection(**options) as conn:
                    await conn.execute("select pg_sleep(30)")

            for _ in range(3):
                task = asyncio.ensure_future(work())
                await comes_true(lambda: server.execute(running))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                async with pool.connection() as conn:
                    assert conn.get_server_pid() == pid
                    assert await conn.fetchval("select 1") == 1
                assert not server.execute(running)

    run(main(), loop)
    gc.collect()


@on_each_loop
@pytest.mark.parametrize("into", [False, True])
def test_a_copy_that_was_cut_off_anywhere_reaches_nobody(
    table: Server, loop: str, into: bool
) -> None:
    async def slowly(_: bytes) -> None:
        await asyncio.sleep(0)

    async def rows() -> Any:
        for number in range(2000):
            await asyncio.sleep(0)
            yield (number,)

    async def copy(conn: Any) -> None:
        if into:
            await conn.copy_records_to_table("bought", records=rows(), columns=["a"])
        else:
            query = "select repeat('x', 1000) from generate_series(1, 2000)"
            await conn.copy_from_query(query, output=slowly)

    async def main() -> None:
        async with pool_of(table, max_size=1) as pool:

            async def work(nth: int, late: bool) -> None:
                async with pool.connection() as conn:
                    await CancelledAt(copy(conn), nth, late=late)

            for nth in range(1, 12):
                for late in (False, True):
                    task = asyncio.ensure_future(work(nth, late))
                    await asyncio.wait({task})
                    async with pool.connection() as conn:
                        assert await conn.fetchval("select 41 + 1") == 42, (nth, late)

    run(main(), loop)
    gc.collect()
