"""Nine ways in which no connection can be opened.

What cannot heal is told at once, with one attempt and one more that diagnoses it (a failed connect of libpq
carries no code). What can is tried again within the borrower's deadline, and he is served.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import psycopg
from tests.faults.stage import now

from penstock import ServerUnavailable
from pytest_penstock.postgres import HBA, TlsUnavailable

TITLE = "cannot connect: what cannot heal, and what can"
HEALS_AFTER = 0.7


async def play(w):
    server = w.fresh_server(hba=("host all secretive,lonely 127.0.0.1/32 scram-sha-256", *HBA))
    server.execute("create role secretive login password 'right'")
    server.execute("create role lonely login password 'right' connection limit 1")
    proxy = w.proxy(server.port)

    hopeless = {
        "wrong password": server.conninfo(user="secretive", password="wrong", port=proxy.port),
        "no such database": server.conninfo(dbname="nowhere", port=proxy.port),
        "no such role": server.conninfo(user="nobody", port=proxy.port),
        "unknown host": server.conninfo(host="no-such-host.invalid"),
    }
    for what, conninfo in hopeless.items():
        await cannot_heal(w, what, conninfo, proxy)
    await bad_certificate(w)

    proxy.refuse()
    known = {"user": "secretive", "password": "right"}
    await heals(w, "refused", server.conninfo(port=proxy.port, **known), proxy.accept)
    lonely = server.conninfo(user="lonely", password="right")
    other = psycopg.connect(lonely)
    await heals(w, "role's connection limit", lonely, other.close)
    await starting_up(w)


async def cannot_heal(w, what, conninfo, proxy):
    pool = w.pool(conninfo, min_size=3, max_size=5, timeout=5, name="hopeless")
    before = len(proxy.arrivals())
    tries = [await w.borrow(pool)]
    tries += await w.crowd(4, lambda _number: w.borrow(pool)).all()
    named = [each.error for each in tries if isinstance(each.error, ServerUnavailable)]
    named = [error for error in named if error.__cause__ and not error.heals]
    w.seconds(f"{what}: told after", max(each.took for each in tries), at_most=0.5, fails_at=4.5)
    w.count(f"{what}: errors without the cause", len(tries) - len(named), exactly=0)
    if what == "unknown host":
        return
    attempts = len(proxy.arrivals()) - before
    w.figure(
        f"{what}: connects for 5 borrowers",
        attempts,
        goal="<= 2",
        met=attempts <= 2,
        holds=attempts <= 6,  # who is so slow that a second passes sees the next attempt, too
    )


async def bad_certificate(w):
    try:
        server = w.fresh_server(tls=True)
    except TlsUnavailable:
        return
    other = server.folder / "another.crt"
    await w.aside(lambda: make_certificate(other))
    proxy = w.proxy(server.port)
    conninfo = server.conninfo(over="tls", sslrootcert=other, hostaddr=None, port=proxy.port)
    await cannot_heal(w, "bad certificate", conninfo, proxy)


def make_certificate(path):
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-keyout", path.with_suffix(".key"), "-out", path),
        ],
        executable=shutil.which("openssl"),
        capture_output=True,
        check=True,
    )


async def heals(w, what, conninfo, mends):
    """It is broken, and heals after a while: when is who waits served?"""
    pool = w.pool(conninfo, timeout=5, name="heals")

    async def later():
        await w.pause(HEALS_AFTER)
        await w.aside(mends)
        return now()

    mending = w.spawn(later())
    this = await w.borrow(pool, "select 1")
    await mending.join()
    w.count(f"{what}: errors of who waits", int(not this.good), exactly=0)
    waited = max(0.0, this.over - mending.result)
    w.seconds(f"{what}: served after it healed", waited, at_most=1.2)
    await pool.close()


async def starting_up(w):
    """A standby that takes no queries says so to everyone, until it is promoted."""
    primary = w.fresh_server(hba=("host all secretive 127.0.0.1/32 scram-sha-256", *HBA))
    primary.execute("create role secretive login password 'right'")
    standby = w.owns(await w.aside(primary.standby))
    await w.aside(standby.stop)
    conninfo = standby.conninfo(user="secretive", password="right")
    with (standby.data_dir / "postgresql.conf").open("a") as file:
        file.write("hot_standby = off\n")

    async def start():
        await w.aside(standby.start)  # it returns when queries are taken

    starting = w.spawn(start())
    pid_file = standby.data_dir / "postmaster.pid"
    await w.until(lambda: pid_file.exists() and "standby" in pid_file.read_text(), "it replays")

    def promote():
        (standby.data_dir / "promote").touch()
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGUSR1)
        while "ready" not in pid_file.read_text():
            time.sleep(0.005)

    pool = w.pool(conninfo, timeout=0.5, name="starting")
    this = await w.borrow(pool)
    named = isinstance(this.error, ServerUnavailable) and this.error.sqlstate == "57P03"
    w.count("starting up: errors without the cause", int(not named), exactly=0)
    await heals(w, "starting up", conninfo, promote)
    await starting.join()
