"""Eight idle connections, and the server is restarted, or ends their sessions.

Nobody may notice: no error, no round trip that asks whether a connection lives, no statement twice. The
barrier is `stats().closed`: a server needs some milliseconds to end a session, and who borrows it meanwhile
gets the server's error, which nobody can help.
"""

from __future__ import annotations

TITLE = "restart or terminate while idle, 8 connections"
SIZE, BORROWS = 8, 80


async def play(w):
    server = w.fresh_server()
    proxy = w.proxy(server.port)
    server.execute("create table replayed (key text)")
    pool = w.pool(server.conninfo(port=proxy.port), min_size=SIZE, max_size=SIZE, name="idle")
    with proxy.counting() as count:
        await pool.open(wait=True)
    per_login = asked_of(count.total) / SIZE

    def terminate():
        like = f"%/{pool.name}/%"
        server.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            f" where application_name like '{like}'"
        )

    for how, fault in (("restart", server.restart), ("terminate", terminate)):
        heard = hung_up(pool) + SIZE
        with proxy.counting() as count:
            await w.aside(fault)
            await w.until(lambda heard=heard: hung_up(pool) >= heard, "all hang-ups heard")
            tries = [await w.borrow(pool) for _ in range(BORROWS)]
            await w.until(lambda: pool.stats().idle == SIZE, "eight again")
        logins = sum(1 for each in count.by_connection if asked_of(each))
        errors = sum(1 for each in tries if not each.good)
        w.count(f"{how}: errors of {BORROWS} borrows", errors, exactly=0)
        extra = asked_of(count.total) - logins * per_login
        w.count(f"{how}: round trips beyond the logins", int(extra), exactly=0)

        insert = f"insert into replayed values ('{how}')"
        tries = [await w.borrow(pool, insert) for _ in range(BORROWS)]
        good = sum(1 for each in tries if each.good)
        ((found,),) = server.execute(f"select count(*) from replayed where key = '{how}'")
        w.count(f"{how}: rows beyond the {good} that were told", int(found) - good, exactly=0)


def asked_of(traffic):
    """Messages that the server has to answer once a session is there."""
    return sum(traffic.messages[kind] for kind in ("Query", "Sync", "Flush"))


def hung_up(pool):
    return pool.stats().closed.get("hung up", 0)
