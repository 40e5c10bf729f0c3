"""What users write, as type checkers must see it. Nothing here is run: mypy and pyright read it."""

from __future__ import annotations

from typing import Any, assert_type

from flask import Flask, Response
from psycopg import AsyncConnection, Connection
from psycopg.rows import DictRow, TupleRow, dict_row
from psycopg2.extensions import connection as Connection2  # noqa: N812  a class in spite of its name
from psycopg2.extras import RealDictConnection

from penstock import (
    AsyncConnectionPool,
    AsyncPools,
    ConnectionPool,
    Health,
    PoolConfig,
    Pools,
    Result,
    Stats,
)
from penstock.integrations.asgi import Penstock as AsgiPenstock
from penstock.integrations.flask import Database, Penstock


class AuditedConnection(Connection[DictRow]):
    """A class of the user's own."""

    def audit(self) -> None:
        """Something that only this class has."""


# -- which connections a pool has -----------------------------------------------------------------

plain = ConnectionPool("postgresql://app@db/shop", min_size=1, max_size=10)
assert_type(plain, ConnectionPool[Connection[TupleRow]])

dicts = ConnectionPool(
    "postgresql://app@db/shop",
    connection_class=Connection[DictRow],
    kwargs={"row_factory": dict_row},
)
assert_type(dicts, ConnectionPool[Connection[DictRow]])

audited = ConnectionPool(lambda: "postgresql://app@db/shop", connection_class=AuditedConnection)
assert_type(audited, ConnectionPool[AuditedConnection])

annotated: ConnectionPool[Connection[TupleRow]] = ConnectionPool()

by_name = ConnectionPool("postgresql://app@db/shop", driver="psycopg")
assert_type(by_name, ConnectionPool[Connection[TupleRow]])

older = ConnectionPool("postgresql://app@db/shop", driver="psycopg2", autocommit=True)
assert_type(older, ConnectionPool[Connection2])

older_dicts = ConnectionPool(driver="psycopg2", connection_class=RealDictConnection)
assert_type(older_dicts, ConnectionPool[RealDictConnection])


# -- every way to borrow gives one of them ---------------------------------------------------------


def borrow() -> None:
    with plain.connection() as conn:
        assert_type(conn, Connection[TupleRow])
        assert_type(conn.execute("select 1").fetchone(), TupleRow | None)
    with dicts.connection(timeout=1.0, settings={"app.user": "ann"}) as row_conn:
        assert_type(row_conn.execute("select 1").fetchall(), list[DictRow])
    with audited.connection(autocommit=True) as own_conn:
        own_conn.audit()
    with audited.dedicated(autocommit=True) as listener:
        assert_type(listener, AuditedConnection)


def borrow_from_psycopg2() -> None:
    with older.connection() as conn, conn.cursor() as cursor:
        assert_type(conn, Connection2)
        cursor.execute("select 1")
    with older_dicts.connection() as own_conn:
        assert_type(own_conn, RealDictConnection)


def borrow_without_a_block() -> None:
    conn = dicts.getconn(timeout=0)
    assert_type(conn, Connection[DictRow])
    dicts.putconn(conn)


def one_statement() -> list[Any]:
    result = plain.execute("select %s", (1,), timeout=1.0)
    assert_type(result, Result)
    return [*result, *result.fetchall()]


def look_at_it() -> None:
    assert_type(plain.stats(), Stats)
    assert_type(plain.health(), Health)
    assert_type(plain.closed, bool)
    with plain as opened:
        assert_type(opened, ConnectionPool[Connection[TupleRow]])


# -- every option has its type ---------------------------------------------------------------------


def prepare(conn: Connection[TupleRow]) -> None:
    conn.execute("set search_path to shop")


everything = ConnectionPool(
    "",
    connection_class=None,
    kwargs=lambda: {"connect_timeout": 3},
    driver="psycopg",
    min_size=0,
    max_size=4,
    name="shop",
    timeout=None,
    max_waiting=100,
    max_lifetime=None,
    max_idle=60,
    ping_after=0,
    reconnect_timeout=None,
    reconnect_failed=print,
    overdue_after=1.5,
    order="fifo",
    autocommit=True,
    configure=prepare,
    check=prepare,
    reset="session",
    on_borrow=prepare,
    server_check_interval=None,
    statement_timeout_client=1.0,
    read_write=True,
    guard=True,
    open=False,
)
assert_type(everything, ConnectionPool[Connection[TupleRow]])


# -- many databases from a file -----------------------------------------------------------------------

pools = Pools.from_file("db.ini", "orders", "users")
assert_type(pools["orders"], ConnectionPool[Any])
from_a_file: ConnectionPool[Connection[TupleRow]] = ConnectionPool.from_config(
    PoolConfig.from_file("db.ini", section="orders")
)


def read_elsewhere() -> None:
    assert_type(PoolConfig.from_env(prefix="SHOP_"), PoolConfig)
    assert_type(PoolConfig.from_mapping({"host": "db", "max_size": "4"}, name="shop"), PoolConfig)
    for name, pool in pools.items():
        print(name, pool.stats(), pools.health()[name].why)


# -- Flask ----------------------------------------------------------------------------------------

flask_app = Flask(__name__)
db = Penstock(flask_app)
assert_type(db, Penstock[Connection[TupleRow]])
dict_db = Penstock(connection_class=Connection[DictRow])
dict_db.init_app(flask_app)
orders = dict_db["orders"]
assert_type(orders, Database[Connection[DictRow]])


@db.on_first_use
def say_who(conn: Connection[TupleRow]) -> None:
    conn.execute("select set_config('app.user', 'ann', true)")


@flask_app.get("/")
def view() -> Response:
    assert_type(db.conn, Connection[TupleRow])
    assert_type(orders.conn, Connection[DictRow])
    assert_type(orders.pool, ConnectionPool[Connection[DictRow]])
    assert_type(db.health(), Health)
    rows: list[Any] = db.execute("select %s", (1,)).fetchall()
    db.commit()
    orders.rollback()
    say_who(db.conn)
    return db.stream((str(row) for row in rows), mimetype="text/csv", status=203)


# -- asyncio ---------------------------------------------------------------------------------------


class AuditedAsyncConnection(AsyncConnection[DictRow]):
    """A class of the user's own."""


async def token() -> str:
    return "postgresql://app@db/shop"


async def options() -> dict[str, str]:
    return {"password": "from a vault"}


async def configure(conn: AsyncConnection[TupleRow]) -> None:
    await conn.execute("set search_path = shop")


later = AsyncConnectionPool("postgresql://app@db/shop", max_size=4, configure=configure)
assert_type(later, AsyncConnectionPool[AsyncConnection[TupleRow]])
assert_type(AsyncConnectionPool(token, kwargs=options).name, str)

own_later = AsyncConnectionPool(connection_class=AuditedAsyncConnection)
assert_type(own_later, AsyncConnectionPool[AuditedAsyncConnection])

with_asyncpg = AsyncConnectionPool("postgresql://app@db/shop", driver="asyncpg")


async def borrow_later() -> None:
    async with later.connection() as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    async with own_later.connection(timeout=1.0, autocommit=True) as own_conn:
        assert_type(own_conn, AuditedAsyncConnection)
    conn = await later.getconn()
    assert_type(conn, AsyncConnection[TupleRow])
    await later.putconn(conn)
    async with later.dedicated() as alone:
        assert_type(alone, AsyncConnection[TupleRow])
    assert_type(await later.execute("select 1"), Result)
    async with with_asyncpg.connection(transaction=True) as other:
        await other.execute("select 1")
    assert_type(later.stats(), Stats)
    async with AsyncPools.from_file("db.ini") as pools:
        assert_type(pools["orders"], AsyncConnectionPool[Any])


# -- ASGI ------------------------------------------------------------------------------------------

asgi = AsgiPenstock(AsyncConnectionPool("postgresql://app@db/shop"))


async def endpoint() -> None:
    assert_type(await asgi.connection(), AsyncConnection[TupleRow])
