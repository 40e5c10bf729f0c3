"""The demo as a whole: sets the stage, runs the acts without and with preload, judges, cleans up.

It must not know how anything is done: each part has a file of its own beside this one.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from psycopg.conninfo import conninfo_to_dict

from penstock.cli import bank_service, ledger
from penstock.cli.acts import ACTS, Act, Scene
from penstock.cli.bank_pools import MAX_SIZE, MIN_SIZE, SECTION, TIMEOUT
from penstock.cli.bank_tables import create_bank
from penstock.cli.gunicorn_process import GunicornProcess, ServiceDidNotStartError
from penstock.cli.interruption import InterruptedBySignal, Interruption
from penstock.cli.load import Load
from penstock.cli.screen import MODES, Screen, summary_line
from penstock.cli.server_sessions import OBSERVER, SessionWatch
from penstock.cli.verdict import ActResult, complaints, latest_lend, unexcused
from penstock.cli.worker_report import WorkerReport, read_reports
from penstock.launcher import LauncherError, Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from penstock.cli.bank_tables import Bank

DATABASE = "bank"
# What a service needs besides Flask, what it is called, and how gunicorn runs it.
SERVICES = {"connexion": ("connexion", "swagger_ui_bundle"), "flask": ()}
NAMES = {"connexion": "Connexion 3", "flask": "Flask"}
WORKER_CLASSES = {"connexion": "asgi", "flask": "gthread"}
# Branches: few enough that transfers meet each other in the table's hottest rows, as they do in life.
SCALE = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for on the command line."""

    pool: str
    service: str
    workers: int
    preloads: tuple[bool, ...]
    seconds: float
    acts: tuple[str, ...]
    clients: int
    seed: int
    json_path: Path | None


def run(plan: Plan) -> int:
    """Run the demo; the exit status."""
    missing = _missing(plan)
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
        "service": plan.service,
        "seed": plan.seed,
        "workers": plan.workers,
        "clients": plan.clients,
        "ok": all(result.ok for result in results),
        "summary": summary_line(results),
        "acts": [result.as_dict() for result in results],
    }


@dataclass(frozen=True, slots=True)
class Stage:
    """What lasts for the whole demo: the server, the bank in it, a folder, an eye on the sessions."""

    server: Server
    bank: Bank
    folder: Path
    watch: SessionWatch

    @property
    def conninfo(self) -> str:
        """How the bank's database is reached."""
        return self.server.conninfo(dbname=DATABASE, over="unix")

    @property
    def config_file(self) -> Path:
        """The same as the bank's INI file."""
        return self.folder / "config.ini"

    def write_config_file(self) -> None:
        """In the post's shape, and with what the pools have in common."""
        parts = conninfo_to_dict(self.conninfo)
        self.config_file.write_text(
            f"[{SECTION}]\nURL = {parts['host']}\nPORT = {parts['port']}\nUSER = {parts['user']}\n"
            f"PW =\nDB = {parts['dbname']}\n"
            f"name = bank\nmin_size = {MIN_SIZE}\nmax_size = {MAX_SIZE}\ntimeout = {TIMEOUT}\n"
        )


@dataclass(frozen=True, slots=True)
class Service:
    """What lasts for one mode: the port of a gunicorn, and where its workers report."""

    preload: bool
    port: int
    reports: Path

    def workers(self) -> list[WorkerReport]:
        """How the workers are that live."""
        return read_reports(self.reports)


class Demo:
    """One demo: one stage, one ledger, and one service per mode, which lives through all acts."""

    def __init__(self, plan: Plan, screen: Screen, interruption: Interruption) -> None:
        self._plan = plan
        self._screen = screen
        self._interruption = interruption
        self._ledger = ledger.Ledger()
        self._known = ledger.Findings()

    def perform(self) -> list[ActResult]:
        """Set up, run all acts in all modes, and take everything down again."""
        plan = self._plan
        self._screen.say(
            f"penstock demo: pool {plan.pool} on {NAMES[plan.service]},"
            f" {plan.workers} workers, seed {plan.seed}"
        )
        with self._set_stage() as stage:
            return [
                result
                for preload in plan.preloads
                for result in self._perform_mode(stage, preload=preload)
            ]

    @contextmanager
    def _set_stage(self) -> Iterator[Stage]:
        with Server() as server:
            self._interruption.check()
            self._screen.say(f"PostgreSQL runs on port {server.port}; making pgbench's tables")
            conninfo = server.conninfo(dbname=DATABASE)
            bank = create_bank(
                server.conninfo(), conninfo, DATABASE, SCALE, server.binaries.pgbench
            )
            self._interruption.check()
            # In the server's folder: its supervisor removes that even if we are killed.
            folder = server.folder / "demo"
            folder.mkdir()
            with SessionWatch(conninfo) as watch:
                stage = Stage(server, bank, folder, watch)
                stage.write_config_file()
                yield stage

    def _perform_mode(self, stage: Stage, *, preload: bool) -> list[ActResult]:
        acts = [act for act in ACTS if act.name in self._plan.acts]
        with self._open_service(stage, preload=preload) as service:
            self._screen.watch(service.workers, lambda: stage.watch.groups)
            results = [self._perform_act(act, stage, service) for act in acts]
            self._screen.show_workers()
            self._screen.unwatch()
        return results

    @contextmanager
    def _open_service(self, stage: Stage, *, preload: bool) -> Iterator[Service]:
        workers, reports = self._plan.workers, stage.folder / f"reports {MODES[preload]}"
        reports.mkdir()
        lifeline, ours = os.pipe()  # nobody else inherits our end: it closes with us
        environment = {
            bank_service.POOL: self._plan.pool,
            bank_service.SERVICE: self._plan.service,
            bank_service.CONFIG: str(stage.config_file),
            bank_service.REPORTS: str(reports),
            bank_service.LIFELINE: str(lifeline),
            bank_service.PRELOAD: "yes" if preload else "no",
        }
        try:
            with GunicornProcess(
                stage.folder,
                workers=workers,
                worker_class=WORKER_CLASSES[self._plan.service],
                preload=preload,
                environment=environment,
                inherit=(lifeline,),
            ) as gunicorn:
                service = Service(preload, gunicorn.port, reports)
                gunicorn.wait_until(
                    lambda: len(service.workers()) >= workers, self._interruption.wait
                )
                yield service
        finally:
            os.close(lifeline)
            os.close(ours)

    def _perform_act(self, act: Act, stage: Stage, service: Service) -> ActResult:
        plan = self._plan
        seed = f"{plan.seed}/{act.name}/{service.preload}"
        self._screen.begin(act.title, preload=service.preload, seconds=plan.seconds)
        begun = time.monotonic()
        with Load(service.port, stage.bank, self._ledger, clients=plan.clients, seed=seed) as load:
            permit = act.perform(
                Scene(
                    server=stage.server,
                    conninfo=stage.conninfo,
                    load=load,
                    seconds=plan.seconds,
                    chance=random.Random(seed),
                    workers=service.workers,
                    wait=self._interruption.wait,
                )
            )
            load.finish(self._interruption.wait)
        ended = time.monotonic()
        tally, findings = load.tally(), self._audit(stage.server)
        result = ActResult(
            title=act.title,
            preload=service.preload,
            seconds=ended - begun,
            tally=tally,
            findings=findings,
            note=permit.note,
            silence=tally.longest_silence(begun, ended),
            latest_lend=latest_lend(tally, permit),
            complaints=complaints(tally, findings, permit),
            unexcused=unexcused(tally, permit),
        )
        self._screen.finish(result)
        return result

    def _audit(self, server: Server) -> ledger.Findings:
        """What is wrong with the books now and was not before this act."""
        books = ledger.read_books(server.conninfo(dbname=DATABASE, application_name=OBSERVER))
        found = ledger.audit(self._ledger.asked, self._ledger.acknowledged, books)
        fresh, self._known = found.since(self._known), found
        return fresh


def _missing(plan: Plan) -> str | None:
    """A package that the demo needs and cannot find; its own processes could only fail on it."""
    packages = ("flask", "gunicorn", "psycopg", *SERVICES[plan.service], plan.pool)
    return next((each for each in packages if find_spec(each) is None), None)
