"""What a review of the gevent runtime found, and must not come back."""

from __future__ import annotations

import pytest

from tests.gevent import conftest

HALF_PATCHED = """
import os, sys
from gevent import monkey
monkey.patch_all(thread=False)
import gevent
from penstock import ConnectionPool

pool = ConnectionPool(sys.stdin.read(), driver=sys.argv[1], max_size=2, timeout=5.0)

def work():
    with pool.connection() as conn:
        conn.cursor().execute("select pg_sleep(0.01)")

greenlets = [gevent.spawn(work) for _ in range(10)]
gevent.joinall(greenlets, raise_error=True)

def descriptors():
    for _ in range(5):
        pool.drain()
        work()
    return len(os.listdir("/proc/self/fd"))

few = min(descriptors(), descriptors())
many = max(descriptors() for _ in range(4))
print("ok" if many <= few + 8 else f"{few} descriptors became {many}")
pool.close()
"""


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_where_threads_stay_threads_a_greenlet_in_line_stops_no_other(server, driver):
    """The connection that it waits for is one of theirs; and each thread's hub is closed with it."""
    done = conftest.run_child(
        "-c", HALF_PATCHED, driver, given=server.conninfo(over="unix"), patience=60.0
    )
    assert done.stdout == "ok\n"
