"""The example's bank as the demo runs it: the same application, measured, over the pool in question.

It puts the till in the place of the example's `db` before anything else of the example is loaded, and
adds to its answers which worker gave them, and to its errors which connection they had. It must not
know who asks, or what will be done to it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import jsonify, request_finished
from werkzeug.exceptions import HTTPException, InternalServerError

from demo.bank_pools import KINDS, flask_app
from demo.example import folder_of_the_bank
from demo.till import NoConnectionError, Till
from demo.worker_report import WorkerReport, report_from_each_worker

if TYPE_CHECKING:
    from flask import Flask, Response
    from flask.typing import ResponseReturnValue

# The names by which the demo hands its settings down.
POOL, SERVICE, REPORTS, LIFELINE, PRELOAD = (
    f"PENSTOCK_DEMO_{name}" for name in ("POOL", "SERVICE", "REPORTS", "LIFELINE", "PRELOAD")
)
CONFIG = "BANK_CONFIG"  # the example's own

SWITCH_INTERVAL = 0.0005
APPLICATIONS = {"connexion": "bank.asgi", "flask": "bank.plain"}


def create_app() -> Any:
    """Make the service; gunicorn calls this in each worker, or with --preload once in the master."""
    # When a connection was lent is to be noted then, and not when ten busy threads have had their turns.
    sys.setswitchinterval(SWITCH_INTERVAL)
    sys.path.insert(0, str(folder_of_the_bank()))
    database: Any = import_module("bank.database")
    till = database.db = Till(KINDS[os.environ[POOL]](database.db))
    application = import_module(APPLICATIONS[os.environ[SERVICE]]).application
    app = flask_app(application)
    # Many an application reads a table while it is loaded. With --preload this uses the pool in
    # the master, and every worker inherits what it has open.
    with app.app_context():
        till.execute("select count(*) from pgbench_branches").fetchone()
    served = Served(app)

    @app.after_request
    def mark(response: Response) -> Response:
        response.headers["X-Worker"] = str(os.getpid())
        return response

    def measure() -> WorkerReport:
        return WorkerReport(
            time.monotonic(),
            os.getpid(),
            *till.figures(),
            served.total,
            *till.wait_percentiles(),
            held=tuple(till.holders()),
        )

    # Connexion has Flask pass errors on, to where nobody knows the connection any more. And Flask's
    # 500, which is what becomes of an error in a commit, is an HTTPException, which are Connexion's.
    app.config["PROPAGATE_EXCEPTIONS"] = False
    for kind in (Exception, InternalServerError):
        app.register_error_handler(kind, lambda error: explain(error, till))
    report_from_each_worker(
        Path(os.environ[REPORTS]),
        int(os.environ[LIFELINE]),
        measure,
        before_fork=os.environ[PRELOAD] == "yes",
    )
    return application


class Served:
    """Counts the answers that were no errors, when all is done that can make errors of them."""

    def __init__(self, app: Flask) -> None:
        self.total = 0
        self._lock = threading.Lock()
        request_finished.connect(self._count, app)

    def _count(self, _app: Flask, response: Response, **_: object) -> None:
        if response.status_code < 400:
            with self._lock:
                self.total += 1


def explain(error: Exception, till: Till) -> ResponseReturnValue:
    """503 if the pool gave no connection, 500 if the one it gave failed, and which one that was."""
    if isinstance(error, InternalServerError) and error.original_exception is not None:
        error = error.original_exception  # type: ignore[assignment]  # of a commit: Flask wraps it
    if isinstance(error, HTTPException):
        return error
    lend = till.last_lend()
    return jsonify(
        error=type(error).__name__,
        text=str(error).strip(),
        backend=lend.backend if lend else None,
        lent_at=lend.at if lend else None,
    ), 503 if isinstance(error, NoConnectionError) else 500
