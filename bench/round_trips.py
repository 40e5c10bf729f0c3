"""How often a borrower waits for the server: counted in libpq's own trace, so no clock is involved.

    python bench/round_trips.py [--json FILE]

Each reply that ends with ReadyForQuery is one round trip.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg_pool
from report import environment, heading, options, save, table

from penstock import ConnectionPool
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable

SELECT = "select 1"


def nothing(pool: Any) -> None:
    with pool.connection():
        pass


def one_statement(pool: Any) -> None:
    with pool.connection() as conn:
        conn.execute(SELECT)


def two_statements(pool: Any) -> None:
    with pool.connection() as conn:
        conn.execute(SELECT)
        conn.execute(SELECT)


def execute(pool: Any) -> None:
    pool.execute(SELECT)


def count(pool: Any, action: Callable[[Any], None]) -> int:
    """Round trips of `action` on the pool's only connection."""
    with pool.connection() as conn:
        handle = conn.pgconn
    with tempfile.TemporaryFile() as trace:
        handle.trace(trace.fileno())
        try:
            action(pool)
        finally:
            handle.untrace()
        trace.seek(0)
        return trace.read().count(b"\tReadyForQuery")


def main() -> None:
    asked = options("round trips per borrow").parse_args()
    with Server() as server, ExitStack() as closing:
        dsn = server.conninfo()
        size: dict[str, Any] = {"min_size": 1, "max_size": 1}
        found: dict[str, Any] = {
            "penstock": ConnectionPool(dsn, **size),
            "psycopg_pool": psycopg_pool.ConnectionPool(dsn, open=False, **size),
            "psycopg_pool, check=check_connection": psycopg_pool.ConnectionPool(
                dsn, open=False, check=psycopg_pool.ConnectionPool.check_connection, **size
            ),
        }
        figures: dict[str, dict[str, int]] = {}
        for name, pool in found.items():
            closing.enter_context(pool)
            actions = [nothing, one_statement, two_statements]
            actions += [execute] if hasattr(pool, "execute") else []
            figures[name] = {action.__name__: count(pool, action) for action in actions}
    around = environment()
    heading("round trips", around)
    head = ["", "borrow + return", "with, 1 statement", "with, 2 statements", "pool.execute()"]
    columns = ("nothing", "one_statement", "two_statements", "execute")
    rows = [[name, *(str(one.get(key, "-")) for key in columns)] for name, one in figures.items()]
    table(head, rows)
    save(asked.json, "round_trips", around, figures)


if __name__ == "__main__":
    main()
