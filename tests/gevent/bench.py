"""What scenes on gevent work with: pools of one driver, statements in that driver's way, waiting."""

import random
import time
from contextlib import contextmanager

from penstock import ConnectionPool

#: How long a scene waits for what must come: a failure's price, never a pass mark.
PATIENCE = 20.0


class Bench:
    """One scene's pools and helpers."""

    def __init__(self, dsn, driver, seed):
        self.dsn = dsn
        self.driver = driver
        self.rng = random.Random(seed)
        self._pools = []

    def make(self, **options):
        given = {"conninfo": self.dsn, "driver": self.driver, "timeout": PATIENCE, **options}
        pool = ConnectionPool(**given)
        self._pools.append(pool)
        return pool

    def close(self):
        for pool in self._pools:
            pool.close(timeout=1.0)

    def ask(self, conn, sql, *values):
        """The first row of the answer."""
        cursor = conn.cursor()
        cursor.execute(sql, values)
        return cursor.fetchone()

    def pid(self, conn):
        return self.ask(conn, "select pg_backend_pid()")[0]

    @contextmanager
    def observer(self):
        """A function that asks over a connection that is in no pool."""
        with self.make().dedicated(autocommit=True) as conn:
            yield lambda sql, *values: self.ask(conn, sql, *values)[0]

    def until(self, condition, what, seconds=PATIENCE):
        import gevent

        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"in vain: {what() if callable(what) else what}"
            gevent.sleep(0.005)

    def assert_whole(self, pool, size):
        """All of the pool's connections can be had at the same time, and work."""
        leases = [pool.connection() for _ in range(size)]
        conns = [lease.__enter__() for lease in leases]
        assert len({self.pid(conn) for conn in conns}) == size
        for lease in leases:
            lease.__exit__(None, None, None)
        self.until(lambda: pool.stats().idle == size, lambda: pool)
        assert pool.stats().in_use == 0, pool
