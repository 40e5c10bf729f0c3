"""What people see: live tables at a terminal, plain lines elsewhere, and the account at the end.

It must not know how anything is measured or judged; it is handed figures.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from demo.load import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from demo.server_sessions import SessionGroup
    from demo.verdict import ActResult
    from demo.worker_report import WorkerReport

MODES = {False: "without --preload", True: "with --preload"}


class Screen:
    """The demo's one place for output."""

    def __init__(self, acts: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._acts = acts
        self._results: list[ActResult] = []
        self._reports: Callable[[], Sequence[WorkerReport]] = list
        self._groups: Callable[[], Sequence[SessionGroup] | None] = list
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("starting", total=float(acts))
        self._act_begun = 0.0
        self._act_seconds = 0.0
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=4,
            transient=True,  # the account at the end takes its place
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unwatch()
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line, now."""
        self._console.print(text, soft_wrap=True, markup=False)

    def watch(
        self,
        reports: Callable[[], Sequence[WorkerReport]],
        groups: Callable[[], Sequence[SessionGroup] | None],
    ) -> None:
        """Show these workers and sessions from now on."""
        self._reports, self._groups = reports, groups

    def unwatch(self) -> None:
        """They are about to go."""
        self._reports, self._groups = list, list

    def begin(self, title: str, *, preload: bool, seconds: float) -> None:
        """An act begins, and will last about so long."""
        self._act_begun, self._act_seconds = time.monotonic(), seconds
        self._progress.update(self._task, description=f"{MODES[preload]}: {title}")

    def finish(self, result: ActResult) -> None:
        """An act is over."""
        self._results.append(result)
        self._act_seconds = 0.0
        if not self._console.is_terminal:
            self.say(_one_line(len(self._results), self._acts, result))

    def show_workers(self) -> None:
        """The workers and sessions once, for those who have no live table."""
        if not self._console.is_terminal:
            self._console.print(_workers_table(self._reports()))
            self._console.print(_sessions_table(self._groups()))

    def conclude(self, summary: str) -> None:
        """The account of all acts, and the one line that matters."""
        self._console.print(_results_table(self._results))
        for result in self._results:
            for complaint in result.complaints:
                self.say(f"! {MODES[result.preload]}, {result.title}: {complaint}")
        self.say(summary)

    def _render(self) -> Group:
        self._progress.update(self._task, completed=len(self._results) + self._share_of_act())
        return Group(
            self._progress,
            _workers_table(self._reports()),
            _sessions_table(self._groups()),
            _results_table(self._results),
        )

    def _share_of_act(self) -> float:
        if not self._act_seconds:
            return 0.0
        return min(1.0, (time.monotonic() - self._act_begun) / self._act_seconds)


def summary_line(results: Sequence[ActResult]) -> str:
    """The whole demo in one line."""
    served, failed, cut, wrong = (
        sum(result.count(outcome) for result in results)
        for outcome in (Outcome.SERVED, Outcome.FAILED, Outcome.CUT, Outcome.WRONG)
    )
    lost = sum(result.findings.lost for result in results)
    sound = sum(result.findings.adds_up and not result.findings.lost for result in results)
    excused = all(result.ok for result in results)
    why = " (all held a session that ended)" if failed and excused else ""
    dead = f", {cut:,} cut off by the killed worker" if cut and excused else f", {cut:,} cut off"
    return (
        f"penstock demo: {served:,} served, {failed:,} failed{why}{dead if cut else ''},"
        f" {wrong:,} wrong, {lost:,} lost; money adds up in {sound} of {len(results)} acts"
    )


def _one_line(number: int, acts: int, result: ActResult) -> str:
    counts = ", ".join(f"{result.count(outcome):,} {outcome.value}" for outcome in Outcome)
    verdict = "ok" if result.ok else "RED"
    note = f" ({result.note})" if result.note else ""
    return (
        f"act {number}/{acts}, {MODES[result.preload]}: {result.title}: {counts},"
        f" {result.findings.lost:,} lost; money: {result.findings.describe()};"
        f" longest silence {result.silence:.2f} s{note}: {verdict}"
    )


def _table(title: str, *columns: str) -> Table:
    """A table whose columns hold figures, but for the first."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _workers_table(reports: Sequence[WorkerReport]) -> Table:
    table = _table("workers", "pid", "idle", "in use", "waiting", "served", "wait p50 ms", "p99 ms")
    for report in reports:
        table.add_row(
            str(report.pid),
            str(report.idle),
            str(report.in_use),
            str(report.waiting),
            f"{report.served:,}",
            f"{report.wait_p50 * 1000:.2f}",
            f"{report.wait_p99 * 1000:.2f}",
        )
    return table


def _sessions_table(groups: Sequence[SessionGroup] | None) -> Table:
    table = _table("pg_stat_activity", "application_name", "sessions", "idle", "at work")
    if groups is None:
        table.add_row("(the database is away)")
    for group in groups or ():
        table.add_row(group.name, str(group.idle + group.busy), str(group.idle), str(group.busy))
    return table


def _results_table(results: Sequence[ActResult]) -> Table:
    table = _table("acts", "", "served", "failed", "cut", "wrong", "lost", "money", "")
    mode = None
    for result in results:
        if result.preload is not mode:
            mode = result.preload
            table.add_row(MODES[mode], style="bold")
        table.add_row(
            f"  {result.title}",
            f"{result.count(Outcome.SERVED):,}",
            f"{result.count(Outcome.FAILED):,}",
            f"{result.count(Outcome.CUT):,}",
            f"{result.count(Outcome.WRONG):,}",
            f"{result.findings.lost:,}",
            "adds up" if result.findings.adds_up else "is off",
            "ok" if result.ok else "RED",
            style="" if result.ok else "red",
        )
    return table
