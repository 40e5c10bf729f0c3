"""The acts: what is done to the bank while it is under load.

Each act is one function that does its deed and says what that deed excuses. It must not know which
pool is in use, nor count or judge anything.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from demo.server_sessions import list_sessions, terminate_all, watch_go
from demo.verdict import NOTICE, Permit

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from demo.load import Load
    from demo.worker_report import WorkerReport

# The share of an act's time that passes before its deed.
BEFORE = 0.35
# How long the database stays down, besides stopping and starting: longer than it takes a pool to
# notice, shorter than its patience.
DOWN_SECONDS = 0.5


class Restartable(Protocol):
    """As much of the server as an act needs."""

    def stop(self) -> None:
        """End it by a fast shutdown."""

    def start(self) -> object:
        """Start it again and wait until it answers."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What an act has to hand.

    Attributes:
        conninfo: of the bank's database.
        workers: gunicorn's workers that live, by their last reports.
        wait: waits so many seconds; raises when the demo is interrupted.
    """

    server: Restartable
    conninfo: str
    load: Load
    seconds: float
    chance: random.Random
    workers: Callable[[], list[WorkerReport]]
    wait: Callable[[float], None]

    def before(self) -> None:
        """The time before the deed."""
        self.wait(self.seconds * BEFORE)

    def after(self) -> None:
        """The time after it."""
        self.wait(self.seconds * (1 - BEFORE))


@dataclass(frozen=True, slots=True)
class Act:
    """A word for the command line, a title for people, and a deed."""

    name: str
    title: str
    perform: Callable[[Scene], Permit]


def _calm(scene: Scene) -> Permit:
    begun = time.monotonic()
    scene.wait(scene.seconds)
    return Permit(begun)


def _kill_a_worker(scene: Scene) -> Permit:
    scene.before()
    workers = [report.pid for report in scene.workers()]
    worker = scene.chance.choice(scene.load.in_use_of(workers) or workers)
    clients = scene.load.clients_of(worker)
    os.kill(worker, signal.SIGKILL)
    killed_at = time.monotonic()
    scene.after()
    note = f"worker {worker} killed; at most {clients} clients were connected to it"
    return Permit(killed_at, killed_worker=worker, note=note)


def _end_idle_sessions(scene: Scene) -> Permit:
    scene.before()
    gate = scene.load.gate
    gate.hold()
    while gate.inside:
        scene.wait(0.002)
    ended = terminate_all(scene.conninfo)
    _let_every_worker_run(scene)
    gate.release()
    released_at = time.monotonic()
    scene.after()
    # Nobody held one, and all had gone before anybody asked again: their end excuses nobody.
    note = f"{len(ended.gone)} sessions ended, none of them in use"
    return Permit(released_at, gone=ended.gone, notice=0.0, note=note)


def _let_every_worker_run(scene: Scene) -> None:
    """Wait until each worker has had the processor since: on a busy machine that takes a while.

    The system tells a process of a session's end in microseconds, but nobody can listen who does not
    run. A pool that does not listen gains nothing by this.
    """
    noticed_at = time.monotonic() + NOTICE
    for _ in range(400):  # 2 s; a worker that does not report by then has other troubles
        if all(report.at > noticed_at for report in scene.workers()):
            return
        scene.wait(0.005)


def _end_sessions(scene: Scene) -> Permit:
    scene.before()
    ended = terminate_all(scene.conninfo)
    ended_at = time.monotonic()
    scene.after()
    note = f"{len(ended.gone)} sessions ended, {ended.busy} of them at work just before"
    return Permit(ended_at, gone=ended.gone, notice=notice_in(scene.workers()), note=note)


def _restart_database(scene: Scene) -> Permit:
    scene.before()
    sessions = list_sessions(scene.conninfo)
    busy = sum(state != "idle" for state in sessions.values())
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch_go, sessions)
        scene.server.stop()
        gone_at = time.monotonic()
        gone = watching.result()
    scene.wait(DOWN_SECONDS)
    scene.server.start()
    back_at = time.monotonic()
    scene.after()
    note = (
        f"{len(sessions)} sessions ended, {busy} of them at work just before;"
        f" the database was away for {back_at - begun:.1f} s"
    )
    # A session opened since the list was made: it had gone when the server had.
    return Permit(
        back_at, gone=gone, all_gone_at=gone_at, notice=notice_in(scene.workers()), note=note
    )


def notice_in(reports: list[WorkerReport]) -> float:
    """`NOTICE`, and more where the workers' own threads had to wait for longer than that to run at all."""
    latest = max((report.late for report in reports), default=0.0)
    return max(NOTICE, 2 * latest)  # twice: a core, and then the interpreter


ACTS = (
    Act("calm", "calm", _calm),
    Act("worker", "worker killed", _kill_a_worker),
    Act("idle", "idle sessions ended", _end_idle_sessions),
    Act("sessions", "all sessions ended", _end_sessions),
    Act("restart", "database restarted", _restart_database),
)
