"""What well-behaved borrowers do: ask, pay, transfer; each answer and each row is somebody's.

Its one job: pieces of work whose outcome can be told afterwards. `ask` reads back who asks. `pay` is one
statement that commits itself; `transfer` is a transaction of four, with a row before and one after what
keeps the sum of all accounts at 0.

It must not know: faults. No lock: a piece of work is its borrower's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.soak.ledger import ALONE, BOTH, DONE, NEVER, UNKNOWN
from tests.soak.world import ACCOUNTS, NEVER_LENT, Copied, Deliberate, now

if TYPE_CHECKING:
    from tests.soak.world import Borrower, World

#: What a session may still have of its last borrower, where `reset="session"` is asked for: nothing.
RESIDUE = (
    "select (select count(*) from pg_listening_channels()),"
    " (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),"
    " (select count(*) from pg_prepared_statements where from_sql),"
    " coalesce(current_setting('soak.mark', true), ''),"
    " to_regclass('pg_temp.left_behind') is null"
)
CLEAN = [(0, 0, 0, "", True)]


async def ask(w: World, b: Borrower) -> None:
    """One to three questions over one lease: the right answers, from one session, which is clean."""
    async with w.lend(b) as conn:
        look_at(w, conn)
        if w.options["reset"] == "session" and b.rng.random() < 0.3:
            residue = await w.ask(b, conn, RESIDUE)
            if residue != CLEAN:
                w.find(f"a session was lent with what its last borrower left in it: {residue}")
        sessions = set()
        for number in range(b.rng.randint(1, 3)):
            word = f"{w.journal.who}.{id(b)}.{b.attempts}.{number}"
            slowly = ", pg_sleep(0.002)" if b.rng.random() < 0.2 else ""
            answer = await w.ask(b, conn, f"select '{word}', pg_backend_pid(){slowly}")
            if len(answer) != 1 or answer[0][0] != word:
                w.find(f"a wrong answer: asked for {word!r}, and got {answer!r}")
                return
            sessions.add(answer[0][1])
        if len(sessions) != 1:
            w.find(f"one lease, several sessions: {sessions}")


def look_at(w: World, conn: Any) -> None:
    """What the last borrower must not have left in the client library."""
    if w.driver == "psycopg":
        status = int(conn.info.transaction_status)
        seen: tuple[Any, ...] = (status, conn.autocommit, conn.isolation_level)
        seen += (conn.row_factory.__name__,)
        expected: tuple[Any, ...] = (0, False, None, "tuple_row")
    elif w.driver == "psycopg2":
        seen = (conn.get_transaction_status(), conn.autocommit, conn.isolation_level)
        expected = (0, False, None)
    else:
        seen, expected = (conn.is_in_transaction(),), (False,)
    if seen != expected:
        w.find(f"a connection was lent with what its last borrower left in it: {seen}")


async def pay(w: World, b: Borrower) -> None:
    """One statement, autocommit: acknowledged by its answer."""
    key = w.journal.ask(ALONE)
    query = f"insert into ledger values ('{key}', 'alone') returning key"
    try:
        if w.runtime.name == "gevent":  # a copy in a forked child has to notice before it sends
            async with w.lend(b, **({} if w.driver == "asyncpg" else {"autocommit": True})) as conn:
                rows = await w.ask(b, conn, query)
        else:
            b.attempts += 1
            rows = [tuple(row) for row in (await w.pool.execute(query)).fetchall()]
            b.sure += 1
            b.queries += 1
    except NEVER_LENT:
        w.journal.note(key, NEVER)
        raise
    if rows != [(key,)]:
        w.find(f"a wrong answer: inserted {key!r}, and got {rows!r}")
    w.journal.note(key, DONE)


async def transfer(w: World, b: Borrower, *, fails: bool = False) -> None:
    """Four statements, all or nothing; `fails` raises before the last."""
    key = w.journal.ask(BOTH)
    known = NEVER
    # In the order of their numbers, so that no two transfers wait for each other.
    first, second = sorted(b.rng.sample(range(1, ACCOUNTS + 1), 2))
    amount = b.rng.randint(1, 100)
    try:
        async with w.lend(b, transaction=True) as conn:
            await w.ask(b, conn, f"insert into ledger values ('{key}', 'debit')")
            for account, change in ((first, -amount), (second, amount)):
                change_it = f"update account set balance = balance + {change} where id = {account}"
                await w.ask(b, conn, change_it)
            if fails:
                raise Deliberate
            await w.ask(b, conn, f"insert into ledger values ('{key}', 'credit')")
            known = UNKNOWN  # from here on the commit is under way
        known = DONE
    finally:
        w.journal.note(key, known)


async def any_piece(w: World, b: Borrower) -> None:
    """One piece of work, and what came of it; an interrupt goes through."""
    kind = b.rng.choices((ask, pay, transfer, doomed), (5, 2, 3, 1))[0]
    try:
        await kind(w, b)
    except Copied:
        raise
    except Exception as error:
        w.heard(error, b)
    else:
        b.last_good = now()


async def doomed(w: World, b: Borrower) -> None:
    await transfer(w, b, fails=True)


async def work_on(w: World, b: Borrower) -> None:
    """A borrower of the load, until the step ends."""
    while not w.stop.is_set():
        failed = sum(b.errors.values())
        await any_piece(w, b)
        # A short pause after an error: who is refused at once would do nothing else.
        await w.pause(0.02 if sum(b.errors.values()) > failed else b.rng.uniform(0, 0.004))
