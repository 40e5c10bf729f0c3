"""What the psycopg 3 driver takes for granted of psycopg, one sentence each.

A psycopg that breaks one of these breaks penstock in a way that is hard to see elsewhere; here it
has a name. Where the sentence says "private", psycopg promises nothing.
"""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import pq
from psycopg.adapt import AdaptersMap
from psycopg.types import TypesRegistry

from penstock._drivers.psycopg3 import guard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_penstock.postgres import Server

    Conn = psycopg.Connection[Any]


@pytest.fixture
def conn(server: Server) -> Iterator[Conn]:
    with psycopg.connect(server.conninfo(over="unix")) as conn:
        yield conn


# Everything psycopg keeps in a connection object. `guard` decides of each what a return does with it.
SETTINGS = {*guard._PLAIN, "_prepared", "_notice_handlers", "_notify_handlers", "_adapters"}
CACHES = {"_begin_statement"}  # reset whenever a setting is
OPEN_BLOCKS = {"_num_transactions", "_pipeline", "_notifies_backlog"}
TRANSACTIONS = {"_tpc"}  # reset at each restore
IDENTITY = {"pgconn", "lock", "_closed"}


def test_a_connection_has_these_attributes_and_no_setting_that_we_do_not_know(conn: Conn) -> None:
    """Private: a new one may be a setting that would leak: decide, then add it above."""
    assert set(vars(conn)) == SETTINGS | CACHES | OPEN_BLOCKS | TRANSACTIONS | IDENTITY


def test_the_settings_of_a_prepare_manager_are_two(conn: Conn) -> None:
    """Private: `prepare_threshold` and `prepared_max` live in `conn._prepared`."""
    conn.prepare_threshold = 3
    conn.prepared_max = 4
    assert (conn._prepared.prepare_threshold, conn._prepared.prepared_max) == (3, 4)


def test_public_settings_are_the_ones_we_watch() -> None:
    """A new writable property of a connection is a new setting."""
    writable = {
        name
        for name, value in inspect.getmembers(psycopg.Connection)
        if isinstance(value, property) and value.fset is not None
    }
    assert writable == {
        *("autocommit", "isolation_level", "read_only", "deferrable"),
        *("prepare_threshold", "prepared_max"),
    }


def test_setters_store_under_the_names_that_we_watch(conn: Conn) -> None:
    """Private: autocommit ... are kept as `_autocommit` ..., written by plain attribute stores."""
    stored: list[str] = []

    class Recording(type(conn)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            stored.append(name)
            super().__setattr__(name, value)

    conn.__class__ = Recording
    conn.autocommit = True
    conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
    conn.read_only = True
    conn.deferrable = True
    assert {"_autocommit", "_isolation_level", "_read_only", "_deferrable"} <= set(stored)


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_statement_stores_none_of_the_watched_attributes(conn: Conn, autocommit: bool) -> None:
    """Private: else each lease would take the slow way at its end."""
    stored: list[str] = []

    class Recording(type(conn)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            stored.append(name)
            super().__setattr__(name, value)

    conn.autocommit = autocommit
    conn.__class__ = Recording
    conn.execute("select %s", (1,)).fetchall()
    conn.commit()
    conn.execute("select 1")
    conn.rollback()
    assert not guard._WATCHED.intersection(stored)


def test_blocks_show_while_one_is_inside(conn: Conn) -> None:
    """Private: transaction(), pipeline() and notifies() store what `guard` takes for "inside"."""
    assert (conn._num_transactions, conn._pipeline) == (0, None)
    assert conn._notifies_backlog is not None
    with conn.transaction():
        assert conn._num_transactions == 1
    with conn.pipeline():
        assert conn._pipeline is not None
    conn.autocommit = True
    conn.execute("listen c")
    conn.execute("notify c")
    inside = conn.notifies(timeout=10)
    next(inside)
    assert conn._notifies_backlog is None
    assert conn.lock.locked()
    inside.close()
    assert conn._notifies_backlog is not None


def test_the_lock_of_a_connection_can_be_asked(conn: Conn) -> None:
    """`conn.lock` is undocumented, and a lock of threading."""
    assert isinstance(conn.lock, type(threading.Lock()))


def test_handlers_are_lists_that_are_read_in_place(conn: Conn) -> None:
    """Private: `_notice_handlers` and `_notify_handlers` are lists."""
    assert conn._notice_handlers == [] == conn._notify_handlers


def test_begin_is_made_anew_when_its_cache_is_empty(conn: Conn) -> None:
    """Private: `_begin_statement` is a cache, b"" means empty."""
    conn.execute("select 1")
    assert conn._begin_statement == b"BEGIN"
    conn._begin_statement = b""
    assert conn._get_tx_start_command() == b"BEGIN"


def test_with_leaves_a_connection_of_a_pool_open(server: Server) -> None:
    """Private: `_pool`; psycopg looks only at its truth, and at `close_returns` in close()."""
    conn = psycopg.connect(server.conninfo(over="unix"))
    vars(conn)["_pool"] = guard.IN_POOL
    with conn:
        pass
    assert not conn.closed
    conn.close()
    assert conn.closed


def test_everything_goes_through_the_attribute_pgconn(conn: Conn) -> None:
    """`conn.pgconn` is public; that every call reads it anew is not promised.

    Cursors and transactions keep the handle, but wait through the connection.
    """
    handle = conn.pgconn
    cursor = conn.cursor()
    transaction = conn.transaction()
    try:
        conn.pgconn = guard.DEAD
        for use in (
            lambda: cursor.execute("select 1"),
            conn.commit,
            conn.rollback,
            transaction.__enter__,
        ):
            with pytest.raises(psycopg.InterfaceError, match="given back"):
                use()
        assert conn.closed
    finally:
        conn.pgconn = handle


def test_execute_and_cursor_ask_check_connection_ok(conn: Conn) -> None:
    """Private: `_check_connection_ok` is where psycopg would say "the connection is closed"."""
    asked: list[int] = []

    class Asking(type(conn)):  # type: ignore[misc]
        def _check_connection_ok(self) -> None:
            asked.append(1)
            super()._check_connection_ok()

    conn.__class__ = Asking
    conn.cursor()
    assert asked


def test_a_connection_can_be_built_of_a_handle(server: Server) -> None:
    """`Connection(pgconn)` is documented; that it needs nothing else to work is not."""
    handle = pq.PGconn.connect(server.conninfo(over="unix").encode())
    handle.nonblocking = 1
    with psycopg.Connection(handle) as conn:
        assert conn.execute("select 1").fetchone() == (1,)


def test_adapters_are_made_at_first_use_and_copied_by_each_cursor(conn: Conn) -> None:
    """Private: `_adapters` is None until then; a cursor registers into a copy of its own."""
    assert conn._adapters is None
    cursor = conn.cursor()
    assert isinstance(conn._adapters, AdaptersMap)
    assert cursor.adapters is not conn.adapters


def test_adapters_change_only_through_what_we_override() -> None:
    """A new public method of these two may be a new way to change them."""

    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(AdaptersMap) == {
        *("adapters", "connection"),
        *("register_dumper", "register_loader"),
        *("get_dumper", "get_dumper_by_oid", "get_loader"),
    }
    assert public(TypesRegistry) == {"add", "clear", "get", "get_oid", "get_by_subtype"}


def test_a_copied_map_of_adapters_does_not_change_with_its_template() -> None:
    """`AdaptersMap(template)` is documented as a copy; it is one, both ways."""
    template = AdaptersMap(psycopg.adapters)
    copy = AdaptersMap(template)
    before = copy.get_loader(25, pq.Format.TEXT)
    template.register_loader("text", psycopg.types.string.ByteaLoader)
    assert copy.get_loader(25, pq.Format.TEXT) is before


def test_rollback_forgets_prepared_statements_in_these_two_places(conn: Conn) -> None:
    """Private: `_prepared.clear()` empties the cache and leaves a None in `_to_flush`."""
    conn.execute("select 1", prepare=True)
    assert conn._prepared.clear() is True
    assert list(conn._prepared._to_flush) == [None]
    conn._prepared._to_flush.clear()
    assert conn._prepared.clear() is False
    conn.execute("deallocate all")


def test_execute_reads_the_autocommit_flag_and_nothing_else(conn: Conn) -> None:
    """Private: with `_autocommit` set behind psycopg's back no BEGIN is sent."""
    vars(conn)["_autocommit"] = True
    conn.execute("select 1")
    assert conn.pgconn.transaction_status == pq.TransactionStatus.IDLE


def test_a_notice_callback_asks_the_handle_for_this_one_name(conn: Conn) -> None:
    """Private: `pgconn._encoding` (3.3); the dead handle has it."""
    assert isinstance(conn.pgconn._encoding, str)
    assert isinstance(guard.DEAD._encoding, str)


def test_idle_and_off_are_zero() -> None:
    """libpq's numbers, public and stable: park() tests for truth instead of comparing."""
    assert not pq.TransactionStatus.IDLE
    assert not pq.PipelineStatus.OFF


def test_a_finished_handle_still_answers_what_park_and_discard_ask(server: Server) -> None:
    """transaction_status is UNKNOWN, pipeline_status OFF; `socket` raises OperationalError."""
    handle = pq.PGconn.connect(server.conninfo(over="unix").encode())
    handle.finish()
    assert handle.transaction_status == pq.TransactionStatus.UNKNOWN
    assert handle.pipeline_status == pq.PipelineStatus.OFF
    assert handle.status == pq.ConnStatus.BAD
    with pytest.raises(psycopg.OperationalError):
        handle.socket  # noqa: B018


def test_a_dropped_handle_closes_its_socket(server: Server) -> None:
    """PGconn finishes itself when freed, and is freed at once: no cycle."""
    handle = pq.PGconn.connect(server.conninfo(over="unix").encode())
    gone = weakref.ref(handle)
    gc.disable()
    try:
        del handle
        assert gone() is None
    finally:
        gc.enable()


def test_no_code_comes_with_a_failed_connect(server: Server) -> None:
    """If this fails, psycopg tells the SQLSTATE itself: drop the diagnosing attempt."""
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(server.conninfo(dbname="nowhere"))
    assert caught.value.sqlstate is None


def test_a_column_of_a_description_does_not_hold_its_connection(server: Server) -> None:
    """A `Reply` is detached."""
    conn = psycopg.connect(server.conninfo(over="unix"))
    description = conn.execute("select 1").description
    gone = weakref.ref(conn)
    conn.close()
    del conn
    gc.collect()
    assert gone() is None
    assert description is not None and description[0].name == "?column?"


def test_what_a_connection_hands_its_handle_are_two_callbacks_that_find_it_weakly(
    conn: Any,
) -> None:
    """Private: `_notice_handler` and `_notify_handler`, which a renewed connection hands over again."""
    handle = conn.pgconn
    for callback, name in ((handle.notice_handler, "_notice_handler"),
                           (handle.notify_handler, "_notify_handler")):  # fmt: skip
        assert callback.func is getattr(psycopg.BaseConnection, name)
        (to,) = callback.args
        assert isinstance(to, weakref.ref)
        assert to() is conn


def test_a_statement_leaves_nobody_holding_the_connection_but_its_cursor(conn: Any) -> None:
    """Else every borrow with `guard` would make a new object."""
    before = getrefcount(conn)
    conn.execute("select 1").fetchall()
    assert getrefcount(conn) == before
