"""The kinds of state that a borrower can leave on a connection, as each driver spells them.

Its one job: for `session_state.py`, say how to leave each kind, and how the next borrower sees whether it
is still there. It must not know: pools, resets, figures.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.contract.runtimes import settled

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Kind:
    """One kind; `where` is "server", "client", "transaction" or "exchange"."""

    name: str
    where: str
    leave: Callable[..., Any]
    found: Callable[..., Any]
    kept: list[Any] = field(default_factory=list)  # what a careless borrower still holds

    async def end(self):
        """What was left running has met its end."""
        for each in self.kept:
            if isinstance(each, threading.Thread):
                each.join(30)
            elif isinstance(each, asyncio.Task):
                each.cancel()
                await asyncio.wait({each}, timeout=30)
        self.kept.clear()


async def nothing(_w, _conn):
    """The next borrower's right answers are all that can be asked for."""
    return False


# -- on the server: the same SQL for all ----------------------------------------------------------


def by_sql(name, leave, found):
    """Left by some SQL; still there if a query has rows."""

    async def do(w, conn):
        for statement in leave.split(";"):
            await w.ask(conn, statement)

    async def look(w, conn):
        return bool(await w.ask(conn, found))

    return Kind(name, "server", do, look)


async def leave_currval(w, conn):
    await w.ask(conn, "select nextval('left_sequence')")


async def has_currval(w, conn):
    # It raises where there is none: in a block, so that no transaction is left failed.
    query = (
        "do $$ begin perform lastval(); set was.found to 'yes';"
        " exception when others then set was.found to 'no'; end $$"
    )
    await w.ask(conn, query)
    return await w.ask(conn, "select current_setting('was.found')") == [("yes",)]


def on_the_server():
    return [
        by_sql(
            "settings",
            "set search_path to nowhere; set was.tenant to 'me'",
            "select 1 where current_setting('search_path') = 'nowhere'"
            " or current_setting('was.tenant', true) = 'me'",
        ),
        by_sql(
            "role and session authorization",
            "set session authorization pg_monitor; set role pg_read_all_stats",
            "select 1 where session_user = 'pg_monitor' or current_user = 'pg_read_all_stats'",
        ),
        by_sql(
            "temporary table",
            "create temp table left_here (n int)",
            "select 1 where to_regclass('pg_temp.left_here') is not null",
        ),
        by_sql(
            "prepared statement",
            "prepare left_plan as select 1",
            "select 1 from pg_prepared_statements where name = 'left_plan'",
        ),
        by_sql("LISTEN", "listen left_channel", "select 1 from pg_listening_channels()"),
        by_sql(
            "advisory lock",
            "select pg_advisory_lock(4713)",
            "select 1 from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        ),
        by_sql(
            "cursor with hold",
            "begin; declare left_cursor cursor with hold for select 1; commit",
            "select 1 from pg_cursors where name = 'left_cursor'",
        ),
        Kind("currval", "server", leave_currval, has_currval),
    ]


# -- transactions ---------------------------------------------------------------------------------


async def begin(w, conn):
    if w.driver == "asyncpg":
        await conn.transaction().start()
    await w.ask(conn, "create temp table left_open (n int)")


async def is_open(w, conn):
    return bool(await w.ask(conn, "select 1 where to_regclass('pg_temp.left_open') is not null"))


async def fail(w, conn):
    await begin(w, conn)
    with suppress(Exception):
        await w.ask(conn, "select 1 / 0")


async def begin_by_sql(w, conn):
    await w.ask(conn, "begin")
    await w.ask(conn, "create temp table left_open (n int)")


def transactions():
    return [
        Kind("open transaction", "transaction", begin, is_open),
        Kind("failed transaction", "transaction", fail, is_open),
    ]


# -- psycopg 3 ------------------------------------------------------------------------------------


def of_psycopg(w):  # noqa: C901  many small ones
    from psycopg import AsyncClientCursor, ClientCursor
    from psycopg.rows import dict_row
    from psycopg.types.string import TextLoader

    heard: list[str] = []
    factory = AsyncClientCursor if w.runtime.asynchronous else ClientCursor

    async def autocommit(_w, conn):
        await settled(conn.set_autocommit(True))

    async def is_autocommit(_w, conn):
        return conn.autocommit

    async def characteristics(_w, conn):
        from psycopg import IsolationLevel

        await settled(conn.set_isolation_level(IsolationLevel.SERIALIZABLE))
        await settled(conn.set_read_only(True))
        await settled(conn.set_deferrable(True))

    async def are_characteristics(w, conn):
        said = await w.ask(conn, "show transaction_read_only")
        own = (conn.isolation_level, conn.read_only, conn.deferrable)
        return own != (None, None, None) or said != [("off",)]

    async def factories(_w, conn):
        conn.row_factory, conn.cursor_factory = dict_row, factory

    async def are_factories(_w, conn):
        return conn.row_factory is dict_row or conn.cursor_factory is factory

    async def adapters(_w, conn):
        conn.adapters.register_loader("int4", TextLoader)

    async def are_adapters(w, conn):
        return await w.ask(conn, "select 1") != [(1,)]

    async def handlers(_w, conn):
        heard.clear()
        conn.add_notice_handler(lambda _notice: heard.append("notice"))
        conn.add_notify_handler(lambda _notify: heard.append("notify"))

    async def are_handlers(w, conn):
        await w.ask(conn, "do $$ begin raise notice 'heard?'; end $$")
        return bool(heard)

    async def threshold(_w, conn):
        conn.prepare_threshold, conn.prepared_max = 0, 7

    async def is_threshold(_w, conn):
        return (conn.prepare_threshold, conn.prepared_max) != (5, 100)

    async def copy(w, conn, query="copy (select generate_series(1, 100000)) to stdout"):
        block = conn.cursor().copy(query)
        inside = await block.__aenter__() if w.runtime.asynchronous else block.__enter__()
        if "from" in query:
            await settled(inside.write(b"1\n"))
        else:
            await settled(inside.read())
        kept.append((block, inside))

    async def copy_in(w, conn):
        await w.ask(conn, "create temp table left_copy (n int) on commit drop")
        await copy(w, conn, "copy left_copy from stdin")

    async def pipeline(w, conn):
        block = conn.pipeline()
        await block.__aenter__() if w.runtime.asynchronous else block.__enter__()
        await settled(conn.execute("select 1"))
        kept.append(block)

    async def stream(w, conn):
        rows = conn.cursor().stream("select generate_series(1, 100000)")
        await anext(rows) if w.runtime.asynchronous else next(rows)
        kept.append(rows)

    async def raw_query(_w, conn):
        conn.pgconn.send_query(b"select pg_sleep(20)")
        conn.pgconn.flush()

    kept: list[Any] = []
    client = [
        Kind("autocommit", "client", autocommit, is_autocommit),
        Kind(
            "isolation level, read only, deferrable", "client", characteristics, are_characteristics
        ),
        Kind("row and cursor factories", "client", factories, are_factories),
        Kind("adapters", "client", adapters, are_adapters),
        Kind("notice and notify handlers", "client", handlers, are_handlers),
        Kind("prepare_threshold, prepared_max", "client", threshold, is_threshold),
    ]
    return [
        *client,
        Kind("COPY to the client", "exchange", copy, nothing, kept),
        Kind("COPY from the client", "exchange", copy_in, nothing, kept),
        Kind("pipeline", "exchange", pipeline, nothing, kept),
        Kind("stream", "exchange", stream, nothing, kept),
        Kind("asynchronous query", "exchange", raw_query, nothing),
    ]


_numbers = itertools.count()


def under_way(w, server):
    """A statement that another thread, greenlet or task is in when the connection is given back."""
    kept: list[Any] = []

    async def leave(w, conn):
        query = f"select pg_sleep(20), {next(_numbers)}"

        async def run():
            with suppress(Exception):
                await w.ask(conn, query)

        flight = w.runtime.spawn(run())
        kept.append(flight.task if w.runtime.asynchronous else flight.thread)
        asked = f"select 1 from pg_stat_activity where query = '{query}'"
        await w.until(lambda: server.execute(asked), "it is under way")

    return Kind("statement under way", "exchange", leave, nothing, kept)


# -- psycopg2 -------------------------------------------------------------------------------------


def of_psycopg2(_w):  # noqa: C901  as above
    from psycopg2.extensions import new_type, register_type
    from psycopg2.extras import RealDictCursor

    async def autocommit(_w, conn):
        conn.autocommit = True

    async def is_autocommit(_w, conn):
        return conn.autocommit

    async def characteristics(_w, conn):
        conn.set_session(isolation_level="SERIALIZABLE", readonly=True, deferrable=True)

    async def are_characteristics(w, conn):
        own = (conn.isolation_level, conn.readonly, conn.deferrable)
        return own != (None,) * 3 or await w.ask(conn, "show transaction_read_only") != [("off",)]

    async def factory(_w, conn):
        conn.cursor_factory = RealDictCursor

    async def is_factory(_w, conn):
        return conn.cursor_factory is RealDictCursor

    async def types(_w, conn):
        register_type(new_type((23,), "LEFT", lambda *_value: "left"), conn)

    async def are_types(w, conn):
        return await w.ask(conn, "select 1") != [(1,)]

    async def messages(w, conn):
        await w.ask(conn, "do $$ begin raise notice 'heard?'; end $$")
        assert conn.notices

    async def are_messages(_w, conn):
        return bool(conn.notices or conn.notifies)

    async def encoding(_w, conn):
        conn.set_client_encoding("LATIN1")

    async def is_encoding(w, conn):
        return conn.encoding != "UTF8" or await w.ask(conn, "show client_encoding") != [("UTF8",)]

    async def block(w, conn):
        conn.__enter__()
        await w.ask(conn, "select 1")

    async def two_phase(w, conn):
        conn.tpc_begin(conn.xid(1, "left", "behind"))
        await w.ask(conn, "select 1")

    client = [
        Kind("autocommit", "client", autocommit, is_autocommit),
        Kind(
            "isolation level, read only, deferrable", "client", characteristics, are_characteristics
        ),
        Kind("cursor factory", "client", factory, is_factory),
        Kind("adapters", "client", types, are_types),
        Kind("notices and notifies", "client", messages, are_messages),
        Kind("encoding", "client", encoding, is_encoding),
    ]
    return [
        *client,
        Kind("with conn: not left", "transaction", block, nothing),
        Kind("two-phase transaction", "transaction", two_phase, nothing),
    ]


# -- asyncpg --------------------------------------------------------------------------------------


def of_asyncpg(w):  # noqa: C901  as above
    heard: list[str] = []
    kept: list[Any] = []

    async def codecs(_w, conn):
        await conn.set_type_codec(
            "int4", schema="pg_catalog", encoder=str, decoder=lambda _text: "left"
        )

    async def are_codecs(w, conn):
        return await w.ask(conn, "select 1") != [(1,)]

    async def handlers(_w, conn):
        heard.clear()
        await conn.add_listener("left_channel", lambda *_told: heard.append("notify"))
        conn.add_log_listener(lambda *_told: heard.append("log"))

    async def are_handlers(w, conn):
        await w.ask(
            conn, "do $$ begin raise notice 'heard?'; perform pg_notify('left_channel', ''); end $$"
        )
        await w.ask(conn, "select 1")
        return bool(heard)

    async def loggers(_w, conn):
        heard.clear()
        conn.add_query_logger(lambda _record: heard.append("query"))

    async def are_loggers(w, conn):
        await w.ask(conn, "select 1")
        await w.pause(0)
        return bool(heard)

    async def beside(call, stuck):
        task = asyncio.create_task(call)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        kept.append(task)
        assert await w.runtime.wait_for(stuck)

    async def copy(_w, conn):
        stuck = asyncio.Event()

        async def sink(_data):
            stuck.set()
            await asyncio.sleep(20)

        query = "select generate_series(1, 100000)"
        await beside(conn.copy_from_query(query, output=sink), stuck)

    async def copy_in(w, conn):
        await w.ask(conn, "create temp table left_copy (n int)")
        stuck = asyncio.Event()

        async def source():
            yield b"1\n"
            stuck.set()
            await asyncio.sleep(20)

        await beside(conn.copy_to_table("left_copy", source=source()), stuck)

    async def cursor(_w, conn):
        await conn.transaction().start()
        rows = await conn.cursor("select generate_series(1, 100000)")
        await rows.fetch(1)
        kept.append(rows)

    return [
        Kind("adapters", "client", codecs, are_codecs),
        Kind("notice and notify handlers", "client", handlers, are_handlers),
        Kind("query loggers", "client", loggers, are_loggers),
        Kind("BEGIN by SQL", "transaction", begin_by_sql, is_open),
        Kind("COPY to the client", "exchange", copy, nothing, kept),
        Kind("COPY from the client", "exchange", copy_in, nothing, kept),
        Kind("stream", "exchange", cursor, nothing, kept),
    ]


OF = {"psycopg": of_psycopg, "psycopg2": of_psycopg2, "asyncpg": of_asyncpg}


def kinds_of(w, server):
    """All kinds that this combination can have."""
    return [*on_the_server(), *transactions(), *OF[w.driver](w), under_way(w, server)]


def not_had(w):
    """The kinds that this driver cannot have, and why."""
    if w.driver == "psycopg2":
        return {"COPY, stream, pipeline": "psycopg2's end before they return, or are transactions"}
    if w.driver == "asyncpg":
        return {"autocommit, isolation level, factories, pipeline": "asyncpg has none to set"}
    return {}


# -- what configure= makes in the client ----------------------------------------------------------


def told(*_told):
    """A logger that hears nothing."""


async def configure(w, conn):
    if w.driver == "psycopg":
        conn.prepare_threshold = 9
    elif w.driver == "psycopg2":
        conn.set_session(deferrable=True)
    else:
        conn.add_log_listener(told)


async def unconfigure(w, conn):
    if w.driver == "psycopg":
        conn.prepare_threshold = None
    elif w.driver == "psycopg2":
        conn.set_session(deferrable="DEFAULT")
    else:
        conn.remove_log_listener(told)


async def is_configured(w, conn):
    if w.driver == "psycopg":
        return conn.prepare_threshold == 9
    if w.driver == "psycopg2":
        return bool(conn.deferrable)
    return told in {each.cb for each in conn._log_listeners}
