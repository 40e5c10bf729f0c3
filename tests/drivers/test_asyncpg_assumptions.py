"""What the asyncpg driver takes for granted of asyncpg, one sentence each.

An asyncpg that breaks one of these breaks penstock in a way that is hard to see elsewhere; here it
has a name. Where the sentence says "private", asyncpg promises nothing.
"""

from __future__ import annotations

import asyncio
import inspect
import weakref
from gc import get_referents
from sys import getrefcount
from typing import Any

import asyncpg
import pytest
from tests.drivers.async_links import LOOPS, run
from tests.drivers.asyncpg_links import comes_true, opened

on_each_loop = pytest.mark.parametrize("loop", LOOPS)

# Everything asyncpg keeps in a connection object. `asyncpg_guard` decides of each what a return does.
KNOWN = {
    *("_protocol", "_transport", "_loop", "_addr", "_config", "_params", "_source_traceback"),
    *("_server_version", "_server_caps", "_intro_query", "_reset_query", "__weakref__"),
    *("_stmt_cache", "_stmts_to_close", "_stmt_cache_enabled", "_stmt_exclusive_section"),
    *("_listeners", "_log_listeners", "_termination_listeners", "_query_loggers"),
    *("_top_xact", "_aborted", "_pool_release_ctr", "_cancellations", "_proxy", "_pool_holder"),
}


def test_a_connection_has_these_attributes_and_no_setting_that_we_do_not_know() -> None:
    """Private: a new one may be a setting that would leak: decide, then add it above."""
    assert set(asyncpg.Connection.__slots__) <= KNOWN


def test_what_changes_a_connection_is_what_we_watch() -> None:
    """A new public method may be a new setting."""
    public = {name for name in vars(asyncpg.Connection) if not name.startswith("_")}
    changing = {name for name in public if name.startswith(("add_", "remove_", "set_", "reset"))}
    assert changing == {
        *("add_listener", "remove_listener", "add_log_listener", "remove_log_listener"),
        *("add_termination_listener", "remove_termination_listener", "reset"),
        *("add_query_logger", "remove_query_logger"),
        *("set_type_codec", "reset_type_codec", "set_builtin_type_codec"),
    }


def test_private_methods_have_the_shape_that_we_call() -> None:
    """Private: `_execute`, `__execute`, and those that are replaced."""

    def names(method: str) -> list[str]:
        return list(inspect.signature(getattr(asyncpg.Connection, method)).parameters)

    for method in ("_execute", "_Connection__execute"):
        assert names(method)[:5] == ["self", "query", "args", "limit", "timeout"]
        assert {"return_status", "ignore_custom_codec", "record_class"} <= set(names(method))
    for method in ("_check_open", "_abort", "_cleanup", "_reset", "_drop_local_type_cache"):
        assert names(method) == ["self"]
    assert names("execute") == ["self", "query", "args", "timeout"]
    assert names("close") == ["self", "timeout"]


@on_each_loop
def test_whatever_is_under_way_refers_to_the_protocol_and_nothing_else_comes_and_goes(
    unix_dsn: str, loop: str
) -> None:
    """Private: the count of references is that of a connection at rest, or higher."""

    async def main() -> None:
        async with opened(unix_dsn) as link:
            conn, protocol = link.conn, link.protocol
            at_rest = getrefcount(protocol)
            for number in range(30):
                await conn.fetch(f"select {number}")
            statement = await conn.prepare("select 1")
            await statement.fetch()
            assert getrefcount(protocol) == at_rest
            for start in (
                lambda: conn.fetch("select pg_sleep(0.02)"),
                lambda: conn.execute("select pg_sleep(0.02)"),
                lambda: conn.executemany("select pg_sleep($1)", [(0.02,)]),
                lambda: conn.copy_from_query("select pg_sleep(0.02)", output=_nothing),
                statement.fetch,
                lambda: conn.prepare("select 2"),
            ):
                task = asyncio.ensure_future(start())
                await asyncio.sleep(0)
                assert getrefcount(protocol) > at_rest
                await task
                del task
                await comes_true(lambda: getrefcount(protocol) == at_rest)

    run(main(), loop)


async def _nothing(_: bytes) -> None:
    pass


@on_each_loop
def test_a_pending_future_of_the_protocol_is_a_statement_under_way(
    unix_dsn: str, loop: str
) -> None:
    """Private: what asyncpg waits for is a future that the protocol holds; at rest none is pending."""

    async def main() -> None:
        async with opened(unix_dsn) as link:

            def pending() -> list[Any]:
                found = get_referents(link.protocol)
                return [
                    each for each in found if isinstance(each, asyncio.Future) and not each.done()
                ]

            assert not pending()
            task = asyncio.ensure_future(link.conn.fetch("select pg_sleep(0.02)"))
            await comes_true(pending)
            await task
            assert not pending()

    run(main(), loop)


def test_the_protocol_answers_these_questions(unix_dsn: str) -> None:
    """Private: methods of `_protocol`."""

    async def main() -> None:
        async with opened(unix_dsn) as link:
            protocol = link.protocol
            assert protocol.is_connected() and not protocol.is_in_transaction()
            assert not protocol._is_cancelling()
            assert await protocol.query("select 1", None) == "SELECT 1"
            assert await protocol._wait_for_cancellation() is None

    run(main())


def test_errors_of_ours_can_be_errors_of_asyncpgs() -> None:
    """The bases that pools' errors get can be told apart from each other by nobody's accident."""
    assert not issubclass(asyncpg.InterfaceError, asyncpg.PostgresError)
    assert issubclass(asyncpg.PostgresConnectionError, asyncpg.PostgresError)
    assert asyncpg.ConnectionDoesNotExistError.sqlstate == "08003"
    assert issubclass(asyncpg.ClientConfigurationError, (asyncpg.InterfaceError, ValueError))


def test_what_asyncpg_knows_of_a_connection_it_finds_weakly_and_in_two_places(
    unix_dsn: str,
) -> None:
    """Private: `protocol.set_connection`, and `_stmt_cache._on_remove`; a renewed object is told to both."""

    async def main() -> None:
        async with opened(unix_dsn) as link:
            callback = link.conn._stmt_cache._on_remove
            (to,) = callback.args
            assert isinstance(to, weakref.ref)
            assert to() is link.conn
            assert callable(link.protocol.set_connection)
            conn: Any = link.conn
            before = getrefcount(conn)
            await conn.fetch("select 1")
            assert getrefcount(conn) == before

    run(main())
