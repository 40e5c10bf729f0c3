"""What comes of each misuse of a connection, over each driver, with `guard` and without.

One job: do each of them once on a real server, and say in a few words what happened. docs/misuse.md has
what is seen here as a table, and tests/drivers/test_misuse.py holds that it is the same. To print the
table: ``python -m tests.drivers.misuse_seen``.

It must not know: how a guard works.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

from tests.contract.runtimes import settled
from tests.drivers.misuse_columns import COLUMNS, NONE, Column
from tests.forks import PATIENCE, Child, until

from penstock import MisuseError, PenstockError
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

UNNOTICED = "**not noticed**"


@contextlib.asynccontextmanager
async def within(manager: Any) -> AsyncIterator[Any]:
    if hasattr(manager, "__aenter__"):
        async with manager as entered:
            yield entered
    else:
        with manager as entered:
            yield entered


async def comes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        await asyncio.sleep(0)  # what was begun takes its first step
        while not condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.001)


class Stage:
    """A pool of one connection, in one mode, for one misuse."""

    def __init__(self, column: Column, conninfo: str, guard: bool) -> None:
        self.column = column
        self.conninfo = conninfo
        self.guard = guard
        self._pools: list[Any] = []

    def pool(self, **options: Any) -> Any:
        made = self.column.pool(
            self.conninfo,
            driver=self.column.driver,
            **{"max_size": 1, "timeout": 10.0, "guard": self.guard, **options},
        )
        self._pools.append(made)
        return made

    async def close(self) -> None:
        for pool in self._pools:
            await settled(pool.close(timeout=0))

    async def seen(self, use: Callable[[], Any]) -> str:
        """What comes of a use, in a few words."""
        try:
            said = await settled(use())
        except Exception as error:
            return _named(error)
        return said if said == NONE else UNNOTICED


def _named(error: BaseException) -> str:
    for known in PenstockError.__subclasses__():
        if isinstance(error, known):
            return known.__name__
    return type(error).__name__


# -- the misuses: each says what came of it ------------------------------------------------------

Misuse = Any  # a coroutine function that takes a Stage
MISUSES: dict[tuple[str, str], Misuse] = {}

IDLE, AGAIN = "while nobody has it", "lent to somebody else"


def misuse(what: str, when: str = "") -> Callable[[Misuse], Misuse]:
    def known(scene: Misuse) -> Misuse:
        MISUSES[what, when] = scene
        return scene

    return known


def kept(what: str, make: str) -> None:
    """What was made in a lease is used when the lease is over; and again in somebody else's."""

    async def while_idle(stage: Stage) -> str:
        pool = stage.pool()
        async with within(pool.connection()) as conn:
            use = await getattr(stage.column, make)(conn)
        return await stage.seen(use)

    async def when_lent_again(stage: Stage) -> str:
        pool = stage.pool()
        async with within(pool.connection()) as conn:
            use = await getattr(stage.column, make)(conn)
        with contextlib.suppress(Exception):  # what it did to the next one's transaction
            async with within(pool.connection()):
                return await stage.seen(use)
        return UNNOTICED

    MISUSES[what, IDLE] = while_idle
    MISUSES[what, AGAIN] = when_lent_again


def direct(what: str, use: str) -> None:
    """As `kept`, of the connection itself."""

    async def while_idle(stage: Stage) -> str:
        pool = stage.pool()
        async with within(pool.connection()) as conn:
            pass
        return await stage.seen(lambda: getattr(stage.column, use)(conn))

    async def when_lent_again(stage: Stage) -> str:
        pool = stage.pool()
        async with within(pool.connection()) as conn:
            pass
        async with within(pool.connection()):
            return await stage.seen(lambda: getattr(stage.column, use)(conn))

    MISUSES[what, IDLE] = while_idle
    MISUSES[what, AGAIN] = when_lent_again


direct("a statement on the returned connection", "ask")
direct("its `rollback()`", "roll_back")
direct("a setting of it (autocommit, a handler)", "configure")


@misuse("its `close()`", IDLE)
async def closed_while_idle(stage: Stage) -> str:
    pool = stage.pool()
    async with within(pool.connection()) as conn:
        pass
    await settled(conn.close())
    del conn
    async with within(pool.connection()) as new:
        await stage.column.ask(new)
    return "no effect" if pool.stats().opened == 1 else "ends its session"


@misuse("its `close()`", AGAIN)
async def closed_when_lent_again(stage: Stage) -> str:
    pool = stage.pool()
    async with within(pool.connection()) as conn:
        pass
    with contextlib.suppress(Exception):
        async with within(pool.connection()) as new:
            await settled(conn.close())
            try:
                await stage.column.ask(new)
            except Exception:
                return UNNOTICED
            return "no effect"
    return UNNOTICED


kept("a cursor of it (asyncpg: a prepared statement)", "cursor")
kept("a server-side cursor of it", "server_cursor")
kept("a transaction block of it, entered (psycopg2: `with conn:`)", "block")
kept("a method of it, kept (`end = conn.commit`)", "method")


def unfinished(what: str, make: str) -> None:
    """Something is under way when the connection is given back; then it goes on."""

    async def scene(stage: Stage) -> str:
        pool = stage.pool()
        with contextlib.suppress(Exception):
            async with within(pool.connection()) as conn:
                go_on = await getattr(stage.column, make)(conn)
        if go_on is None:
            return NONE
        seen = await stage.seen(go_on)
        del conn, go_on  # else what it leaves is what the next rows look at
        return seen

    MISUSES[what, "given back in the middle, then gone on with"] = scene


unfinished("a row stream", "unfinished_stream")
unfinished("a COPY", "unfinished_copy")
unfinished("a pipeline", "unfinished_pipeline")
unfinished("a transaction block, left", "unfinished_block")


@misuse("given back twice (`putconn`)", IDLE)
async def given_back_twice(stage: Stage) -> str:
    pool = stage.pool()
    conn = await settled(pool.getconn())
    await settled(pool.putconn(conn))
    return await stage.seen(lambda: pool.putconn(conn))


@misuse("given back twice (`putconn`)", AGAIN)
async def given_back_twice_when_lent_again(stage: Stage) -> str:
    pool = stage.pool()
    conn = await settled(pool.getconn())
    await settled(pool.putconn(conn))
    others = await settled(pool.getconn())
    seen = await stage.seen(lambda: pool.putconn(conn))
    with contextlib.suppress(MisuseError):
        await settled(pool.putconn(others))
    return seen


@misuse("given back to another pool")
async def given_to_another_pool(stage: Stage) -> str:
    pool, other = stage.pool(), stage.pool()
    conn = await settled(pool.getconn())
    seen = await stage.seen(lambda: other.putconn(conn))
    await settled(pool.putconn(conn))
    return seen


@misuse("`getconn()` without `putconn()`", "held longer than `overdue_after`")
async def never_given_back(stage: Stage) -> str:
    said = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: said.set()  # type: ignore[method-assign]
    log = logging.getLogger("penstock")
    log.addHandler(handler)
    try:
        await settled(stage.pool(overdue_after=0.01).getconn())
        await comes_true(said.is_set)
        return "a warning in the log"
    finally:
        log.removeHandler(handler)


@misuse("a second connection, where all are held by those who ask for one")
async def asks_for_a_second(stage: Stage) -> str:
    pool = stage.pool()
    async with within(pool.connection()) as conn:
        seen = await stage.seen(pool.getconn)
        del conn
    return seen


@misuse("one connection, used by two at the same time", "threads or tasks")
async def two_at_once(stage: Stage) -> str:
    column = stage.column
    pool = stage.pool()
    async with within(pool.connection()) as conn:
        if column.threads:
            other: Any = threading.Thread(
                target=lambda: asyncio.run(column.ask(conn, "select pg_sleep(0.05)"))
            )
            other.start()
            until(lambda: column.begun(conn) or not other.is_alive())
            seen = await stage.seen(lambda: column.ask(conn))
            other.join()
        else:
            task = asyncio.create_task(column.ask(conn, "select pg_sleep(0.05)"))
            await comes_true(lambda: column.begun(conn) or task.done())
            seen = await stage.seen(lambda: column.ask(conn))
            await task
    return "they take turns" if seen == UNNOTICED else seen


@misuse("a connection that was lent at a fork", "used in the child")
async def used_in_a_child(stage: Stage) -> str:
    async with within(stage.pool().connection()) as conn:

        def work() -> str:
            loop = asyncio.new_event_loop()
            return loop.run_until_complete(stage.seen(lambda: stage.column.ask(conn)))

        return str(Child(work).answer())


@misuse("a connection whose pool was closed meanwhile", "given back, then used")
async def used_after_close(stage: Stage) -> str:
    pool = stage.pool()
    async with within(pool.connection()) as conn:
        await settled(pool.close(timeout=0))
        await stage.column.ask(conn)  # it is still his
    return await stage.seen(lambda: stage.column.ask(conn))


@misuse("a pool that is closed", "borrowed from")
async def borrows_after_close(stage: Stage) -> str:
    pool = stage.pool()
    await settled(pool.close())
    return await stage.seen(pool.getconn)


@misuse("a `dedicated()` connection", "used after its block")
async def dedicated_after_its_block(stage: Stage) -> str:
    async with within(stage.pool().dedicated()) as conn:
        pass
    return await stage.seen(lambda: stage.column.ask(conn))


@misuse("an asyncio pool", "used on another loop while its own runs")
async def on_another_loop(stage: Stage) -> str:
    if stage.column.threads:
        return NONE
    pool = stage.pool()
    await pool.open()
    seen: list[str] = []
    other = threading.Thread(target=lambda: seen.append(asyncio.run(stage.seen(pool.getconn))))
    other.start()
    await comes_true(lambda: not other.is_alive())
    return seen[0]


# -- the table ------------------------------------------------------------------------------------


def what_is_seen(column: Column, conninfo: str, scene: Misuse) -> str:
    """A cell: what is seen by default, and with `guard=True` if that is something else."""

    async def once(guard: bool) -> str:
        stage = Stage(column, conninfo, guard)
        try:
            seen: str = await scene(stage)
            return seen
        finally:
            await stage.close()

    plain, guarded = (column.run(once(guard)) for guard in (False, True))
    return plain if plain == guarded else f"{plain}; `guard`: {guarded}"


def rows(conninfo: str, columns: list[Column]) -> dict[tuple[str, str], list[str]]:
    return {
        title: [what_is_seen(column, conninfo, scene) for column in columns]
        for title, scene in MISUSES.items()
    }


def main() -> None:
    logging.getLogger("penstock").addHandler(logging.NullHandler())
    heads = ["misuse", "when", *(column.title for column in COLUMNS)]
    lines = [heads, ["---"] * len(heads)]
    with Server() as server:
        seen = rows(server.conninfo(over="unix"), COLUMNS)
    lines += [[*title, *cells] for title, cells in seen.items()]
    for line in lines:
        sys.stdout.write("| " + " | ".join(line) + " |\n")


if __name__ == "__main__":
    main()
