"""What the psycopg 3 driver for asyncio takes for granted of psycopg and of loops, one sentence each.

What both drivers take for granted is in test_third_party_assumptions.py. Where the sentence says "private",
psycopg promises nothing.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import pq, waiting
from tests.drivers.async_links import LOOPS, SECONDS, async_test

from penstock._drivers.psycopg3 import guard

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from pytest_penstock.postgres import Server

Conn = psycopg.AsyncConnection[Any]


@asynccontextmanager
async def connected(
    server: Server, cls: type[Conn] = psycopg.AsyncConnection
) -> AsyncIterator[Conn]:
    conn = await cls.connect(server.conninfo(over="unix"))
    async with conn:
        yield conn


@async_test
async def test_an_asyncio_connection_has_the_attributes_of_a_synchronous_one(
    server: Server,
) -> None:
    """Private: so one guard serves both."""
    with psycopg.connect(server.conninfo(over="unix")) as plain:
        async with connected(server) as conn:
            assert set(vars(conn)) == set(vars(plain))


def test_what_the_guard_overrides_both_kinds_have_from_their_base() -> None:
    """Private: `Watching` goes in front of either."""
    for name in ("adapters", "add_notice_handler", "add_notify_handler", "_check_connection_ok"):
        assert name in vars(psycopg.BaseConnection)
        assert name not in vars(psycopg.Connection)
        assert name not in vars(psycopg.AsyncConnection)


@async_test
async def test_setters_store_under_the_names_that_we_watch(server: Server) -> None:
    """Private: `set_autocommit()` ... end in plain attribute stores."""
    stored: list[str] = []

    class Recording(psycopg.AsyncConnection[Any]):
        def __setattr__(self, name: str, value: object) -> None:
            stored.append(name)
            super().__setattr__(name, value)

    async with connected(server, Recording) as conn:
        stored.clear()
        await conn.set_autocommit(True)
        await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        await conn.set_read_only(True)
        await conn.set_deferrable(True)
        assert {"_autocommit", "_isolation_level", "_read_only", "_deferrable"} <= set(stored)
        stored.clear()
        await conn.execute("select %s", (1,))
        await conn.commit()
        assert not guard._WATCHED.intersection(stored)


@async_test
async def test_blocks_show_while_one_is_inside(server: Server) -> None:
    """Private, but for the lock, which is undocumented: it is asyncio's, and held by a stream."""
    async with connected(server) as conn:
        await conn.set_autocommit(True)
        assert isinstance(conn.lock, asyncio.Lock)
        async with conn.transaction():
            assert conn._num_transactions == 1
        async with conn.pipeline():
            assert conn._pipeline is not None
        await conn.execute("listen c")
        await conn.execute("notify c")
        inside = conn.notifies(timeout=SECONDS)
        await anext(inside)
        assert conn._notifies_backlog is None and conn.lock.locked()
        await inside.aclose()
        stream: AsyncGenerator[Any] = conn.cursor().stream("select generate_series(1, 3)")  # type: ignore[assignment]
        await anext(stream)
        assert conn.lock.locked()
        await stream.aclose()
        assert not conn.lock.locked()


@async_test
async def test_a_free_lock_is_taken_without_waiting() -> None:
    """asyncio's: so COMMIT is sent before the first wait."""
    with pytest.raises(StopIteration):
        asyncio.Lock().acquire().send(None)


@async_test
async def test_all_that_waits_calls_the_method_wait(server: Server) -> None:
    """Undocumented, and with these arguments: a connection of ours hears a cancellation there."""
    waited: list[str] = []

    class Mine(psycopg.AsyncConnection[Any]):
        async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            waited.append("waited")
            return await super().wait(gen, *args, **kwargs)

    async with connected(server, Mine) as conn:
        for use in (
            lambda: conn.execute("select 1"),
            conn.commit,
            lambda: psycopg.AsyncCursor(conn).execute("select 1", prepare=False),
            conn.rollback,
        ):
            waited.clear()
            await use()
            assert waited
    parameters = list(inspect.signature(psycopg.AsyncConnection.wait).parameters)
    assert parameters[:3] == ["self", "gen", "interval"]
    assert list(inspect.signature(waiting.wait_async).parameters)[:3] == [
        *("gen", "fileno", "interval")
    ]


@async_test
async def test_an_error_can_be_made_of_a_result(server: Server) -> None:
    """`error_from_result` is undocumented, and the handle's `_encoding` private."""
    async with connected(server) as conn:
        result = conn.pgconn.exec_(b"select 1/0")
        error = psycopg.errors.error_from_result(result, encoding=conn.pgconn._encoding)
        assert isinstance(error, psycopg.errors.DivisionByZero)
        assert error.diag.sqlstate == "22012"


@pytest.mark.skipif(
    not psycopg.capabilities.has_cancel_safe(), reason="this libpq is older than 17"
)
@async_test
async def test_a_request_to_cancel_is_a_connection_that_can_be_stepped(server: Server) -> None:
    """psycopg's own face of libpq's PGcancelConn, undocumented."""
    async with connected(server) as conn:
        asking = conn.pgconn.cancel_conn()
        asking.start()
        assert asking.socket >= 0
        assert asking.poll() in set(pq.PollingStatus)
        asking.finish()
        await conn.rollback()


@pytest.mark.parametrize("loop", LOOPS)
@async_test
async def test_taking_away_what_is_not_there_is_no_error(loop: str) -> None:
    running = asyncio.get_running_loop()
    assert not running.remove_reader(0)
    assert not running.remove_writer(0)
