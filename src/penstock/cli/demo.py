"""The demo as a whole: sets the stage, runs the acts without and with preload, judges, cleans up.

It must not know how anything is done: each part has a file of its own beside this one.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from penstock.cli import bank_service, ledger
from penstock.cli.acts import ACTS, Act, Scene
from penstock.cli.bank_tables import Bank, create_bank
from penstock.cli.gunicorn_process import GunicornProcess, ServiceDidNotStartError
from penstock.cli.interruption import InterruptedBySignal, Interruption
from penstock.cli.load import Load
from penstock.cli.screen import MODES, Screen, summary_line
from penstock.cli.server_sessions import OBSERVER, SessionWatch
from penstock.cli.verdict import ActResult, complaints
from penstock.cli.worker_report import read_reports
from penstock.launcher import LauncherError, Server

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DATABASE = "bank"
# Branches: few enough that transfers meet each other in the table's hottest rows, as they do in life.
SCALE = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for on the command line."""

    pool: str
    workers: int
    preloads: tuple[bool, ...]
    seconds: float
    acts: tuple[str, ...]
    clients: int
    seed: int
    json_path: Path | None


def run(plan: Plan) -> int:
    """Run the demo; the exit status."""
    missing = _missing(plan.pool)
    if missing is not None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    # A moment is to be noted when it happens, not when sixteen busy clients have had their turns.
    sys.setswitchinterval(0.0005)
    screen = Screen(len(plan.preloads) * len(plan.acts))
    try:
        with Interruption() as interruption, screen:
            results = Demo(plan, screen, interruption).perform()
    except InterruptedBySignal as signalled:
        screen.say(f"penstock demo: {signalled}: everything ended and removed")
        return 128 + signalled.signum
    except ServiceDidNotStartError as error:
        screen.say(f"penstock demo: the service did not start; its last words:\n{error}")
        return 1
    except LauncherError as error:
        screen.say(f"penstock demo: {error}")
        return 1
    screen.conclude(summary_line(results))
    if plan.json_path:
        plan.json_path.write_text(json.dumps(_account(plan, results), indent=2) + "\n")
    return 0 if all(result.ok for result in results) else 1


def _account(plan: Plan, results: Sequence[ActResult]) -> dict[str, object]:
    return {
        "pool": plan.pool,
        "seed": plan.seed,
        "workers": plan.workers,
        "clients": plan.clients,
        "ok": all(result.ok for result in results),
        "summary": summary_line(results),
        "acts": [result.as_dict() for result in results],
    }


class Demo:
    """One demo: one server, one bank and its ledger, one gunicorn per mode."""

    def __init__(self, plan: Plan, screen: Screen, interruption: Interruption) -> None:
        self._plan = plan
        self._screen = screen
        self._interruption = interruption
        self._ledger = ledger.Ledger()
        self._known = ledger.Findings()

    def perform(self) -> list[ActResult]:
        """Set up, run all acts in all modes, and take everything down again."""
        plan, screen = self._plan, self._screen
        screen.say(f"penstock demo: pool {plan.pool}, {plan.workers} workers, seed {plan.seed}")
        with ExitStack() as stage:
            server = stage.enter_context(Server())
            self._interruption.check()
            # In the server's folder: its supervisor removes that even if we are killed.
            folder = server.folder / "demo"
            folder.mkdir()
            bank = self._create_bank(server)
            self._interruption.check()
            watch = stage.enter_context(SessionWatch(_conninfo(server)))
            results = []
            for preload in plan.preloads:
                results += self._perform_mode(folder, server, bank, watch, preload=preload)
            return results

    def _create_bank(self, server: Server) -> Bank:
        self._screen.say(f"PostgreSQL runs on port {server.port}; making pgbench's tables")
        return create_bank(
            server.conninfo(dbname="postgres"),
            _conninfo(server),
            DATABASE,
            SCALE,
            server.binaries.pgbench,
        )

    def _perform_mode(
        self, folder: Path, server: Server, bank: Bank, watch: SessionWatch, *, preload: bool
    ) -> list[ActResult]:
        """All acts on one gunicorn, which has to live through them."""
        reports = folder / f"reports {MODES[preload]}"
        reports.mkdir()
        environment = {
            bank_service.POOL: self._plan.pool,
            bank_service.CONNINFO: _conninfo(server),
            bank_service.REPORTS: str(reports),
            bank_service.READER: str(os.getpid()),
            bank_service.PRELOAD: "yes" if preload else "no",
        }
        with GunicornProcess(
            folder, workers=self._plan.workers, preload=preload, environment=environment
        ) as gunicorn:
            gunicorn.wait_until(
                lambda: len(read_reports(reports)) >= self._plan.workers, self._interruption.wait
            )
            self._screen.watch(partial(read_reports, reports), lambda: watch.groups)
            results = [
                self._perform_act(act, server, bank, gunicorn.port, reports, preload=preload)
                for act in ACTS
                if act.name in self._plan.acts
            ]
            self._screen.show_workers()
            self._screen.unwatch()
        return results

    def _perform_act(
        self, act: Act, server: Server, bank: Bank, port: int, reports: Path, *, preload: bool
    ) -> ActResult:
        plan = self._plan
        seed = f"{plan.seed}/{act.title}/{MODES[preload]}"
        self._screen.begin(act.title, preload=preload, seconds=plan.seconds)
        begun = time.monotonic()
        with Load(port, bank, self._ledger, clients=plan.clients, seed=seed) as load:
            permit = act.perform(
                Scene(
                    server=server,
                    conninfo=_conninfo(server),
                    load=load,
                    seconds=plan.seconds,
                    chance=random.Random(seed),
                    workers=lambda: [report.pid for report in read_reports(reports)],
                    wait=self._interruption.wait,
                )
            )
            load.finish(self._interruption.wait)
        ended = time.monotonic()
        tally, findings = load.tally(), self._audit(server)
        result = ActResult(
            title=act.title,
            preload=preload,
            seconds=ended - begun,
            tally=tally,
            findings=findings,
            note=permit.note,
            silence=tally.longest_silence(begun, ended),
            complaints=complaints(tally, findings, permit),
        )
        self._screen.finish(result)
        return result

    def _audit(self, server: Server) -> ledger.Findings:
        """What is wrong with the books now and was not before this act."""
        books = ledger.read_books(server.conninfo(dbname=DATABASE, application_name=OBSERVER))
        found = ledger.audit(self._ledger.asked, self._ledger.acknowledged, books)
        fresh, self._known = found.since(self._known), found
        return fresh


def _conninfo(server: Server) -> str:
    return server.conninfo(dbname=DATABASE, over="unix")


def _missing(pool: str) -> str | None:
    """A package that the demo needs and cannot find; its own processes could only fail on it."""
    packages = ("flask", "gunicorn", "psycopg", pool)
    return next((each for each in packages if find_spec(each) is None), None)
