"""How each worker tells the demo how it is: a small file per process, replaced four times a second.

Files, because a question over HTTP reaches whichever worker happens to take it, and one that is
busy or dead could not answer. It must not know what a pool or a request is.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INTERVAL = 0.25


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker at one moment; waits in seconds."""

    pid: int
    idle: int
    in_use: int
    waiting: int
    served: int
    wait_p50: float
    wait_p99: float


def report_from_each_worker(
    folder: Path, measure: Callable[[], WorkerReport], *, before_fork: bool
) -> None:
    """Start a thread that reports: here, or, when this is the master, in each worker it forks."""
    if before_fork:
        os.register_at_fork(after_in_child=lambda: _start(folder, measure))
    else:
        _start(folder, measure)


def _start(folder: Path, measure: Callable[[], WorkerReport]) -> None:
    threading.Thread(target=_keep_reporting, args=(folder, measure), daemon=True).start()


def _keep_reporting(folder: Path, measure: Callable[[], WorkerReport]) -> None:
    file = folder / f"{os.getpid()}.json"
    pause = threading.Event()
    while folder.is_dir():
        unfinished = file.with_suffix(".new")
        unfinished.write_text(json.dumps(asdict(measure())))
        unfinished.replace(file)  # a reader sees the old report or the new one, never half of one
        pause.wait(INTERVAL)


def read_reports(folder: Path) -> list[WorkerReport]:
    """The last report of each worker that is alive."""
    files = sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    return [
        WorkerReport(**json.loads(file.read_text())) for file in files if _alive(int(file.stem))
    ]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
