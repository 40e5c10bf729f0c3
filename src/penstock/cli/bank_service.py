"""The bank: a plain Flask service that reads balances and transfers money (TPC-B).

Every answer carries what was asked (the nonce, the transfer's id) back *through the database*, so that
rows meant for another request show. It must not know which pool it uses, who asks, or what will
be done to it.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from penstock.cli.bank_pools import NoConnectionError, Till, open_pool
from penstock.cli.worker_report import WorkerReport, report_from_each_worker

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

# The names by which gunicorn_process hands its settings down.
POOL, CONNINFO, REPORTS, LIFELINE, PRELOAD = (
    f"PENSTOCK_DEMO_{name}" for name in ("POOL", "CONNINFO", "REPORTS", "LIFELINE", "PRELOAD")
)

BALANCE = "select %s::text, aid, abalance from pgbench_accounts where aid = %s"

TRANSFER = (
    "update pgbench_accounts set abalance = abalance + %(delta)s where aid = %(aid)s",
    "update pgbench_tellers set tbalance = tbalance + %(delta)s where tid = %(tid)s",
    "update pgbench_branches set bbalance = bbalance + %(delta)s where bid = %(bid)s",
    """insert into pgbench_history (tid, bid, aid, delta, mtime, filler)
       values (%(tid)s, %(bid)s, %(aid)s, %(delta)s, current_timestamp, %(id)s)""",
    "select %(nonce)s::text, %(id)s::text, abalance from pgbench_accounts where aid = %(aid)s",
)


def create_app() -> Flask:
    """Make the service; gunicorn calls this in each worker, or with --preload once in the master."""
    app = Flask("bank")
    till = open_pool(os.environ[POOL], os.environ[CONNINFO])
    # Many an application reads a table while it is loaded. With --preload this uses the pool in
    # the master, and every worker inherits what it has open.
    app.config["BRANCHES"] = count_branches(till)
    served = Served()

    @app.after_request
    def mark(response: Response) -> Response:
        served.count(response)
        response.headers["X-Worker"] = str(os.getpid())
        return response

    def measure() -> WorkerReport:
        now, pid = time.monotonic(), os.getpid()
        return WorkerReport(now, pid, *till.figures(), served.total, *till.wait_percentiles())

    add_routes(app, till)
    app.add_url_rule("/stats", view_func=lambda: jsonify(asdict(measure())))
    app.register_error_handler(Exception, lambda error: explain(error, till))
    report_from_each_worker(
        Path(os.environ[REPORTS]),
        int(os.environ[LIFELINE]),
        measure,
        before_fork=os.environ[PRELOAD] == "yes",
    )
    return app


class Served:
    """Counts the answers that were no errors."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def count(self, response: Response) -> None:
        """Count one answer."""
        if response.status_code < 400:
            with self._lock:
                self.total += 1


def count_branches(till: Till) -> int:
    """How many branches there are."""
    with till.connection() as conn, conn.cursor() as cursor:
        cursor.execute("select count(*) from pgbench_branches")
        return int(cursor.fetchone()[0])


def add_routes(app: Flask, till: Till) -> None:
    """What the bank can be asked."""

    @app.get("/balance/<int:aid>")
    def balance(aid: int) -> ResponseReturnValue:
        with till.connection() as conn, conn.cursor() as cursor:
            cursor.execute(BALANCE, (request.args["nonce"], aid))
            nonce, account, amount = cursor.fetchone()
        return jsonify(nonce=nonce, aid=account, balance=amount)

    @app.post("/transfer")
    def transfer() -> ResponseReturnValue:
        order: dict[str, Any] = request.get_json()
        with till.connection() as conn, conn.cursor() as cursor:
            for statement in TRANSFER:
                cursor.execute(statement, order)
            nonce, made, amount = cursor.fetchone()
        return jsonify(nonce=nonce, id=made, balance=amount)


def explain(error: Exception, till: Till) -> ResponseReturnValue:
    """503 if the pool gave no connection, 500 if the one it gave failed, and which one that was."""
    if isinstance(error, HTTPException):
        return error
    lend = till.last_lend()
    return jsonify(
        error=type(error).__name__,
        text=str(error).strip(),
        backend=lend.backend if lend else None,
        lent_at=lend.at if lend else None,
    ), 503 if isinstance(error, NoConnectionError) else 500
