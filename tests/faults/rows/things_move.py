"""What is agreed upon changes: the address, the password, certificates, the clock; the server is about to start or to stop.

Where to connect and with which password is asked for at each connect (`conninfo` and `kwargs` may be callables), and
files are read at each connect; after a refusal they are asked again before the server is. A process that was stopped, or slept, finds on its return what happened meanwhile.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psycopg
from tests.faults.certificates import Authority
from tests.faults.clocks import AHEAD
from tests.faults.stage import now

from penstock import PenstockError
from pytest_penstock.postgres import HBA, TlsUnavailable

TITLE = "address, password, certificates, clocks change; cannot connect now; suspend and resume"
STOPPED = 1.5
SIZE, TIMEOUT = 8, 3.0


async def play(w):
    await new_certificates(w)
    await clocks(w)
    if w.long:
        await new_address(w)
        await new_password(w)
        await shutting_down(w)
        await recovering(w)
        await stopped(w)


async def new_address(w):
    first, second = w.fresh_server(), w.server()
    where = [first.conninfo()]
    pool = w.pool(lambda: where[0], min_size=4, timeout=5, name="moves")
    await pool.open(wait=True)
    where[0] = second.conninfo()
    await w.aside(first.close)
    await w.until(lambda: pool.stats().closed.get("hung up", 0) >= 4, "all hang-ups heard")
    tries = [await w.borrow(pool, "select 1") for _ in range(20)]
    w.count("address: errors of 20 borrows", errors_of(tries), exactly=0)
    w.seconds("address: longest borrow", max(each.took for each in tries), at_most=1.0)
    await pool.close()


async def new_password(w):
    server = w.fresh_server(hba=("host all rotates 127.0.0.1/32 scram-sha-256", *HBA))
    server.execute("create role rotates login password 'old'")
    words = {"password": "old"}
    conninfo = server.conninfo(user="rotates")
    pool = w.pool(conninfo, kwargs=lambda: dict(words), max_size=4, timeout=5, name="rotates")
    await w.borrow(pool, "select 1")
    server.execute("alter role rotates password 'new'")
    server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotates'"
    )
    await w.until(lambda: pool.stats().closed.get("hung up", 0), "it was heard")
    refused = await w.borrow(pool, "select 1")
    w.figure("password: the old one", type(refused.error).__name__, goal="-", met=not refused.good)
    words["password"] = "new"
    w.seconds("password: served after the new one is there", await served(w, pool), at_most=0.5)
    await pool.close()


async def served(w, pool):
    """Seconds until somebody is served."""
    began = now()
    while not (await w.borrow(pool, "select 1")).good:
        await w.pause(0.02)
    return now() - began


def errors_of(tries):
    return sum(not each.good for each in tries)


# -- certificates ---------------------------------------------------------------------------------


async def new_certificates(w):
    """The server's, the clients', and the authority that both trust."""
    try:
        server = w.fresh_server(tls=True, hba=("hostssl all carded all cert", *HBA))
    except TlsUnavailable:
        return
    server.execute("create role carded login")
    papers = await w.aside(lambda: Papers(server))
    papers.server_shows("old", trusts=("old", "new"))
    papers.client_shows("old", trusts=("old", "new"))
    pool = w.pool(papers.conninfo, min_size=4, max_size=4, timeout=TIMEOUT, name="papers")
    await pool.open(wait=True)

    # As it should be done: first everybody trusts both, then each shows the new one.
    papers.server_shows("new", trusts=("old", "new"))
    papers.client_shows("new", trusts=("old", "new"))
    opened = pool.stats().opened
    await pool.drain()
    tries = [await w.borrow(pool, "select 1") for _ in range(20)]
    await w.until(lambda: pool.stats().opened >= opened + 4, "all were replaced")
    w.count("certificates, both trusted: errors of 20 borrows", errors_of(tries), exactly=0)
    if w.long:
        await not_trusted(w, papers, pool)
    await pool.close()


async def not_trusted(w, papers, pool):
    """As it should not be done: one side shows the old one, which the other trusts no more."""
    trusts = ("new",)
    for what, server, client in (("server's", "old", "new"), ("client's", "new", "old")):
        papers.server_shows(server, trusts=trusts)
        papers.client_shows(client, trusts=trusts)
        await pool.drain()
        refused = await w.borrow(pool, "select 1")
        w.figure(
            f"{what} certificate not trusted",
            type(refused.error).__name__,
            goal="-",
            met=not refused.good,
        )
        papers.server_shows("new", trusts=trusts)
        papers.client_shows("new", trusts=trusts)
        name = f"{what} certificate: served after the new one is there"
        w.seconds(name, await served(w, pool), at_most=0.5)


class Papers:
    """What server and client show and trust, as files that are replaced."""

    def __init__(self, server):
        self.server, self.folder = server, server.folder
        self.authorities = {name: Authority(self.folder, name) for name in ("old", "new")}
        self.signed = {
            (whom, name): authority.signs(whom)
            for whom in ("localhost", "carded")
            for name, authority in self.authorities.items()
        }
        where = {"ssl_cert_file": "shown.crt", "ssl_key_file": "shown.key", "ssl_ca_file": "ca.crt"}
        for name, file in where.items():
            server.execute(f"alter system set {name} = '{self.folder / file}'")
        self.conninfo = server.conninfo(
            over="tls",
            user="carded",
            sslrootcert=self.folder / "root.crt",
            sslcert=self.folder / "client.crt",
            sslkey=self.folder / "client.key",
        )

    def server_shows(self, name, *, trusts):
        self._put(self.signed["localhost", name], "shown", "ca.crt", trusts)
        (before,) = self.server.execute("select pg_conf_load_time()")
        self.server.execute("select pg_reload_conf()")
        while self.server.execute("select pg_conf_load_time()") == [before]:
            pass  # the postmaster has heard as soon as its sessions have

    def client_shows(self, name, *, trusts):
        self._put(self.signed["carded", name], "client", "root.crt", trusts)

    def _put(self, signed, stem, trusted, trusts):
        key = self.folder / f"{stem}.key"
        self._replace(signed.certificate.read_bytes(), key.with_suffix(".crt"))
        self._replace(signed.key.read_bytes(), key)
        both = b"".join(self.authorities[each].certificate.read_bytes() for each in trusts)
        self._replace(both, self.folder / trusted)

    def _replace(self, data, path):
        """At once, as whoever rotates should: a half file is none."""
        fresh = path.with_suffix(".fresh")
        fresh.write_bytes(data)
        fresh.chmod(0o600)
        owner = Path(self.server.certificate).stat()
        shutil.chown(fresh, owner.st_uid, owner.st_gid)
        fresh.replace(path)


# -- "cannot connect now" -------------------------------------------------------------------------


async def shutting_down(w):
    """A smart shutdown lets old sessions live, and tells new ones 57P03 until they have ended."""
    server = w.fresh_server()
    held = psycopg.connect(server.conninfo())
    os.kill(server.pid, signal.SIGTERM)
    hasty = w.pool(server.conninfo(), timeout=0.3, name="hasty")
    refused = await w.borrow(hasty)
    while refused.good:  # it has not heard yet
        await hasty.drain()
        refused = await w.borrow(hasty)
    told = getattr(refused.error, "sqlstate", None)
    w.figure("shutting down: the error's SQLSTATE", told, goal="57P03", met=told == "57P03")
    await hasty.close()
    pool = w.pool(server.conninfo(), timeout=20, name="patient")
    waiting = w.crowd(SIZE, lambda _number: w.borrow(pool, "select 1"))
    await w.until(lambda: pool.stats().waiting == SIZE, "all wait")
    held.close()
    await w.until(lambda: not server.is_running, "it has stopped")
    await w.aside(server.start)
    accepting = now()
    tries = await waiting.all()
    w.count(f"shutting down: errors of {SIZE} who wait", errors_of(tries), exactly=0)
    first = min(each.over for each in tries) - accepting
    w.seconds("shutting down: served after it accepts again", max(0.0, first), at_most=0.5)
    await pool.close()


async def recovering(w):
    """One session is killed with -9: the server ends all of them, and recovers before it takes new ones."""
    server = w.fresh_server()
    pool = w.pool(server.conninfo(), min_size=SIZE, max_size=SIZE, timeout=10, name="recovers")
    await pool.open(wait=True)
    victim = psycopg.connect(server.conninfo())
    heard = pool.stats().closed.get("hung up", 0)
    os.kill(victim.info.backend_pid, signal.SIGKILL)
    await w.until(lambda: pool.stats().closed.get("hung up", 0) >= heard + SIZE, "all are told")
    trying = w.spawn(accepts(w, server))
    tries = await w.crowd(2 * SIZE, lambda _number: w.borrow(pool, "select 1")).all()
    await trying.join()
    victim.close()
    w.count(f"in recovery: errors of {2 * SIZE} who wait", errors_of(tries), exactly=0)
    first = min(each.over for each in tries) - trying.result
    w.seconds("in recovery: served after it accepts again", max(0.0, first), at_most=0.5)
    await pool.close()


async def accepts(w, server):
    """When it takes sessions."""
    while True:
        try:
            (await w.aside(lambda: psycopg.connect(server.conninfo()))).close()
            return now()
        except psycopg.OperationalError:
            await w.pause(0.01)


# -- suspended, and clocks that jump --------------------------------------------------------------


async def stopped(w):
    """The whole process stands still, and meanwhile the server is restarted, or the network forgets its connections."""
    for what in ("server restarted", "sessions silent"):
        server = w.fresh_server()
        proxy = w.proxy(server.port)
        conninfo = server.conninfo(port=proxy.port)
        child = w.process("things_move", scene="rest", conninfo=conninfo, timeout=TIMEOUT)
        assert child.line() == "resting"
        child.process.send_signal(signal.SIGSTOP)
        if what == "server restarted":
            await w.aside(server.restart)
        else:
            proxy.silence(new=False)
        await w.pause(STOPPED)
        child.process.send_signal(signal.SIGCONT)
        tell(w, f"stopped for {STOPPED:g} s, {what}", await w.aside(child.answer))
        proxy.release()


async def clocks(w):
    child = w.process(
        "things_move",
        module="tests.faults.clocks",
        scene="jump",
        conninfo=w.server().conninfo(),
        timeout=TIMEOUT if w.long else 2.0,
    )
    for what, told in (await w.aside(child.answer)).items():
        if what == "waited":
            name = "wall clock jumps: a timeout of 0.5 s ended after"
            w.seconds(name, told, at_most=0.75)
        else:
            tell(w, what, told)


def tell(w, what, told):
    errors = told["errors"]
    # Who has too little time on a busy machine is told so; anything else is a failure.
    holds = not told["untold"]
    w.figure(f"{what}: errors", errors, goal="0", met=not errors, holds=holds)
    w.count(f"{what}: wrong answers", told["wrong"], exactly=0)
    w.seconds(f"{what}: all {SIZE} served after", told["longest"], at_most=TIMEOUT)


async def worker(w, *, scene, conninfo, timeout):
    return await {"rest": rest, "jump": jump}[scene](w, conninfo, timeout)


async def rest(w, conninfo, timeout):
    """Eight idle connections; it is stopped here, and then all are wanted."""
    pool = await idle_pool(w, conninfo, timeout, ping_after=0.5, max_idle=1.0)
    print("resting", flush=True)
    began = now()
    while now() < began + STOPPED:
        await w.pause(0.05)
    return await asked(w, pool)


async def jump(w, conninfo, timeout):
    """The clocks jump, while borrowers work and while all rests."""
    told: dict[str, Any] = {}
    pool = await idle_pool(w, conninfo, timeout)
    waits = w.crowd(1, lambda _number: waited(w, conninfo))
    this: list[dict[str, Any]] = []
    for seconds in (3600, -7200, 3600):
        AHEAD["wall"] += seconds
        this += [await asked(w, pool) for _ in range(10)]
        await w.pause(0.1)
    told["wall clock jumps"] = {
        name: (max if name == "longest" else sum)(each[name] for each in this) for name in this[0]
    }
    (told["waited"],) = await waits.all()
    words = psycopg.conninfo.conninfo_to_dict(conninfo)
    for what, seconds in (("a minute", 60), ("a night", 8 * 3600)):
        proxy = w.proxy(int(str(words["port"])))
        through = psycopg.conninfo.make_conninfo(conninfo, port=proxy.port)
        pool = await idle_pool(w, through, timeout)
        proxy.silence(new=False)
        AHEAD["boot"] += seconds
        told[f"asleep for {what}, sessions silent"] = await asked(w, pool)
        proxy.release()
    return told


async def waited(w, conninfo):
    """How long a borrower waits whose timeout is half a second."""
    pool = w.pool(conninfo, max_size=1, timeout=0.5, name="full")
    async with pool.connection():
        (this,) = await w.crowd(1, lambda _number: w.borrow(pool)).all()
    return this.took


async def idle_pool(w, conninfo, timeout, **options):
    pool = w.pool(conninfo, max_size=SIZE, timeout=timeout, name="jumps", **options)
    inside, may_end = [], w.runtime.event()

    async def hold(number):
        async with pool.connection():
            inside.append(number)
            if len(inside) == SIZE:
                may_end.set()
            await w.runtime.wait_for(may_end)

    await w.crowd(SIZE, hold).all()
    await w.until(lambda: pool.stats().idle == SIZE, "all are idle")
    return pool


async def asked(w, pool):
    """Eight borrowers at once, each with a question of its own."""
    tries = await w.crowd(SIZE, lambda number: w.borrow(pool, f"select {number}")).all()
    return {
        "errors": errors_of(tries),
        "untold": sum(not (t.good or isinstance(t.error, PenstockError)) for t in tries),
        "wrong": sum(each.good and each.answer != [(n,)] for n, each in enumerate(tries)),
        "longest": max(each.took for each in tries),
    }
