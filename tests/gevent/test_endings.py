"""A process on gevent ends: soon, quietly, whatever its pools were doing."""

from __future__ import annotations

import pytest

from tests.gevent import conftest

WAYS = (
    "unclosed",
    "lent",
    "in_a_greenlet",
    "closed_at_exit",
    "joined",
    "interrupted",
    "garbage",
    "server_down",
    "borrowed_late",
)
SAYS = {"joined": "2\n", "interrupted": "interrupted\n", "borrowed_late": "ServerUnavailable\n"}


@pytest.mark.parametrize(
    ("way", "driver"),
    [*((way, "psycopg") for way in WAYS), ("joined", "psycopg2"), ("in_a_greenlet", "psycopg2")],
)
def test_a_process_ends_and_says_nothing(server, way, driver):
    """Until then whoever keeps the hub alive would: for max_lifetime, or while an outage lasts."""
    done = conftest.run_child(
        "-m", "tests.gevent.endings", way, driver, given=server.conninfo(), patience=30.0
    )
    said = [line for line in done.stderr.splitlines() if "cannot open a connection" not in line]
    assert not said
    assert done.stdout == SAYS.get(way, "")
