"""A program: each driver of one runtime with each option that leans on the library's inside; says "fine".

It must not know: tests. `python every_option.py threads|gevent|asyncio CONNINFO`
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

if sys.argv[1] == "gevent":
    from gevent import monkey

    monkey.patch_all()

from penstock import AsyncConnectionPool, ConnectionPool

EACH: dict[str, dict[str, Any]] = {
    "reset": {"reset": "session"},
    "guard": {"guard": True},
    "limit": {"statement_timeout_client": 20},
    "ping": {"ping_after": 0},
}
OPTIONS = {"plain": {}, **EACH, "all": {k: v for each in EACH.values() for k, v in each.items()}}
POOL: dict[str, Any] = {"min_size": 1, "max_size": 1, "timeout": 20, "conninfo": sys.argv[2]}


def threads(driver: Any, options: dict[str, Any]) -> None:
    with ConnectionPool(driver=driver, **POOL, **options) as pool:
        for autocommit in (False, True, False):
            with pool.connection(autocommit=autocommit) as conn:
                conn.cursor().execute("set work_mem = '7MB'")
        with contextlib.suppress(Exception), pool.connection() as conn:
            conn.cursor().execute("select nonsense")
        conn = pool.getconn()
        conn.cursor().execute("listen something")
        pool.putconn(conn)
        assert pool.execute("select 1").fetchone() == (1,)
        with pool.dedicated() as conn:
            conn.cursor().execute("select 1")
        # psycopg2 can have no second object over one session.
        assert pool.stats().opened == 1 or (driver == "psycopg2" and "guard" in options)


async def tasks(driver: Any, options: dict[str, Any]) -> None:
    async with AsyncConnectionPool(driver=driver, **POOL, **options) as pool:
        for _ in range(3):
            async with pool.connection() as conn:
                await conn.execute("set work_mem = '7MB'")
        async with pool.connection(transaction=True) as conn:
            await conn.execute("select 1")
        with contextlib.suppress(Exception):
            async with pool.connection() as conn:
                await conn.execute("select nonsense")
        conn = await pool.getconn()
        await conn.execute("listen something")
        await pool.putconn(conn)
        row = (await pool.execute("select 1")).fetchone()
        assert row is not None
        assert tuple(row) == (1,)
        async with pool.dedicated() as conn:
            await conn.execute("select 1")
        assert pool.stats().opened == 1


def main() -> None:
    for name, options in OPTIONS.items():
        for driver in ("psycopg", "asyncpg" if sys.argv[1] == "asyncio" else "psycopg2"):
            try:
                if sys.argv[1] == "asyncio":
                    asyncio.run(tasks(driver, options))
                else:
                    threads(driver, options)
            except BaseException:
                print(f"{driver}, {name}:")
                raise
    print("fine")


main()
