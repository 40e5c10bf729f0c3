"""The till: stands in the place of `bank.database.db`, and notes who was lent what, when, after what wait.

All pools are measured here, with one ruler, from outside. It must not know which pool it is, nor add
anything to it.

Lock: none. A request's own notes are in its `g`; `_held` is a dict whose single operations are atomic.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flask import g, has_request_context, request

from demo.bank_pools import flask_app
from demo.worker_report import Held
from penstock._pool.reporter import holder_report
from penstock._process.stacks import is_plumbing
from penstock.errors.figures import Hold

if TYPE_CHECKING:
    from types import FrameType

    from demo.bank_pools import Figures, Source

# The server's words for what libpq reports about a session, which both drivers number alike.
ACTIVITIES = {0: "idle", 1: "active", 2: "idle in transaction", 3: "idle in transaction (aborted)"}


class NoConnectionError(Exception):
    """The pool gave none; the pool's own error is the cause."""


class Lend(NamedTuple):
    """Which server process a request was last lent, and when.

    By `time.monotonic`, which is one clock for all processes of a machine.
    """

    backend: int
    at: float


@dataclass(frozen=True, slots=True)
class _Loan:
    conn: Any
    lend: Lend
    by: str
    ident: int


class Till:
    """Gives the bank its connections."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._waits: deque[float] = deque(maxlen=1000)
        self._held: dict[int, _Loan] = {}

    def init_app(self, app: Any) -> None:
        """Have the pool made, and hear of the end of each request."""
        # Teardowns run last registered first: whoever holds nothing any more is struck off after that.
        flask_app(app).teardown_appcontext(self._ended)
        self._source.init_app(app)

    @property
    def conn(self) -> Any:
        """The connection of this request."""
        asked = time.monotonic()
        try:
            conn = self._source.conn
        except Exception as error:
            g.pop("loan", None)
            raise NoConnectionError(f"{type(error).__name__}: {error}") from error
        if "loan" not in g or g.loan.conn is not conn:
            self._note(conn, asked)
        return conn

    def _note(self, conn: Any, asked: float) -> None:
        lent = time.monotonic()
        self._waits.append(lent - asked)
        by = f"{request.method} {request.path}" if has_request_context() else "start"
        lend = Lend(int(conn.info.backend_pid), lent)
        g.loan = _Loan(conn, lend, by, threading.get_ident())
        self._held[id(g._get_current_object())] = g.loan  # noqa: SLF001  (werkzeug's documented name)

    def _ended(self, _error: BaseException | None) -> None:
        self._held.pop(id(g._get_current_object()), None)  # noqa: SLF001

    def execute(self, query: str, params: Any = None) -> Any:
        """Run one statement; the driver's cursor."""
        cursor = self.conn.cursor()
        cursor.execute(query, params)
        return cursor

    def last_lend(self) -> Lend | None:
        """What this request was last lent."""
        return g.loan.lend if "loan" in g else None

    def figures(self) -> Figures:
        """The pool's own word about itself."""
        return self._source.figures()

    def holders(self) -> list[Held]:
        """Who holds what, the longest first."""
        now, tops = time.monotonic(), sys._current_frames()  # noqa: SLF001  (the documented way)
        frames = {ident: _of_the_bank(top) for ident, top in tops.items()}
        loans = sorted(self._held.copy().values(), key=lambda loan: loan.lend.at)
        return [_held(loan, now, frames) for loan in loans]

    def wait_percentiles(self) -> tuple[float, float]:
        """Seconds that half and 99 of 100 of the last thousand borrows took at most."""
        waits = sorted(self._waits.copy())
        if not waits:
            return 0.0, 0.0
        return waits[len(waits) // 2], waits[len(waits) * 99 // 100]


def _of_the_bank(top: FrameType) -> FrameType:
    """The innermost frame that is not the demo's own: what the till does is not what the bank does."""
    frame: FrameType | None = top
    while frame is not None and (
        is_plumbing(frame) or str(frame.f_globals.get("__name__")).startswith("demo.")
    ):
        frame = frame.f_back
    return frame or top


def _held(loan: _Loan, now: float, frames: Any) -> Held:
    seconds = now - loan.lend.at
    found = holder_report([Hold(ident=loan.ident, seconds=seconds)], frames=frames)
    holder = found[0] if found else None
    place = ""
    if holder is not None and holder.file is not None:
        *_, folder, file = ["", *holder.file.split("/")]
        place = f"{folder}/{file}:{holder.line} in {holder.function}"
    try:
        activity = ACTIVITIES.get(int(loan.conn.info.transaction_status), "gone")
    except Exception:  # noqa: BLE001  (it is somebody else's connection, and may be given back by now)
        activity = ""
    thread = "" if holder is None else holder.thread
    return Held(loan.lend.backend, seconds, loan.by, thread, place, activity)
