"""The stage: a PostgreSQL with a bank in it, and gunicorn with the service; both end with their block.

It must not know what is played on it: acts under load, or a service that is left up.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg.conninfo import conninfo_to_dict

from demo import bank_service
from demo.bank_pools import MAX_SIZE, MIN_SIZE, SECTION, TIMEOUT
from demo.bank_tables import create_bank
from demo.gunicorn_process import GunicornProcess
from demo.screen import MODES
from demo.server_sessions import SessionWatch
from demo.worker_report import WorkerReport, read_reports
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from demo.bank_tables import Bank
    from demo.interruption import Interruption
    from demo.plan import Plan

DATABASE = "bank"
# Branches: few enough that transfers meet each other in the table's hottest rows, as they do in life.
SCALE = 4


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
    """What lasts for one mode: a gunicorn, and where its workers report."""

    preload: bool
    gunicorn: GunicornProcess
    reports: Path

    @property
    def port(self) -> int:
        """Where the bank listens."""
        return self.gunicorn.port

    def workers(self) -> list[WorkerReport]:
        """How the workers are that live."""
        return read_reports(self.reports)


@contextmanager
def set_stage(interruption: Interruption, say: Callable[[str], None]) -> Iterator[Stage]:
    """Start a server and make the bank."""
    with Server() as server:
        interruption.check()
        say(f"PostgreSQL runs on port {server.port}; making pgbench's tables")
        conninfo = server.conninfo(dbname=DATABASE)
        bank = create_bank(server.conninfo(), conninfo, DATABASE, SCALE, server.binaries.pgbench)
        interruption.check()
        # In the server's folder: its supervisor removes that even if we are killed.
        folder = server.folder / "demo"
        folder.mkdir()
        with SessionWatch(conninfo) as watch:
            stage = Stage(server, bank, folder, watch)
            stage.write_config_file()
            yield stage


@contextmanager
def open_service(
    stage: Stage, plan: Plan, interruption: Interruption, *, preload: bool
) -> Iterator[Service]:
    """Start gunicorn, and wait until all its workers have said that they live."""
    reports = stage.folder / f"reports {MODES[preload]}"
    reports.mkdir()
    lifeline, ours = os.pipe()  # nobody else inherits our end: it closes with us
    environment = {
        bank_service.POOL: plan.pool,
        bank_service.SERVICE: plan.service,
        bank_service.CONFIG: str(stage.config_file),
        bank_service.REPORTS: str(reports),
        bank_service.LIFELINE: str(lifeline),
        bank_service.PRELOAD: "yes" if preload else "no",
    }
    try:
        with GunicornProcess(
            stage.folder,
            workers=plan.workers,
            worker_class=plan.kind.worker_class,
            preload=preload,
            environment=environment,
            inherit=(lifeline,),
        ) as gunicorn:
            service = Service(preload, gunicorn, reports)
            gunicorn.wait_until(lambda: len(service.workers()) >= plan.workers, interruption.wait)
            yield service
    finally:
        os.close(lifeline)
        os.close(ours)
