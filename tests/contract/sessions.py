"""A driver of psycopg's shape without a server, which an interrupt cannot break.

One job: sessions that tell when they are lent to two, and links for both plain leases (`Lease`, and
`PgconnLease` where `shaped`). Where `penstock.testing` has locks and waits as a server has, this has
none: what is broken after an interrupt was broken by penstock. It must not know: pools.
"""

from __future__ import annotations

import itertools

from penstock.drivers import Activity, Diagnosis, Reply


class DoubleUse(AssertionError):
    """A session was lent to two at once."""


class NotLent(Exception):
    """A connection was used after it was given back."""


class Handle:
    """What psycopg's PGconn is for a lease: two numbers, 0 for idle."""

    def __init__(self):
        self.transaction_status = 0
        self.pipeline_status = 0


DEAD = Handle()


class Session:
    """What a borrower holds."""

    def __init__(self, number):
        self.number = number
        self.pgconn = DEAD
        self.user = None

    def claim(self):
        """Begin to use it; `check` the claim before the end."""
        self.user = claim = object()
        return claim

    def check(self, claim):
        if self.user is not claim:
            raise DoubleUse(f"session {self.number} was lent to two at once")

    def query(self):
        if self.pgconn is DEAD:
            raise NotLent
        self.pgconn.transaction_status = 2
        return self.number

    def commit(self):
        if self.pgconn is DEAD:
            raise NotLent
        self.pgconn.transaction_status = 0


class Link:
    """One session; see `penstock.drivers.Link`."""

    def __init__(self, sessions, number):
        self.sessions = sessions
        self.number = number
        self.fd = -1
        self.conn = Session(number)
        self.attributes = vars(self.conn)
        self.handle = Handle()
        self.dead = DEAD
        self.touched = set()
        self.ended = False
        self.answers = True

    def lend(self):
        self.attributes["pgconn"] = self.handle

    def park(self):
        self.attributes["pgconn"] = DEAD
        return not (self.handle.transaction_status or self.touched or self.ended)

    def activity(self):
        if self.ended:
            return Activity.BROKEN
        return Activity.IN_TRANSACTION if self.handle.transaction_status else Activity.IDLE

    def prepare(self):
        self.touched.clear()

    def set_autocommit(self, value):
        self.touched.add("autocommit")

    def apply_settings(self, settings):
        self.handle.transaction_status = 2

    def execute(self, query, params=None):
        return Reply(rows=[(self.number,)], rowcount=1, description=None, statusmessage=None)

    def commit(self):
        self.handle.transaction_status = 0

    def tidy(self, seconds):
        self.handle.transaction_status = 0
        self.touched.clear()
        return not self.ended

    def ping(self, seconds):
        return self.answers and not self.ended

    def start_reset(self):
        self.handle.transaction_status = 0
        return not self.ended

    def finish_reset(self, seconds):
        return not self.ended

    def hung_up(self):
        return self.ended

    def close(self):
        self.ended = True
        self.sessions.pop(self.number, None)

    discard = close

    def abandon(self, *, busy):
        self.close()


class Driver:
    """Opens sessions at once; `sessions` are those that are open, by number."""

    name = "sessions"
    operational_error: type[Exception] = OSError
    interface_error: type[Exception] = NotLent

    def __init__(self, *, shaped=True):
        self.pgconn_shaped = shaped
        self.sessions = {}
        self._numbers = itertools.count(1)

    def open(self, recipe, seconds):
        number = next(self._numbers)
        link = self.sessions[number] = Link(self.sessions, number)
        return link

    def diagnose(self, error, recipe, seconds):
        return Diagnosis(sqlstate=None, heals=True, text=str(error))

    def ends_session(self, error, *, read_write):
        return False
