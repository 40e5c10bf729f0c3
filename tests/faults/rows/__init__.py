"""One file per row of the fault table.

Each has a `TITLE`, and `play(w)`: a coroutine function that makes the fault happen on a
`tests.faults.stage.Stage` and tells figures. Rows that need processes have a `worker(w, ...)`, too, which
runs in them. They are written for all runtimes and drivers; `UNFIT` says which they are not for, and why.
"""

from __future__ import annotations

import importlib

ROWS = (
    "restart_while_idle",
    "killed_under_load",
    "outage",
    "cannot_connect",
    "frozen_host",
    "few_connections",
    "fork",
    "session_state",
    "interrupts",
    "stampede",
    "killed_worker",
    "crowded_server",
    "failover",
    "things_move",
    "borrowers_misbehave",
    "closing",
)

#: Those that `make test` plays, with threads and psycopg 3 and for a few seconds. Most others have tests of their
#: own beside this folder (test_restart.py, test_errors_explain.py); the failover takes too long.
TESTED = (
    "killed_under_load",
    "frozen_host",
    "few_connections",
    "fork",
    "session_state",
    "interrupts",
    "stampede",
    "killed_worker",
    "crowded_server",
    "things_move",
    "closing",
)


def load():
    """The rows by name, in the table's order."""
    return {name: importlib.import_module(f"tests.faults.rows.{name}") for name in ROWS}
