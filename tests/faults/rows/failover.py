"""A standby is promoted: at the same address, or as the second host of the conninfo.

At the same address the old primary may live on, read-only: sessions there are well, and every write fails
(25006). A pool that is told `read_write=True` takes that as the end of the session and doubts the others.
The server asks for passwords: libpq ends a login that succeeded, at a standby, without a code.
"""

from __future__ import annotations

from tests.faults.stage import now

TITLE = "failover to a promoted standby, 8 connections"
SIZE, BORROWERS, AFTER = 8, 8, 240
HBA = (
    *("local all postgres trust", "host replication all 127.0.0.1/32 trust"),
    "host all all 127.0.0.1/32 scram-sha-256",
)
APP = {"user": "app", "password": "pw"}


async def play(w):
    await several_hosts(w)
    if w.long:
        await same_address(w)


async def same_address(w):
    primary = w.fresh_server(hba=HBA)
    primary.execute("create role app login password 'pw'")
    primary.execute("create table written (key int)")
    primary.execute("grant insert on written to app")
    standby = w.owns(await w.aside(primary.standby))
    proxy = w.proxy(primary.port)
    conninfo = primary.conninfo(port=proxy.port, **APP)
    pool = w.pool(conninfo, min_size=SIZE, max_size=SIZE, read_write=True, name="moves")
    await pool.open(wait=True)
    await w.until(lambda: pool.stats().idle == SIZE, "all are idle")

    await w.aside(standby.promote)
    proxy.upstream("127.0.0.1", standby.port)
    primary.execute("alter system set default_transaction_read_only = on")
    primary.execute("select pg_reload_conf()")

    async def body(_number):
        return [
            await w.borrow(pool, "insert into written values (1)")
            for _ in range(AFTER // BORROWERS)
        ]

    tries = await w.crowd(BORROWERS, body).tries()
    errors = sum(not each.good for each in tries)
    w.count(f"same address: errors of {AFTER} writes", errors, at_most=SIZE)
    last = max((each.over for each in tries if not each.good), default=0.0)
    after = [each for each in tries if each.asked > last]
    ((found,),) = standby.execute("select count(*) from written")
    w.count(
        "same address: rows beyond those that were told", int(found) - AFTER + errors, exactly=0
    )
    w.figure("same address: writes after the last error", len(after), goal="> 0", met=bool(after))
    await pool.close()


async def several_hosts(w):
    primary = w.fresh_server(hba=HBA)
    primary.execute("create role app login password 'pw'")
    standby = w.owns(await w.aside(primary.standby))
    conninfo = primary.conninfo(
        host="127.0.0.1,127.0.0.1",
        port=f"{primary.port},{standby.port}",
        target_session_attrs="read-write",
        **APP,
    )
    pool = w.pool(conninfo, min_size=SIZE, max_size=SIZE, read_write=True, name="hosts")
    await pool.open(wait=True)
    stop = w.runtime.event()
    crowd = await w.loops(BORROWERS, pool, "create temp table if not exists t (n int)", stop)
    await w.until(lambda: pool.stats().borrows > 4 * BORROWERS, "they are at it")

    await w.aside(primary.kill)
    dead = now()
    await w.pause(0.5)
    await w.aside(standby.promote)
    promoted = now()
    served = pool.stats().borrows
    await w.until(lambda: pool.stats().borrows > served + 8 * BORROWERS, "they are at it again")
    stop.set()

    tries = await crowd.tries()
    failed = [each for each in tries if not each.good]
    in_flight = [each for each in failed if each.lent and each.lent <= dead]
    first = min(each.over for each in tries if each.good and each.lent > dead)
    w.count("several hosts: errors of those in flight", len(in_flight), at_most=SIZE)
    w.count("several hosts: errors of all others", len(failed) - len(in_flight), exactly=0)
    w.seconds("several hosts: served after the promotion", max(0.0, first - promoted), at_most=0.5)

    async def port(_number):
        return await w.borrow(pool, "select inet_server_port()", hold=0.05)

    asked = await w.crowd(SIZE, port).all()
    elsewhere = sum(each.answer != [(standby.port,)] for each in asked)
    w.count(f"several hosts: of {SIZE} sessions, not at the new primary", elsewhere, exactly=0)
