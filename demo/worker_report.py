"""How each worker tells the demo how it is: a small file per process, replaced ten times a second.

Files, because a question over HTTP reaches whichever worker happens to take it, and one that is
busy or dead could not answer. When nobody is left to read them, because the demo was killed without
a chance to clean up, the workers see that here, by a pipe whose other end it held, and end gunicorn.

It must not know how any of it is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INTERVAL = 0.1

#: How many reports `late` looks back: 3 s.
LATELY = 30


@dataclass(frozen=True, slots=True)
class Held:
    """A connection that somebody holds.

    Attributes:
        backend: the pid of its server process.
        seconds: since when.
        by: the request.
        thread: the thread's name.
        place: where that thread is now: file, line, function; "" if it is not running any more.
        activity: what the session is doing, as far as the driver knows.
    """

    backend: int
    seconds: float
    by: str
    thread: str
    place: str
    activity: str


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker at one moment (`at`, by `time.monotonic`); waits in seconds.

    `late` is how long, at most, the reporting thread waited for its turn lately: as long may any other
    thread of that worker have waited, a pool's that listens among them.
    """

    at: float
    pid: int
    idle: int
    in_use: int
    waiting: int
    served: int
    wait_p50: float
    wait_p99: float
    held: tuple[Held, ...] = ()
    late: float = 0.0

    @classmethod
    def from_json(cls, text: str) -> WorkerReport:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        held = tuple(Held(**each) for each in fields.pop("held"))
        return cls(**fields, held=held)

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps(asdict(self))


def report_from_each_worker(
    folder: Path, lifeline: int, measure: Callable[[], WorkerReport], *, before_fork: bool
) -> None:
    """Start a thread that reports: here, or, when this is the master, in each worker it forks.

    Args:
        folder: where the reports are put.
        lifeline: the end of a pipe; its other end closes with the demo, however that ends.
        measure: how this worker is.
        before_fork: whether this is the master.
    """

    def start() -> None:
        target, arguments = _keep_reporting, (folder, lifeline, measure)
        threading.Thread(target=target, args=arguments, name="report", daemon=True).start()

    if before_fork:
        os.register_at_fork(after_in_child=start)
    else:
        start()


def _keep_reporting(folder: Path, lifeline: int, measure: Callable[[], WorkerReport]) -> None:
    file = folder / f"{os.getpid()}.json"
    master = os.getppid()
    late: deque[float] = deque(maxlen=LATELY)
    due = time.monotonic() + INTERVAL
    while not select.select([lifeline], [], [], INTERVAL)[0]:
        late.append(time.monotonic() - due)
        unfinished = file.with_suffix(".new")
        unfinished.write_text(replace(measure(), late=max(late)).to_json())
        due = time.monotonic() + INTERVAL
        unfinished.replace(file)  # a reader sees the old report or the new one, never half of one
    # Another worker may have ended it already; our parent is then somebody else's process.
    if os.getppid() == master:
        with contextlib.suppress(ProcessLookupError):
            os.kill(master, signal.SIGTERM)


def read_reports(folder: Path) -> list[WorkerReport]:
    """The last report of each worker that is alive."""
    files = sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    return [WorkerReport.from_json(file.read_text()) for file in files if _alive(int(file.stem))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
