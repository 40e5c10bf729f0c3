"""Celery's prefork workers over a pool that its parent process has made and used.

A real worker on a broker of files; what tasks found out is read from the database.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.forks import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_penstock.postgres import Server

pytest.importorskip("celery")

TASKS = 30
DATABASE = "celery_jobs"
SETTINGS = """
from pathlib import Path

broker_url = "filesystem://"
broker_transport_options = {
    "data_folder_in": str(Path("data").resolve()),
    "data_folder_out": str(Path("data").resolve()),
    "control_folder": str(Path("control").resolve()),
    "polling_interval": 0.01,
}
worker_prefetch_multiplier = 1
task_ignore_result = True
"""
JOBS = """
import os

from celery import Celery
from penstock import ConnectionPool

app = Celery("jobs")
app.config_from_object("settings")
pool = ConnectionPool(os.environ["DATABASE_URL"], max_size=2, name="jobs")
pool.execute("insert into answer select 'parent', 'parent', %s", (os.getpid(),))

@app.task(name="echo")
def echo(nonce):
    with pool.connection() as conn:
        found = conn.execute("select %s", (nonce,)).fetchone()[0]
        conn.execute("insert into answer values (%s, %s, %s)", (nonce, found, os.getpid()))
"""
SEND = f"""
from celery import Celery

app = Celery()
app.config_from_object("settings")
for number in range({TASKS}):
    app.send_task("echo", (f"nonce {{number}}",))
"""
WORKER = ["-A", "jobs", "worker", "--pool=prefork", "--concurrency=2", "--max-tasks-per-child=5"]
WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=INFO"]


@pytest.fixture
def jobs(server: Server, tmp_path: Path) -> Iterator[Path]:
    server.execute(f"create database {DATABASE}")
    server.execute("create table answer (nonce text, found text, worker int)", dbname=DATABASE)
    for name, text in (("settings.py", SETTINGS), ("jobs.py", JOBS), ("send.py", SEND)):
        (tmp_path / name).write_text(text)
    for name in ("data", "control"):
        (tmp_path / name).mkdir()
    yield tmp_path
    server.execute(f"drop database {DATABASE} with (force)")


def test_tasks_get_their_own_answers_while_children_come_and_go(jobs: Path, server: Server) -> None:
    environment = os.environ | {"DATABASE_URL": server.conninfo(dbname=DATABASE)}
    log = jobs / "celery.log"
    subprocess.run([sys.executable, "send.py"], cwd=jobs, env=environment, check=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", *WORKER],
            cwd=jobs,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        check(process, server)
    except BaseException:
        print(log.read_text())
        raise
    finally:
        process.terminate()
        assert process.wait(60) == 0
    until(lambda: not sessions(server), "no session is left")
    assert "Traceback" not in log.read_text()


def check(process: subprocess.Popen[Any], server: Server) -> None:
    until(lambda: answers(server), "the parent has used the pool")
    before = sessions(server)[process.pid]
    until(lambda: len(answers(server)) == TASKS + 1, "all tasks have run")
    children = {int(worker) for _, _, worker in answers(server)} - {process.pid}
    assert len(children) >= TASKS // 5  # each has run five at most
    assert all(found == nonce for nonce, found, _ in answers(server))
    assert len({nonce for nonce, _, _ in answers(server)}) == TASKS + 1
    until(lambda: set(sessions(server)) <= living(process.pid), "only the living have sessions")
    assert sessions(server)[process.pid] == before


def answers(server: Server) -> list[tuple[str, ...]]:
    return server.execute("select nonce, found, worker from answer", dbname=DATABASE)


def sessions(server: Server) -> dict[int, Any]:
    """Each process's session, by its pid, which is in the session's name."""
    rows = server.execute(
        "select application_name, pid, backend_start from pg_stat_activity"
        f" where datname = '{DATABASE}' and application_name like '%/jobs/%'"
    )
    return {int(name.rpartition("/")[2]): rest for name, *rest in rows}


def living(parent: int) -> set[int]:
    # Of every thread: children that replace others are not forked by the first one.
    lists = [each.read_text() for each in Path(f"/proc/{parent}/task").glob("*/children")]
    return {parent, *map(int, " ".join(lists).split())}
