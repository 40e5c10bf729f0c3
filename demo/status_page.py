"""The status page: what the pools say, what the server says, and who holds what; in a browser.

It is served from the demo's own process: it has to answer when the bank cannot. It must not know how
anything is measured, and shows no text of a statement and nothing that it takes to connect.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from demo.server_sessions import SessionGroup
    from demo.worker_report import WorkerReport

PAGE = Path(__file__).with_name("status.html")

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # Everything the page needs is in it.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; img-src data:; connect-src 'self'",
}


@dataclass(frozen=True, slots=True)
class Observed:
    """What the page is about.

    Attributes:
        title: what the bank runs on.
        service: the address of the bank's own page.
        workers: how the workers are.
        sessions: the server's sessions, or None if it cannot be reached.
    """

    title: str
    service: str
    workers: Callable[[], Sequence[WorkerReport]]
    sessions: Callable[[], Sequence[SessionGroup] | None]

    def as_dict(self) -> dict[str, Any]:
        """All of it at this moment, for JSON."""
        now, sessions = time.monotonic(), self.sessions()
        workers = [asdict(report) for report in self.workers()]
        held = [
            {"worker": worker["pid"], **each} for worker in workers for each in worker.pop("held")
        ]
        for worker in workers:
            worker["age"] = now - worker.pop("at")
        return {
            "title": self.title,
            "service": self.service,
            "workers": workers,
            "held": sorted(held, key=lambda each: each["seconds"], reverse=True),
            "sessions": None if sessions is None else [asdict(group) for group in sessions],
        }


class StatusPage:
    """Serves the page, from entry to exit of the `with` block."""

    def __init__(self, observed: Observed) -> None:
        page = PAGE.read_bytes()

        class Handler(_Handler):
            answers = {  # noqa: RUF012  (never changed)
                "/status": ("text/html; charset=utf-8", lambda: page),
                "/status.json": (
                    "application/json",
                    lambda: json.dumps(observed.as_dict()).encode(),
                ),
            }

        # Only for those on this machine.
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="status page", daemon=True
        )

    @property
    def address(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_port}/status"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)


class _Handler(BaseHTTPRequestHandler):
    answers: dict[str, tuple[str, Callable[[], bytes]]]
    server_version = "penstock"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with the page, its figures, or where the page is."""
        path = self.path.partition("?")[0]
        if path == "/":
            self.send_response(302)
            self.send_header("Location", "/status")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path in self.answers:
            kind, make = self.answers[path]
            self._send(kind, make())
        else:
            self.send_error(404)

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Say nothing: a page that refreshes itself would fill the screen."""
