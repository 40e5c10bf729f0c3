"""kill -9 of every process of the server while 16 borrowers work, and it is down for a second.

Who is in the middle of a statement gets the driver's error: nobody may repeat it. Everybody else waits
through the outage within their timeout, and is served as soon as the server accepts. Each statement writes a key of its
own, so that one that was sent twice is seen, and one that was acknowledged is missed.
"""

from __future__ import annotations

import itertools

from tests.faults.stage import now

TITLE = "kill -9 of the server under 16 borrowers, 1 s down"
BORROWERS, SIZE, DOWN = 16, 8, 1.0


async def play(w):
    server = w.fresh_server()
    server.execute("create table written (key int)")
    keys = itertools.count()
    pool = w.pool(server.conninfo(), min_size=SIZE, max_size=SIZE, name="killed")
    await pool.open(wait=True)
    stop = w.runtime.event()

    async def write(_number):
        tries = []
        while not stop.is_set():
            key = next(keys)
            query = f"insert into written select {key} from pg_sleep(0.01)"
            tries.append((key, await w.borrow(pool, query)))
        return tries

    crowd = w.crowd(BORROWERS, write)
    await w.until(lambda: pool.stats().borrows > 4 * BORROWERS, "they are at it")

    await w.aside(server.kill)
    dead = now()
    await w.pause(DOWN if w.long else DOWN / 2)
    await w.aside(server.start)
    accepting = now()
    await w.until(lambda: pool.stats().opened > SIZE, "a new connection")
    served = pool.stats().borrows
    await w.until(lambda: pool.stats().borrows > served + 4 * BORROWERS, "they are at it again")
    stop.set()

    written = [this for own in await crowd.all() for this in own]
    tries = [this for _, this in written]
    failed = [each for each in tries if not each.good]
    in_flight = [each for each in failed if each.lent and each.lent <= dead]
    first = min(each.over for each in tries if each.good and each.lent > dead)
    w.count("errors of those in flight", len(in_flight), at_most=SIZE)
    w.count("errors of all others", len(failed) - len(in_flight), exactly=0)
    w.seconds("first success after it accepts", max(0.0, first - accepting), at_most=0.3)

    found = sorted(int(key) for (key,) in server.execute("select key from written"))
    told = {key for key, this in written if this.good}
    w.count("statements that were sent twice", len(found) - len(set(found)), exactly=0)
    lost = len(told - set(found))
    w.figure("acknowledged, and not there", f"{lost} of {len(told)}", goal="0", met=not lost)
