"""What a borrower leaves half done, where the row `session_state` is not played: what psycopg2, asyncpg and `notifies()` leave."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.forks import until

from penstock import AsyncConnectionPool, ConnectionPool


def test_nobody_waits_for_psycopg2_to_reset_a_session(server, proxy):
    with ConnectionPool(
        server.conninfo(port=proxy.port),
        driver="psycopg2",
        max_size=1,
        reset="session",
        name="wire-psycopg2",
    ) as pool:
        pool.open(wait=True)
        with pool.connection(autocommit=True) as conn, conn.cursor() as cursor:
            cursor.execute("set search_path to nowhere")
            proxy.freeze()
        # We are here, though the wire stands still: a worker waits for the answer.
        assert pool.stats().in_use == 1
        proxy.thaw()
        assert pool.execute("show search_path").fetchone() != ("nowhere",)
        until(lambda: pool.stats().idle == 1, "it is back")
        assert pool.stats().opened == 1


@pytest.mark.parametrize("reset", ["rollback", "session"])
def test_a_copy_of_asyncpgs_that_another_task_is_in_is_not_the_next_borrowers(
    server, reset, caplog
):
    async def main():
        async with AsyncConnectionPool(
            server.conninfo(), driver="asyncpg", max_size=1, reset=reset, name="copy"
        ) as pool:
            inside = asyncio.Event()

            async def sink(_data):
                inside.set()
                await asyncio.sleep(60)

            conn = await pool.getconn()
            copy = asyncio.create_task(
                conn.copy_from_query("select generate_series(1, 100000)", output=sink)
            )
            await inside.wait()
            await pool.putconn(conn)
            answers = [(await pool.execute(f"select {n}")).fetchall() for n in range(3)]
            copy.cancel()
            with pytest.raises((asyncio.CancelledError, Exception)):
                await copy
            return answers

    with caplog.at_level(logging.WARNING, logger="penstock"):
        assert asyncio.run(main()) == [[(0,)], [(1,)], [(2,)]]
    assert "while a statement was under way" in caplog.text
    assert "(at faults/test_left_behind.py:" in caplog.text


def test_the_warning_about_an_open_transaction_says_where_it_was_given_back(server, caplog):
    with ConnectionPool(server.conninfo(over="unix"), max_size=1, name="left-open") as pool:
        conn = pool.getconn()
        conn.execute("select 1")
        pool.putconn(conn)
    assert "given back idle in transaction: rolled back" in caplog.text
    assert "(at faults/test_left_behind.py:" in caplog.text


def test_notifies_that_is_left_open_is_no_statement_under_way(server, caplog):
    """It holds psycopg's lock, as a statement does; what is said must tell them apart."""

    async def leave():
        dsn = server.conninfo(over="unix")
        async with AsyncConnectionPool(dsn, autocommit=True, max_size=1) as pool:
            async with pool.connection() as conn:
                await conn.execute("listen news")
                await conn.execute("notify news")
                notices = conn.notifies(timeout=1)
                await anext(notices)
            await notices.aclose()

    asyncio.run(leave())
    [record] = [each for each in caplog.records if each.name == "penstock"]
    assert "in the middle of something" in record.getMessage()
