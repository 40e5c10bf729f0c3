"""Borrowers that are too many, wait for themselves, never give back, or drop what they hold."""

from __future__ import annotations

import gc
import logging
import re

from tests.faults.stage import now

from penstock import MisuseError, PoolTimeout, TooManyRequests

TITLE = "too many borrowers, self-deadlock, overdue, dropped lease"
SIZE, WAITING, TOO_MANY = 2, 4, 20
PLACE = re.compile(r"\.py:\d+")


async def play(w):
    conninfo = w.server().conninfo()
    pool = w.pool(conninfo, max_size=SIZE, max_waiting=WAITING, timeout=1.0, name="crowd")
    tries = await w.crowd(SIZE + WAITING + TOO_MANY, lambda _number: w.borrow(pool, hold=0.3)).all()
    refused = [each for each in tries if isinstance(each.error, TooManyRequests)]
    others = [each for each in tries if not each.good and each not in refused]
    # Those that come while the pool opens its first connections wait, too; the rest is refused.
    w.count("too many: refused", len(refused), at_most=TOO_MANY + WAITING)
    w.count("too many: other errors", len(others), exactly=0)
    counted = [each for each in refused if f"{WAITING} waiting" in str(each.error)]
    w.count("too many: errors without the counts", len(refused) - len(counted), exactly=0)
    w.seconds("too many: refused after", max(each.took for each in refused), at_most=0.1)

    await deadlock(w, conninfo)
    await never_given_back(w, conninfo)
    await overdue(w, conninfo)
    await dropped(w, conninfo)


async def deadlock(w, conninfo):
    """Everyone holds one and asks for a second: the last to ask is told at once."""
    pool = w.pool(conninfo, max_size=SIZE, timeout=3.0, name="deadlock")
    holding = []

    async def body(number):
        async with pool.connection() as conn:
            holding.append(number)
            await w.until(lambda: len(holding) == SIZE, "all hold one")
            this = await w.borrow(pool)
            del conn  # that it stands on the stack is how a holder who asks is known
        return this

    tries = await w.crowd(SIZE, body).all()
    named = [each for each in tries if isinstance(each.error, MisuseError)]
    w.figure("self-deadlock: named", f"{len(named)} of {SIZE}", goal=">= 1", met=bool(named))
    first = min(each.took for each in tries)
    w.seconds("self-deadlock: the first has its answer after", first, at_most=0.1)


async def never_given_back(w, conninfo):
    """One takes a connection and keeps it; the others share what is left, in turn."""
    pool = w.pool(conninfo, max_size=SIZE, timeout=5.0, name="kept")
    kept = await pool.getconn()
    tries = await w.crowd(20, lambda _number: w.borrow(pool, "select 1", hold=0.01)).all()
    errors = sum(not each.good for each in tries)
    w.count("never given back: errors of 20 others", errors, exactly=0)
    w.seconds("never given back: longest wait of the others", max(t.took for t in tries), at_most=1)
    began = now()
    await pool.close(timeout=0.2)
    w.seconds("never given back: close(timeout=0.2)", now() - began, at_most=0.45)
    del kept


async def overdue(w, conninfo):
    pool = w.pool(conninfo, max_size=1, timeout=0.3, overdue_after=0.2, name="overdue")
    records = Records()
    logger = logging.getLogger("penstock")
    logger.addHandler(records)
    try:
        async with pool.connection():
            await w.until(lambda: records.texts, "the warning")

            async def body(_number):
                return await w.borrow(pool)

            (this,) = await w.crowd(1, body).all()
            await w.pause(0.5)
    finally:
        logger.removeHandler(records)
    told = [text for text in records.texts if "'overdue'" in text]
    w.count("overdue: warnings", len(told), exactly=1)
    placed = all(PLACE.search(text) for text in told)
    w.figure("overdue: the place is named", placed, goal="True", met=placed)
    named = isinstance(this.error, PoolTimeout) and bool(PLACE.search(str(this.error)))
    w.figure("overdue: who waits is told the place", named, goal="True", met=named)


async def dropped(w, conninfo):
    pool = w.pool(conninfo, max_size=1, timeout=5.0, name="dropped")
    lease = pool.connection()
    conn = await lease.__aenter__()
    ((first,),) = await w.ask(conn, "select pg_backend_pid()")
    del conn, lease
    gc.collect()
    this = await w.borrow(pool, "select pg_backend_pid()")
    w.count("dropped lease: error of the next", int(not this.good), exactly=0)
    replaced = this.good and this.answer[0][0] != first
    w.figure("dropped lease: connection replaced", replaced, goal="True", met=replaced)
    w.seconds("dropped lease: the next is served after", this.took, at_most=1.0)


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())
