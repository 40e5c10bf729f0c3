"""`python -m tests.soak`, which is `make soak`: every combination in a process of its own, two at a time.

Its one job: start the cells, show what they tell, sum it up, and end all of it, also after Ctrl-C: each cell has
a folder of its own for temporary files, which must be empty when it has ended. Exit status 1 if a
step failed; what to type to see it again is told with it.

It must not know: what a step does. `_lock` guards the totals; a thread per process that is at work holds it for
additions only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo.interruption import InterruptedBySignal, Interruption
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.faults.stage import COMBINATIONS, ROOT
from tests.faults.table import missing
from tests.soak.faults import FAULTS

#: Seconds that a cell may take beyond its time: the step that it is in, and the price of a failure.
BEYOND = 240.0
#: Seconds for servers and proxies to end when their cell was killed.
GONE = 20.0


class Soak:
    """One run.

    Attributes:
        failed: a line per failure.
        steps, seconds, totals: per combination.
    """

    def __init__(self, asked: argparse.Namespace, console: Console) -> None:
        self.asked = asked
        self.console = console
        self.failed: list[str] = []
        self.faults: Counter[str] = Counter()
        self.errors: dict[str, Counter[str]] = {}
        self.totals: dict[str, Counter[str]] = {}
        self.slowest: dict[str, float] = {}
        self.over = False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def play(self, name: str, seconds: float) -> None:
        """One combination, to its end or to that of the run."""
        if self.over:
            return
        self.totals[name], self.errors[name], self.slowest[name] = Counter(), Counter(), 0.0
        with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
            process = self._started(name, seconds, folder)
            stop = threading.Timer(seconds + BEYOND, process.kill)
            stop.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    self._told(name, json.loads(line))
                if process.wait() != 0 and not self.over:
                    said = Path(folder, "stderr").read_text(encoding="utf-8", errors="replace")
                    self._fail(name, f"its process ended with {process.returncode}", [said])
            finally:
                stop.cancel()
                self._running.discard(process)
                if left := what_is_left(folder):
                    self._fail(name, f"left behind: {left}", [])

    def _started(self, name: str, seconds: float, folder: str) -> subprocess.Popen[str]:
        words = [name, str(self.asked.seed), str(seconds), str(self.asked.first)]
        with Path(folder, "stderr").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.cell", *words, *self.asked.faults],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
                    "TMPDIR": folder,
                },
                start_new_session=True,  # Ctrl-C is this process's
            )
        self._running.add(process)
        if self.over:
            process.kill()
        return process

    def end(self) -> None:
        """Kill what is running; whatever that has started ends with it."""
        self.over = True
        for process in list(self._running):
            process.kill()

    # -- what is shown -----------------------------------------------------------------------------

    def _told(self, name: str, told: dict[str, Any]) -> None:
        with self._lock:
            totals = self.totals[name]
            for key in ("queries", "done", "never", "unknown", "checks"):
                totals[key] += told.get(key, 0)
            totals["steps"] += "faults" in told
            totals["seconds"] += int(1000 * told.get("seconds", 0.0))
            self.faults.update(told.get("faults", ()))
            self.errors[name].update(told.get("errors", {}))
            self.slowest[name] = max(self.slowest[name], told.get("served", 0.0))
        if "faults" in told and not self.asked.quiet:
            self._line(name, told)
        if "failed" in told:
            self._fail(name, told["failed"], told["story"], told["step"])

    def _line(self, name: str, told: dict[str, Any]) -> None:
        self.console.print(
            f"{name:16} {told['step']:4}  {' + '.join(told['faults']):44} "
            f"{told['borrowers']:4} borrowers {told['queries']:6} queries {told['done']:5} done "
            f"{sum(told['errors'].values()):5} errors  served again {told['served']:.2f} s",
            style="bold red" if "failed" in told else None,
            highlight=False,
        )

    def _fail(self, name: str, why: str, story: list[str], step: int = 0) -> None:
        again = f"make soak SEED={self.asked.seed} ARGS='--with {name}"
        self.failed.append(f"{name}: {why}")
        self.console.print(f"[bold red]{name} failed[/]", *map(escape, [why, *story]), sep="\n  ")
        self.console.print(f"  again: {again}{f' --first {step}' if step else ''}'")

    def summary(self, seconds: float) -> None:
        """What was done, and what came of it."""
        table = Table(title=f"soak, seed {self.asked.seed}, {seconds / 60:.1f} minutes")
        for column in (
            *("", "steps", "minutes", "queries", "acknowledged", "failed", "unknown", "checks"),
            "slowest service after healing",
        ):
            table.add_column(column, justify="right" if column else "left")
        for name, totals in self.totals.items():
            table.add_row(
                name,
                *(f"{totals['steps']:,}", f"{totals['seconds'] / 60_000:.1f}"),
                *(f"{totals[key]:,}" for key in ("queries", "done", "never", "unknown", "checks")),
                f"{self.slowest[name]:.2f} s",
            )
        self.console.print(table)
        times = ", ".join(f"{fault} {number}" for fault, number in sorted(self.faults.items()))
        self.console.print(f"{self.faults.total():,} faults: {times}", highlight=False)
        for name, errors in self.errors.items():
            told = ", ".join(f"{error} {number:,}" for error, number in errors.most_common())
            self.console.print(f"errors, {name}: {told or 'none'}", highlight=False)
        good = "nothing lost, nothing wrong, nothing torn, nothing twice"
        self.console.print(f"{len(self.failed)} failed" if self.failed else good, style="bold")


def names_in(folder: str) -> list[str]:
    return sorted(each.name for each in Path(folder).iterdir() if each.name != "stderr")


def what_is_left(folder: str) -> list[str]:
    """Files of servers that have not ended in time; they delete their own."""
    deadline = time.monotonic() + GONE
    while (left := names_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="all faults, at random, and nothing may be wrong"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of it (600)")
    parser.add_argument("--seed", default=None, help="repeats a run")
    parser.add_argument("--with", dest="names", action="append", choices=COMBINATIONS)
    parser.add_argument("--jobs", type=int, default=2, help="combinations at a time (2)")
    parser.add_argument("--first", type=int, default=1, help="begin with this step")
    parser.add_argument(
        "--fault", dest="faults", action="append", default=[], choices=FAULTS, metavar="FAULT",
        help="play only this one (or these): " + ", ".join(FAULTS),
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="only the summary")
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    asked.seed = asked.seed or random.SystemRandom().randrange(1 << 32)
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True)
    console.print(f"seed {asked.seed} (again: make soak SEED={asked.seed})")
    names = asked.names or list(COMBINATIONS)
    for name in list(names):
        if absent := missing(name):
            console.print(f"{name}: {', '.join(absent)} is not installed")
            names.remove(name)
    rounds = -(-len(names) // asked.jobs)
    soak, began = Soak(asked, console), time.monotonic()
    interrupted = False
    with ThreadPoolExecutor(asked.jobs) as threads, Interruption() as interruption:
        cells = [threads.submit(soak.play, name, asked.seconds / rounds) for name in names]
        try:
            while not all(cell.done() for cell in cells):
                interruption.wait(0.1)
        except InterruptedBySignal:
            interrupted = True
        finally:
            soak.end()
    for cell in cells:
        cell.result()
    soak.summary(time.monotonic() - began)
    return 130 if interrupted else 1 if soak.failed else 0


if __name__ == "__main__":
    sys.exit(main())
