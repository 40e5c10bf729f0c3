"""Puts right what drivers decided before gevent patched, once a process turns out to run on gevent.

One job: for each driver in use, have its library wait in gevent's hub and not in the system.

It must not know: whether the process runs on gevent (whoever calls does), pools, links. Repeatable, and
each step is one store: whatever cuts it off, the next call does the rest.
"""

from __future__ import annotations

import sys


def put_right() -> None:
    """Make waits of the libraries whose drivers are in use cooperative; cheap when they are."""
    if "penstock._drivers.psycopg3.driver" in sys.modules:
        from penstock._drivers.psycopg3 import gevent_waits as of_psycopg3  # noqa: PLC0415  imports psycopg

        of_psycopg3.put_right()
    if "penstock._drivers.psycopg2.driver" in sys.modules:
        from penstock._drivers.psycopg2 import gevent_waits as of_psycopg2  # noqa: PLC0415  imports psycopg2

        of_psycopg2.put_right()
