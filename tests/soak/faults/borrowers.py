"""Borrowers who misbehave: leave something behind, drop, raise, overstay, want a second connection, break a COPY."""

from __future__ import annotations

import gc

from penstock import MisuseError
from tests.contract.runtimes import settled
from tests.soak.ledger import ALONE, NEVER
from tests.soak.work import ask, pay
from tests.soak.world import Deliberate

#: On the server, each committed; `{n}` is a number of this borrower's own.
LEFT = (
    "set soak.mark = 'somebody'",
    "listen soak_{n}",
    "select pg_advisory_lock({n})",
    "prepare left_{n} as select 1",
    "create temporary table if not exists left_behind (n int)",
    "set search_path = pg_catalog, public",
)


async def tried(w, b, body, *, allowed=()):
    """Misbehave once; what comes of it is counted as any borrower's."""
    try:
        await body()
    except Exception as error:
        w.heard(error, b, allowed)


async def leaves_state_in_the_session(w, b):
    w.tell("state is left behind in sessions")

    async def body():
        async with w.lend(b) as conn:
            for what in b.rng.sample(LEFT, b.rng.randint(1, 4)):
                await w.ask(b, conn, what.format(n=b.rng.randrange(1 << 30)))

    for _ in range(10):
        await tried(w, b, body)


async def leaves_state_in_the_client(w, b):
    w.tell("settings are left behind in the client library")

    async def body():
        async with w.lend(b) as conn:
            if w.driver == "psycopg":
                from psycopg.rows import dict_row

                await settled(
                    (conn.set_autocommit if w.runtime.asynchronous else autocommit(conn))(True)
                )
                conn.row_factory = dict_row
            elif w.driver == "psycopg2":
                conn.set_session(isolation_level="SERIALIZABLE", autocommit=True)
            else:
                await conn.execute("begin")

    for _ in range(10):
        await tried(w, b, body)


def autocommit(conn):
    return lambda value: setattr(conn, "autocommit", value)


async def drops_leases(w, b):
    w.tell("leases are dropped")
    for _ in range(b.rng.randint(1, 4)):

        async def body():
            lease = w.lend(b)
            conn = await lease.__aenter__()
            await w.ask(b, conn, "select 1")

        await tried(w, b, body)
        gc.collect()


async def raises(w, b):
    w.tell("blocks are left by exceptions, transactions failed")

    async def body():
        async with w.lend(b, transaction=True) as conn:
            await w.ask(b, conn, "select 1")
            if b.rng.random() < 0.5:
                await w.ask(b, conn, "select 1 / 0")
            raise Deliberate

    for _ in range(20):
        await tried(w, b, body)


async def overstays(w, b):
    w.tell("a connection is held for long")

    async def body():
        async with w.lend(b) as conn:
            await w.ask(b, conn, "select 1")
            await w.pause(b.rng.uniform(0.3, 0.6))

    await tried(w, b, body)


async def wants_two(w, b):
    """One borrower after the other holds one and asks for a second."""
    w.tell("second connections are asked for")

    async def body():
        async with w.lend(b) as conn:
            await w.ask(b, conn, "select 1")
            async with w.lend(b, timeout=0.2) as other:
                await w.ask(b, other, "select 2")

    for _ in range(5):
        await tried(w, b, body, allowed=(MisuseError,))


async def breaks_a_copy(w, b):
    """COPY is cut in the middle: none of its rows may be there."""
    w.tell("COPY is broken off")
    for _ in range(5):
        key = w.journal.ask(ALONE)

        async def body(key=key):
            async with w.lend(b) as conn:
                await copy(w, conn, broken_rows(key))

        await tried(w, b, body)
        w.journal.note(key, NEVER)


def broken_rows(key):
    for _ in range(50):
        yield key, "alone"
    raise Deliberate


async def copy(w, conn, rows):
    if w.driver == "psycopg":
        async with AnyBlock(conn.cursor().copy("copy ledger from stdin")) as into:
            for row in rows:
                await settled(into.write_row(row))
    elif w.stage.name == "gevent-psycopg2":  # psycopg2 has no COPY with a wait callback
        await w.stage.ask(conn, "insert into ledger values ('a copy', 'that is rolled back')")
        for _ in rows:
            pass
    elif w.driver == "psycopg2":
        conn.cursor().copy_expert("copy ledger from stdin", Readable(rows))
    else:
        await conn.copy_records_to_table("ledger", records=rows)


class AnyBlock:
    """A block of `with` or `async with`."""

    def __init__(self, block):
        self.block = block
        self.asynchronous = hasattr(block, "__aenter__")

    async def __aenter__(self):
        return await self.block.__aenter__() if self.asynchronous else self.block.__enter__()

    async def __aexit__(self, *exc):
        if self.asynchronous:
            return await self.block.__aexit__(*exc)
        return self.block.__exit__(*exc)


class Readable:
    """Rows as a file in COPY's text format."""

    def __init__(self, rows):
        self.rows = rows

    def read(self, _size=-1):
        return "\t".join(next(self.rows)) + "\n"


async def closes_it(w, b):
    """`close()` inside a lease ends the session; the pool replaces it."""
    w.tell("lent connections are closed by their borrowers")

    async def body():
        async with w.lend(b) as conn:
            await w.ask(b, conn, "select 1")
            await settled(conn.close())

    for _ in range(4):
        await tried(w, b, body)


async def listens_aside(w, b):
    """A connection of its own, outside the pool's size."""
    w.tell("dedicated connections")

    async def body():
        async with w.pool.dedicated() as conn:
            await w.ask(b, conn, "listen soak_aside")
            await w.pause(0.05)

    for _ in range(2):
        await tried(w, b, body)


async def stampedes(w, b):
    """A hundred at once, each with a timeout of its own."""
    w.tell("a stampede of 100")

    async def one(own):
        async def body():
            async with w.lend(own, timeout=own.rng.choice((0.0, 0.01, 0.1, 5.0))) as conn:
                await w.ask(own, conn, "select 1")

        await tried(w, own, body)
        await tried(w, own, lambda: own.rng.choice((ask, pay))(w, own))

    flights = [w.runtime.spawn(one(w.borrower())) for _ in range(100)]
    await w.stage.until(lambda: all(each.done for each in flights), "the end of a stampede")


ALL = (
    leaves_state_in_the_session,
    leaves_state_in_the_client,
    drops_leases,
    raises,
    overstays,
    wants_two,
    breaks_a_copy,
    closes_it,
    listens_aside,
    stampedes,
)
HARMLESS = tuple(each for each in ALL if each not in (stampedes, wants_two))
