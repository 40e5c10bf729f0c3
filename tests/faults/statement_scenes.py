"""What `statement_timeout_client` promises, told once for all runtimes and drivers.

`python -m tests.faults.statement_scenes COMBINATION CONNINFO` plays all of it in a process of its own (gevent patches
there) and prints what failed, as JSON.
"""

import sys

if __name__ == "__main__" and sys.argv[1].startswith("gevent"):
    from gevent import monkey

    monkey.patch_all()


import asyncio
import json
import logging
import signal
import threading
import time
import traceback
from contextlib import suppress
from types import SimpleNamespace

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from tests.contract.runtimes import settled
from tests.faults.stage import PATIENCE, Stage, now

from penstock import StatementTimeout

#: Seconds: the option's value here.
LIMIT = 0.3


async def given_up(w, work):
    """The StatementTimeout that this ends with; long before the server would have answered."""
    began = now()
    try:
        await work
    except StatementTimeout as error:
        assert now() - began < PATIENCE / 2
        return error
    raise AssertionError("it was answered")


def limited(w, conninfo=None, **options):
    options = {"max_size": 4, "name": "hasty", "statement_timeout_client": LIMIT} | options
    return w.pool(conninfo or w.server().conninfo(), **options)


async def within(pool, body, **options):
    async with pool.connection(**options) as conn:
        return await body(conn)


async def a_statement_without_an_answer_raises_what_names_option_time_and_pool(w):
    pool = limited(w)
    error = await given_up(w, settled(pool.execute("select pg_sleep(60)")))
    assert isinstance(error, pool._driver.operational_error)
    text = str(error)
    assert "no answer within 0.3 s (statement_timeout_client)" in text, text
    assert "pool 'hasty'" in text, text
    assert (error.pool, error.seconds) == ("hasty", LIMIT)


async def its_session_ends_the_pool_has_another_and_nothing_is_repeated(w):
    table = f"given_up_{w.name.replace('-', '_')}"
    server = w.server()
    server.execute(f"create table {table} (id int)")
    try:
        pool = limited(w)
        pids = []

        async def body(conn):
            pids.append((await w.ask(conn, "select pg_backend_pid()"))[0][0])
            await w.ask(
                conn, f"with one as (select pg_sleep(60)) insert into {table} select 1 from one"
            )

        await given_up(w, within(pool, body))
        gone = f"select count(*) from pg_stat_activity where pid = {pids[0]}"
        await w.until(lambda: server.execute(gone) == [(0,)], "its session ends")
        assert (await w.borrow(pool, "select 1")).answer == [(1,)]
        await w.until(lambda: pool.stats().size <= 1, "the lost one is counted no more")
        found = (await w.borrow(pool, f"select count(*) from {table}")).answer
        assert found == [(0,)], found
    finally:
        server.execute(f"drop table {table}")


async def what_was_idle_is_pinged_before_it_is_lent(w):
    proxy = w.proxy(w.server().port)
    # A ping has half of the borrower's time, and what comes after it the other half.
    pool = limited(w, w.server().conninfo(port=proxy.port), max_size=2, timeout=2.0)
    await all_at_once(w, pool, 2)
    proxy.hold(new=False)
    await given_up(w, settled(pool.execute("select 1")))
    tries = await w.crowd(8, lambda _number: w.borrow(pool, "select 1")).all()
    proxy.release()
    assert [each.error for each in tries] == [None] * 8


async def an_error_that_the_borrower_swallows_does_not_let_his_block_end_well(w):
    pool = limited(w)
    options = {"transaction": True} if w.driver == "asyncpg" else {}

    async def body(conn):
        with suppress(StatementTimeout):
            await w.ask(conn, "select pg_sleep(60)")

    try:
        await within(pool, body, **options)
    except (pool._driver.operational_error, pool._driver.interface_error):
        pass
    else:
        raise AssertionError("it was not committed, and nothing said so")
    assert (await w.borrow(pool, "select 1")).good


async def the_borrowers_own_time_does_not_count(w):
    pool = limited(w)

    async def body(conn):
        for _ in range(2):
            await w.ask(conn, "select 1")
            await w.pause(LIMIT * 1.5)
        return await w.ask(conn, "select pg_backend_pid()")

    before = await within(pool, body)
    assert (await w.borrow(pool, "select pg_backend_pid()")).answer == before


async def a_commit_without_an_answer_raises(w):
    pool = limited(w)

    async def body(conn):
        for statement in DEFERRED.split(";;"):
            await settled(
                conn.execute(statement) if w.driver == "asyncpg" else w.ask(conn, statement)
            )

    options = {"transaction": True} if w.driver == "asyncpg" else {}
    await given_up(w, within(pool, body, **options))


DEFERRED = """
create temp table late (id int);;
create function pg_temp.late() returns trigger language plpgsql as
    'begin perform pg_sleep(60); return null; end';;
create constraint trigger late after insert on late deferrable initially deferred
    for each row execute function pg_temp.late();;
insert into late values (1)
"""


async def a_rollback_at_the_return_keeps_nobody_for_longer(w):
    proxy = w.proxy(w.server().port)
    pool = limited(w, w.server().conninfo(port=proxy.port))
    options = {"transaction": True} if w.driver == "asyncpg" else {}

    async def body(conn):
        await w.ask(conn, "select 1")
        proxy.hold(new=False)
        raise LookupError

    began = now()
    with suppress(LookupError):
        await within(pool, body, **options)
    took = now() - began
    proxy.release()
    assert took < 4.0, took  # without the option it is TIDY_SECONDS: 5.0


async def executemany_and_each_fetch_of_a_servers_cursor_are_bounded(w):
    pool = limited(w)

    async def many(conn):
        if w.driver == "asyncpg":
            await conn.executemany("select pg_sleep($1)", [(30,), (30,)])
        else:
            await settled(conn.cursor().executemany("select pg_sleep(%s)", [(30,), (30,)]))

    async def fetch(conn):
        query = "select pg_sleep(case when n > 2 then 60 else 0 end) from generate_series(1, 4) n"
        if w.driver == "asyncpg":
            cursor = await conn.cursor(query)
            await cursor.fetch(1)
            await cursor.fetch(3)
            return
        cursor = conn.cursor("bounded")
        await settled(cursor.execute(query))
        await settled(cursor.fetchmany(1))
        seen.append("the first")
        await settled(cursor.fetchmany(3))

    seen: list[str] = []
    await given_up(w, within(pool, many))
    options = {"transaction": True} if w.driver == "asyncpg" else {}
    await given_up(w, within(pool, fetch, **options))
    assert w.driver == "asyncpg" or seen


async def a_copys_clock_stands_still_in_the_programs_code_and_else_does_not(w):
    if w.name == "gevent-psycopg2":
        return  # psycopg2 refuses COPY there
    pool = limited(w)
    out = "copy (select pg_sleep(60)) to stdout"

    async def slowly(conn):
        await w.ask(conn, "create temp table copied (id int)") if w.driver != "asyncpg" else None
        await COPIES[w.driver](w, conn)

    async def hangs(conn):
        if w.driver == "asyncpg":
            await conn.copy_from_query(
                "select pg_sleep(60)", output=lambda _block: asyncio.sleep(0)
            )
        elif w.driver == "psycopg2":
            conn.cursor().copy_expert(out, SimpleNamespace(write=len))
        else:
            await read_all(conn.cursor().copy(out))

    await within(pool, slowly)
    await given_up(w, within(pool, hangs))


async def read_all(copying):
    if hasattr(copying, "__aenter__"):
        async with copying as copy:
            await copy.read()
    else:
        with copying as copy:
            copy.read()


async def copy_by_psycopg(w, conn):
    copying = conn.cursor().copy("copy copied from stdin")
    if w.runtime.asynchronous:
        async with copying as copy:
            for _ in range(2):
                await w.pause(LIMIT * 1.2)
                await copy.write("1\n")
    else:
        with copying as copy:
            for _ in range(2):
                await w.pause(LIMIT * 1.2)
                copy.write("1\n")


async def copy_by_psycopg2(_w, conn):
    lines = ["1\n", "1\n", ""]
    tired = threading.Event()

    def read(_size=-1):
        tired.wait(LIMIT * 1.2)
        return lines.pop(0)

    conn.cursor().copy_from(SimpleNamespace(read=read, readline=read), "copied")


async def copy_by_asyncpg(w, conn):
    async def source():
        for _ in range(2):
            await w.pause(LIMIT * 1.2)
            yield b"1\n"

    await conn.execute("create temp table copied (id int)")
    assert await conn.copy_to_table("copied", source=source()) == "COPY 2"


COPIES = {"psycopg": copy_by_psycopg, "psycopg2": copy_by_psycopg2, "asyncpg": copy_by_asyncpg}


async def a_dedicated_connection_a_pool_without_and_waiting_for_notifications_have_no_limit(w):
    pool = limited(w, autocommit=True)
    async with pool.dedicated() as conn:
        await w.ask(conn, f"select pg_sleep({LIMIT * 1.5})")
    assert (await w.borrow(w.pool(w.server().conninfo()), f"select pg_sleep({LIMIT * 1.5})")).good
    if w.driver != "psycopg":
        return

    async def listens(conn):
        heard = conn.notifies(timeout=LIMIT * 1.5)
        found = [one async for one in heard] if w.runtime.asynchronous else list(heard)
        assert not found
        return await w.ask(conn, "select 1")

    assert await within(pool, listens) == [(1,)]


async def what_cuts_a_borrower_off_at_the_same_time_loses_nothing(w):
    """A cancellation, a gevent.Timeout, a KeyboardInterrupt."""
    pool = limited(w, max_size=3, statement_timeout_client=LIMIT / 2)
    cut_off = {"asyncio": by_cancelling, "gevent": by_timeout, "threads": by_interrupt}
    ends = set()
    for number in range(8):
        sleeping = w.borrow(pool, "select pg_sleep(60)")
        this = await cut_off[w.runtime.name](sleeping, LIMIT / 2 - 0.006 + number * 0.002)
        ends.add("cut off" if this is None else type(this.error).__name__)
    assert ends <= {"cut off", "StatementTimeout"}, ends
    await w.until(lambda: pool.stats().in_use == 0, "nobody holds one")
    await all_at_once(w, pool, 3)


async def by_cancelling(sleeping, seconds):
    task = asyncio.create_task(sleeping)
    await asyncio.sleep(seconds)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


async def by_timeout(sleeping, seconds):
    import gevent

    struck = gevent.Timeout(seconds)
    try:
        with struck:
            return await sleeping
    except gevent.Timeout as error:
        if error is not struck:
            raise
        return None


async def by_interrupt(sleeping, seconds):
    """psycopg2 hears it when the statement is given up: until then it is in C."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        this = await sleeping
        while signal.getitimer(signal.ITIMER_REAL)[0]:
            time.sleep(0.001)  # noqa: ASYNC251  no loop runs here
    except KeyboardInterrupt:
        return None
    return this


def interrupt(_number, _frame):
    raise KeyboardInterrupt


async def all_at_once(w, pool, number):
    """Every connection answers while all are lent; then all are idle."""

    async def together(_number):
        async with pool.connection() as conn:
            inside.append(1)
            await w.until(lambda: len(inside) >= number, "all are lent")
            assert await w.ask(conn, "select 1") == [(1,)]

    inside: list[int] = []
    await w.crowd(number, together).all()
    await w.until(lambda: pool.stats().idle == number, "all are back")


SCENES = (
    a_statement_without_an_answer_raises_what_names_option_time_and_pool,
    its_session_ends_the_pool_has_another_and_nothing_is_repeated,
    what_was_idle_is_pinged_before_it_is_lent,
    an_error_that_the_borrower_swallows_does_not_let_his_block_end_well,
    the_borrowers_own_time_does_not_count,
    a_commit_without_an_answer_raises,
    a_rollback_at_the_return_keeps_nobody_for_longer,
    executemany_and_each_fetch_of_a_servers_cursor_are_bounded,
    a_copys_clock_stands_still_in_the_programs_code_and_else_does_not,
    a_dedicated_connection_a_pool_without_and_waiting_for_notifications_have_no_limit,
    what_cuts_a_borrower_off_at_the_same_time_loses_nothing,
)


class Reached:
    """A server that another process has started."""

    def __init__(self, conninfo):
        self._conninfo = conninfo
        self.port = int(str(conninfo_to_dict(conninfo)["port"]))

    def conninfo(self, port=None):
        return make_conninfo(self._conninfo, port=port or self.port)

    def execute(self, statement):
        with psycopg.connect(self._conninfo, autocommit=True) as conn:
            cursor = conn.execute(statement)
            return cursor.fetchall() if cursor.description else []


def failure_of(scene, stage):
    try:
        stage.play(scene)
    except BaseException:
        return traceback.format_exc()
    return ""


def main():
    signal.signal(signal.SIGALRM, interrupt)
    logging.getLogger("penstock").addHandler(logging.NullHandler())
    name, conninfo = sys.argv[1:]
    told = {}
    for scene in SCENES:
        began = now()
        for _ in range(3):
            told[scene.__name__] = failure_of(scene, Stage(name, shared=lambda: Reached(conninfo)))
            if "StatementTimeout: no answer within" not in told[scene.__name__]:
                break  # else an innocent statement was too slow: a busy machine is no bug
        print(f"{now() - began:.2f} s {scene.__name__}", file=sys.stderr)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
