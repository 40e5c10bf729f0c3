"""What users of each driver write: the columns of the table of misuse.

One job: spell one act (ask, a cursor, a block, something left half done) as each driver wants it.

It must not know: pools, modes, what comes of it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.contract.runtimes import settled

from penstock import AsyncConnectionPool, ConnectionPool

if TYPE_CHECKING:
    from collections.abc import Coroutine

NONE = "-"  # there is no such thing over this driver


class Column:
    """One driver: what users write with it."""

    title = ""
    driver = "psycopg"
    pool: Any = ConnectionPool
    threads = True

    async def ask(self, conn: Any, query: str = "select 1") -> Any:
        return await settled(conn.execute(query))

    async def roll_back(self, conn: Any) -> Any:
        return await settled(conn.rollback())

    async def configure(self, conn: Any) -> Any:
        conn.autocommit = True

    async def cursor(self, conn: Any) -> Any:
        cursor = conn.cursor()
        return lambda: cursor.execute("select 1")

    async def server_cursor(self, conn: Any) -> Any:
        cursor = conn.cursor("far")
        await settled(cursor.execute("select generate_series(1, 1000)"))
        return cursor.fetchone

    async def method(self, conn: Any) -> Any:
        return conn.commit

    async def block(self, conn: Any) -> Any:
        block = conn.transaction()

        def enter_and_leave() -> None:
            with block:
                pass

        return enter_and_leave

    async def unfinished_stream(self, conn: Any) -> Any:
        stream = conn.cursor().stream("select generate_series(1, 10000)")
        next(stream)
        return lambda: next(stream)

    async def unfinished_copy(self, conn: Any) -> Any:
        copy = conn.cursor().copy("copy (select generate_series(1, 10000)) to stdout")
        return copy.__enter__().read

    async def unfinished_pipeline(self, conn: Any) -> Any:
        return conn.pipeline().__enter__().sync

    async def unfinished_block(self, conn: Any) -> Any:
        block = conn.transaction()
        block.__enter__()
        return lambda: block.__exit__(None, None, None)

    def begun(self, conn: Any) -> bool:
        return bool(conn.info.transaction_status == 1)  # ACTIVE in libpq

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(main)


class Psycopg(Column):
    title = "psycopg 3"


class AsyncPsycopg(Column):
    title = "psycopg 3, asyncio"
    pool = AsyncConnectionPool
    threads = False

    async def configure(self, conn: Any) -> Any:
        await conn.set_autocommit(True)

    async def block(self, conn: Any) -> Any:
        block = conn.transaction()

        async def enter_and_leave() -> None:
            async with block:
                pass

        return enter_and_leave

    async def unfinished_stream(self, conn: Any) -> Any:
        stream = conn.cursor().stream("select generate_series(1, 10000)")
        await anext(stream)
        return lambda: anext(stream)

    async def unfinished_copy(self, conn: Any) -> Any:
        copy = conn.cursor().copy("copy (select generate_series(1, 10000)) to stdout")
        return (await copy.__aenter__()).read

    async def unfinished_pipeline(self, conn: Any) -> Any:
        return (await conn.pipeline().__aenter__()).sync

    async def unfinished_block(self, conn: Any) -> Any:
        block = conn.transaction()
        await block.__aenter__()
        return lambda: block.__aexit__(None, None, None)


class Psycopg2(Column):
    title = "psycopg2"
    driver = "psycopg2"

    async def ask(self, conn: Any, query: str = "select 1") -> Any:
        conn.cursor().execute(query)

    async def server_cursor(self, conn: Any) -> Any:
        cursor = conn.cursor("far")
        cursor.execute("select generate_series(1, 1000)")
        return cursor.fetchone

    async def block(self, conn: Any) -> Any:
        def enter_and_leave() -> None:
            with conn:
                pass

        return enter_and_leave

    async def unfinished_stream(self, conn: Any) -> Any:
        return None

    unfinished_copy = unfinished_pipeline = unfinished_stream

    async def unfinished_block(self, conn: Any) -> Any:
        conn.__enter__()
        return lambda: conn.__exit__(None, None, None)


class Asyncpg(Column):
    title = "asyncpg"
    driver = "asyncpg"
    pool = AsyncConnectionPool
    threads = False

    async def roll_back(self, conn: Any) -> Any:
        return NONE

    async def configure(self, conn: Any) -> Any:
        conn.add_query_logger(print)

    async def cursor(self, conn: Any) -> Any:
        return (await conn.prepare("select 1")).fetch

    async def server_cursor(self, conn: Any) -> Any:
        await conn.transaction().start()
        return (await conn.cursor("select generate_series(1, 1000)")).fetchrow

    async def method(self, conn: Any) -> Any:
        return partial(conn.fetch, "select 1")

    async def block(self, conn: Any) -> Any:
        return conn.transaction().start

    async def unfinished_stream(self, conn: Any) -> Any:
        await conn.transaction().start()
        rows = aiter(conn.cursor("select generate_series(1, 1000)", prefetch=10))
        for _ in range(10):
            await anext(rows)
        return lambda: anext(rows)

    async def unfinished_copy(self, conn: Any) -> Any:
        return None

    unfinished_pipeline = unfinished_copy

    async def unfinished_block(self, conn: Any) -> Any:
        block = conn.transaction()
        await block.start()
        return block.commit

    def begun(self, conn: Any) -> bool:
        return True  # with the task's first step


COLUMNS: list[Column] = [Psycopg(), AsyncPsycopg(), Psycopg2(), Asyncpg()]
