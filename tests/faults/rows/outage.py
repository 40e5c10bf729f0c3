"""The server is down for a while, and eight borrowers go on asking.

Counted where the connects arrive: the proxy takes them and cuts them at once, as a balancer does whose server
is gone. `refused` is a port at which nobody listens; the pool's own count is all there is of those.
"""

from __future__ import annotations

from tests.faults.stage import now

from penstock import ServerUnavailable

TITLE = "down 20 s with 8 borrowers"
BORROWERS, SIZE = 8, 8


async def play(w):
    await outage(w, "cut", 20.0 if w.long else 3.0)
    if w.long:
        await outage(w, "refused", 40.0)


async def outage(w, how, seconds):
    server = w.fresh_server()
    proxy = w.proxy(server.port)
    port = proxy.port if how == "cut" else server.port
    timeout = 5.0 if w.long else 1.0
    pool = w.pool(server.conninfo(port=port), max_size=SIZE, timeout=timeout, name="outage")
    stop = w.runtime.event()
    crowd = await w.loops(BORROWERS, pool, "select 1", stop)
    await w.until(lambda: pool.stats().borrows > 4 * BORROWERS, "they are at it")

    await w.aside(server.stop)
    began, tried = now(), pool.stats().open_failures
    await w.pause(seconds)
    ended, tried = now(), pool.stats().open_failures - tried
    by_itself = tried
    if how == "cut":
        tried = sum(began < at < ended for at in proxy.arrivals())
    await w.aside(server.start)
    accepting = now()
    await w.until(lambda: pool.health().ready, "it is well again")
    served = pool.stats().borrows
    await w.until(lambda: pool.stats().borrows > served + 4 * BORROWERS, "they are at it again")
    stop.set()

    tries = await crowd.tries()
    refused = [each.error for each in tries if each.error and not each.lent]
    causeless = [
        error
        for error in refused
        if not (isinstance(error, ServerUnavailable) and error.__cause__ and error.heals)
    ]
    first = min(each.over for each in tries if each.good and each.lent > ended)
    what = f"{how}, {seconds:g} s"
    rate = tried / (ended - began)
    w.figure(
        f"{what}: connects per second",
        f"{rate:.2f}",
        goal="<= 3 over 20 s",
        met=rate <= 3 or seconds < 20,
        # 11 in the first 2 s, then 3 a second, and with each as many that diagnose.
        holds=tried <= 2 * (3 * seconds + 11),
    )
    if how == "cut":
        w.figure(f"{what}: of these, that diagnose", tried - by_itself, goal="-", met=True)
    w.figure(
        f"{what}: errors that name no cause, of {len(refused)}",
        len(causeless),
        goal="0",
        met=not causeless and len(refused) > 0,
    )
    w.seconds(f"{what}: first success after it accepts", max(0.0, first - accepting), at_most=0.5)
