"""gunicorn's gevent worker: one worker has fifty statements under way, whoever imported the application."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import psycopg
import pytest

from tests.gevent.conftest import ROOT

PATIENCE = 60.0
WAITING = "select count(*) from pg_locks where locktype = 'advisory' and not granted"


@contextmanager
def gunicorn(dsn, driver, *, preload, master=""):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-b", f"127.0.0.1:{port}"]
    command += ["--worker-connections", "200", *(["--preload"] if preload else [])]
    env = os.environ | {"SCENE_DSN": dsn, "SCENE_DRIVER": driver, "SCENE_MASTER": master}
    running = subprocess.Popen(
        [*command, "tests.gevent.wsgi:app"],
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(running.stderr or ()))
    reader.start()
    try:
        yield f"http://127.0.0.1:{port}", said
    finally:
        running.terminate()
        running.wait(PATIENCE)
        reader.join()
        if running.stderr is not None:
            running.stderr.close()


def get(url):
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return answer.read().decode()


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what()}"
        time.sleep(0.02)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize(
    ("preload", "master"),
    [(False, ""), (True, "uses the pool")],
    ids=["the worker imports", "preload, and the master uses a pool"],
)
def test_fifty_statements_are_under_way_at_once_in_one_worker(server, driver, preload, master):
    answers: dict[int, str] = {}

    def client(number, url):
        answers[number] = get(f"{url}/{'default' if number % 2 else 'reports'}")

    dsn = server.conninfo(over="tcp")
    with (
        psycopg.connect(dsn, autocommit=True) as observer,
        gunicorn(dsn, driver, preload=preload, master=master) as (url, said),
    ):
        wait_until(lambda: any("Booting worker" in line for line in said), lambda: said)
        observer.execute("select pg_advisory_lock(4712)")
        clients = [threading.Thread(target=client, args=(n, url)) for n in range(50)]
        for each in clients:
            each.start()
        wait_until(
            lambda: observer.execute(WAITING).fetchone() == (50,),
            lambda: (observer.execute(WAITING).fetchone(), said),
        )
        observer.execute("select pg_advisory_unlock(4712)")
        for each in clients:
            each.join(PATIENCE)
    assert len(set(answers.values())) == 50, said
    assert not [line for line in said if "Error" in line or "Traceback" in line]
