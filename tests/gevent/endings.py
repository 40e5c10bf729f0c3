"""Processes on gevent that end: `python -m tests.gevent.endings WAY DRIVER`, the conninfo on stdin."""

# ruff: noqa: E402  patching comes first

from gevent import monkey

monkey.patch_all()

import atexit
import os
import signal
import sys

import gevent

from penstock import ConnectionPool, PenstockError


def used_pool(dsn, driver, **options):
    pool = ConnectionPool(dsn, driver=driver, min_size=2, max_size=3, **options)
    pool.open(wait=True)
    return pool


def unclosed(dsn, driver):
    globals()["pool"] = used_pool(dsn, driver)


def lent(dsn, driver):
    globals()["lease"] = used_pool(dsn, driver).connection()
    globals()["lease"].__enter__()


def in_a_greenlet(dsn, driver):
    pool = used_pool(dsn, driver)

    def hold():
        with pool.connection() as conn:
            conn.cursor().execute("select pg_sleep(100)")

    globals()["holders"] = [gevent.spawn(hold) for _ in range(3)]
    gevent.sleep(0.05)


def closed_at_exit(dsn, driver):
    atexit.register(used_pool(dsn, driver).close)


def joined(dsn, driver):
    """Nothing of ours keeps the hub."""
    pool = used_pool(dsn, driver, max_lifetime=3600)
    gevent.get_hub().join()
    print(pool.stats().size)


def interrupted(dsn, driver):
    pool = used_pool(dsn, driver)
    gevent.get_hub().exception_stream = None  # it tells of interrupts that strike it
    gevent.spawn_later(0.05, os.kill, os.getpid(), signal.SIGINT)
    try:
        with pool.connection() as conn:
            conn.cursor().execute("select pg_sleep(100)")
    except KeyboardInterrupt:
        print("interrupted")


def garbage(dsn, driver):
    """A pool that nobody holds is gone, with its sessions, and its keeper says nothing."""
    pool = used_pool(dsn, driver)
    del pool
    gevent.sleep(0.01)


def server_down(dsn, driver):
    """An outage: the keeper tries again and again, and keeps nobody."""
    pool = ConnectionPool("host=127.0.0.1 port=1 user=x", driver=driver, min_size=2)
    pool.open()
    gevent.sleep(0.1)
    gevent.get_hub().join()


class Late:
    """Borrows when the interpreter takes its modules apart: nobody will open one more connection."""

    def __init__(self, pool):
        self.pool = pool
        self.leases = [pool.connection() for _ in range(2)]
        for lease in self.leases:
            lease.__enter__()

    def __del__(self):
        try:
            self.pool.execute("select 1")
        except PenstockError as error:
            os.write(1, f"{type(error).__name__}\n".encode())


def borrowed_late(dsn, driver):
    globals()["late"] = Late(used_pool(dsn, driver, timeout=300))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.stdin.read(), sys.argv[2])
