"""Four processes want ten connections each, and the server allows their role twenty.

Who is refused goes on with what it has: everybody is served, and a pool that is full at the server asks
for more at most once a second.
"""

from __future__ import annotations

import json

from tests.faults.stage import now

TITLE = "4 processes x 10 wanted, the server allows 20"
PROCESSES, WANTED, ALLOWED, EACH = 4, 10, 20, 10
SETTLED = 0.5  # seconds after the first refusal


async def worker(w, *, conninfo, each):
    pool = w.pool(conninfo, max_size=WANTED, timeout=20, name="crowded")

    async def body(_number):
        return [await w.borrow(pool, "select 1", hold=0.02) for _ in range(each)]

    crowd = w.crowd(WANTED, body)
    await w.until(lambda: pool.stats().open_failures or pool.stats().size == WANTED, "full")
    await w.pause(SETTLED)
    settled, at = pool.stats().open_failures, now()
    tries = await crowd.tries()
    return {
        "served": sum(this.good for this in tries),
        "errors": sorted({str(this.error) for this in tries if not this.good}),
        "at first": settled,
        "refused": pool.stats().open_failures - settled,
        "seconds": now() - at,
    }


async def play(w):
    server = w.server()
    server.execute(f"create role crowded_app login connection limit {ALLOWED}")
    try:
        await crowded(w, server)
    finally:
        server.execute("drop role crowded_app")


async def crowded(w, server):
    each = EACH * 20 if w.long else EACH
    conninfo = server.conninfo(user="crowded_app")
    workers = [w.process("crowded_server", conninfo=conninfo, each=each) for _ in range(PROCESSES)]
    told = [await w.aside(each.answer) for each in workers]
    served = sum(each["served"] for each in told)
    wanted = PROCESSES * WANTED * each
    if served != wanted:
        print(json.dumps([each["errors"] for each in told]))
    w.count(f"served of {wanted}", served, exactly=wanted)
    # While a pool grows, one connect per waiter is under way, and those beyond the limit fail together.
    w.figure(
        "refused connects per process while it grows",
        max(each["at first"] for each in told),
        goal="-",
        met=True,
    )
    worst = max(told, key=lambda each: each["refused"] - each["seconds"])
    w.figure(
        "refused connects per process once full",
        f"{worst['refused']} in {worst['seconds']:.1f} s",
        goal="<= 1 a second",
        met=worst["refused"] <= 1 + worst["seconds"],
        holds=worst["refused"] <= 3 + 2 * worst["seconds"],
    )
