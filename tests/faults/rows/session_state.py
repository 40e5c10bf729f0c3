"""What a borrower can leave behind, one kind after the other, and what the next borrower finds of it.

On the server, in the client library, transactions, and exchanges of the protocol left half done; each with
`reset="session"`, where nothing may be left, and with the default, which answers for all but what is on
the server. `left.py` has the kinds, as each driver spells them: `leave` leaves one, `found` is asked of
the next borrower, and says whether it is still there.

The pool has one connection, so that the next borrower gets the one that was left like that, or a new one
in its place. A return that waits for something else than its own rollback would sit out the sleep of a
statement that was left under way.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress

from tests.contract.runtimes import settled
from tests.faults.rows import left
from tests.faults.stage import now

TITLE = "session state left behind, or an exchange left half done"
RETURNS = 5
#: A return may take a rollback; it hangs if it waits for what was left under way (pg_sleep(20)).
HANGS = 4.0
PLACE = re.compile(r"\(at .*\.py:\d+\)")


async def play(w):
    server = w.fresh_server()
    server.execute("create sequence left_sequence")
    kinds = left.kinds_of(w, server)
    for reset in ("session", "rollback"):
        await leave_all(w, server, kinds, reset)
    await round_trips(w, server)
    await configured(w, server)
    for kind, why in left.not_had(w).items():
        w.figure(f"not tried, {kind}", why, goal="-", met=True)


async def leave_all(w, server, kinds, reset):
    """Each kind once, in a pool of its own."""
    tried = [kind for kind in kinds if reset == "session" or kind.where != "server"]
    leaks, hung, wrong, unnamed, slowest = [], [], [], [], 0.0
    with Told() as told:
        for kind in tried:
            pool = w.pool(server.conninfo(), max_size=1, timeout=10.0, reset=reset, name="left")
            told.texts.clear()
            took = await leave(w, pool, kind)
            slowest = max(slowest, took)
            if took > HANGS:
                hung.append(kind.name)
            this = await find(w, pool, kind)
            if this is None:
                wrong.append(kind.name)
            elif this:
                leaks.append(kind.name)
            if kind.where in {"transaction", "exchange"} and not any(map(PLACE.search, told.texts)):
                unnamed.append(kind.name)
            w.forget(pool)
            await pool.close(timeout=1.0)
            await kind.end()
    names = f'reset="{reset}"'
    w.figure(f"{names}: kinds left behind", len(tried), goal="-", met=True)
    w.figure(f"{names}: of these leak", listed(leaks), goal="0", met=not leaks)
    w.figure(f"{names}: next borrowers with an error", listed(wrong), goal="0", met=not wrong)
    w.figure(f"{names}: returns that hang", listed(hung), goal="0", met=not hung)
    w.figure(
        f"{names}: transactions and exchanges without a warning that names the place",
        listed(unnamed),
        goal="0",
        met=not unnamed,
    )


def listed(names):
    return f"{len(names)} ({', '.join(names)})" if names else "0"


async def leave(w, pool, kind):
    """Leave it behind; how long the return took."""
    conn = await pool.getconn()
    await kind.leave(w, conn)
    if kind.where in {"server", "client"} and w.driver != "asyncpg":
        await settled(conn.commit())  # it is no transaction that is left
    began = now()
    with suppress(Exception):
        await pool.putconn(conn)
    return now() - began


async def find(w, pool, kind):
    """Whether the next borrower finds it; None: he gets an error, or a wrong answer."""
    try:
        async with pool.connection() as conn:
            found = await kind.found(w, conn)
        this = await w.borrow(pool, "select 4711")
    except Exception as error:
        print("#", kind.name, type(error).__name__, error)
        return None
    if not this.good or this.answer != [(4711,)]:
        print("#", kind.name, this)
        return True if this.good else None
    return found


async def round_trips(w, server):
    """What a return costs on the wire, and whether the borrower waits for it."""
    proxy = w.proxy(server.port)
    conninfo = server.conninfo(port=proxy.port)
    wants = {} if w.driver == "asyncpg" else {"autocommit": True}
    pool = w.pool(conninfo, max_size=1, timeout=10.0, reset="session", name="wire", **wants)
    # An answer says that all that came before it was counted, too.
    async with pool.connection() as conn:
        await w.ask(conn, "select 1")
        before = proxy.counting()
        count = before.__enter__()
    for _ in range(RETURNS - 1):
        async with pool.connection():
            pass
    async with pool.connection() as conn:
        await w.ask(conn, "select 1")
        before.__exit__(None, None, None)
    each = (count.round_trips - 1) / RETURNS
    w.figure("round trips a return", f"{each:g}", goal="<= 1", met=each <= 1)
    await w.until(lambda: pool.stats().idle == 1, "it is back")

    waited = 0
    proxy.delay(0.25)
    for _ in range(2):
        async with pool.connection():
            began = now()
        waited += now() - began > 0.25
    proxy.delay(0)
    w.count("returns that wait for the reset, of 2", waited, exactly=0)


async def configured(w, server):
    """What `configure` made is there for the next borrower, whatever the last one did to it."""

    async def configure(conn):
        await left.configure(w, conn)
        await w.ask(conn, "set statement_timeout to '77s'")
        await w.ask(conn, "listen kept")
        if w.driver != "asyncpg":
            await settled(conn.commit())

    lost = []
    for reset in ("session", "rollback"):
        pool = w.pool(
            server.conninfo(),
            max_size=1,
            timeout=10.0,
            reset=reset,
            configure=w.runtime.callable(configure),
            name="configured",
        )
        async with pool.connection() as conn:
            await left.unconfigure(w, conn)
            if reset == "session":
                await w.ask(conn, "set statement_timeout to 0")
                await w.ask(conn, "unlisten *")
        async with pool.connection() as conn:
            if not await left.is_configured(w, conn):
                lost.append(f"{reset}: the client's")
            if await w.ask(conn, "show statement_timeout") != [("77s",)]:
                lost.append(f"{reset}: statement_timeout")
            if await w.ask(conn, "select pg_listening_channels()") != [("kept",)]:
                lost.append(f"{reset}: LISTEN")
    w.figure("state of configure that is lost", listed(lost), goal="0", met=not lost)


class Told(logging.Handler):
    """Penstock's warnings, while it is entered."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("penstock").addHandler(self)
        return self

    def __exit__(self, *_exc):
        logging.getLogger("penstock").removeHandler(self)
