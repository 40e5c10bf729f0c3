"""What a statement costs beside a sleep of the same length, in a gunicorn worker of gevent's.

    python bench/gevent_worker.py [--json FILE] [--rounds N]

One worker, a pool of 50, 50 clients, a connection per request. One view runs `select pg_sleep(0.1)`, the
other `time.sleep(0.1)`, in turns, so that a slow moment of the machine hits both: what is read is the
ratio of their requests per second. With psycopg 3 and with psycopg2; the application imported by the
worker, which has patched by then, and by the master (`--preload`), which never does.

A driver that waits in C serves 10 requests a second here, whatever the number of clients.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import environment, heading, options, save, table

from penstock import ConnectionPool
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CLIENTS = 50
REQUESTS = 10  # of each client, in one round: a second and a bit
GOAL = 0.90


# -- the application: gunicorn imports this file, too -----------------------------------------------


def application() -> Callable[..., list[bytes]]:
    """Two views, and one that tells how many statements are under way."""
    driver: Any = os.environ["BENCH_DRIVER"]
    pool = ConnectionPool(
        os.environ["BENCH_DSN"],
        driver=driver,
        min_size=0,
        max_size=CLIENTS,
        timeout=20.0,
    )

    def sleep() -> None:
        time.sleep(0.1)

    def sql() -> None:
        with pool.connection() as conn:
            conn.cursor().execute("select pg_sleep(0.1)")

    views = {"/sleep": sleep, "/sql": sql}

    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        views[environ["PATH_INFO"]]()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        return [b"ok"]

    return app


# -- the load ---------------------------------------------------------------------------------------


def one_request(port: int, path: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30.0) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(partial(client.recv, 4096), b""))
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer.decode(errors="replace"))


def requests_per_second(port: int, path: str, each: int = REQUESTS) -> float:
    failures: list[BaseException] = []

    def client() -> None:
        try:
            for _ in range(each):
                one_request(port, path)
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    began = time.monotonic()
    for each_client in clients:
        each_client.start()
    for each_client in clients:
        each_client.join()
    if failures:
        raise failures[0]
    return CLIENTS * each / (time.monotonic() - began)


# -- the worker -------------------------------------------------------------------------------------


@contextmanager
def worker(dsn: str, driver: str, *, preload: bool) -> Iterator[int]:
    """A running gunicorn with one worker; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "1"]
    command += ["--worker-connections", "200", "--log-level", "warning", "-b", f"127.0.0.1:{port}"]
    command += ["--preload"] if preload else []
    env = os.environ | {"BENCH_DSN": dsn, "BENCH_DRIVER": driver}
    running = subprocess.Popen(
        [*command, "gevent_worker:application()"], cwd=Path(__file__).parent, env=env
    )
    try:
        _wait_for(port, running)
        yield port
    finally:
        running.terminate()
        running.wait(30.0)


def _wait_for(port: int, running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30.0
    while True:
        try:
            return one_request(port, "/sleep")
        except OSError:
            if time.monotonic() > deadline or running.poll() is not None:
                raise
            time.sleep(0.05)


def measured(dsn: str, driver: str, rounds: int, *, preload: bool) -> dict[str, float]:
    with worker(dsn, driver, preload=preload) as port:
        requests_per_second(port, "/sql", 2)  # all connections are open
        found = [
            (requests_per_second(port, "/sleep"), requests_per_second(port, "/sql"))
            for _ in range(rounds)
        ]
    return {
        "sleep": statistics.median(sleep for sleep, _ in found),
        "sql": statistics.median(sql for _, sql in found),
        "ratio": statistics.median(sql / sleep for sleep, sql in found),
    }


def main() -> None:
    parser = options("a statement beside a sleep, in a gevent worker")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    asked = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with Server(settings={"max_connections": 2 * CLIENTS}) as server:
        for driver in ("psycopg", "psycopg2"):
            for preload in (False, True):
                name = driver + (", --preload" if preload else "")
                figures[name] = measured(server.conninfo(), driver, asked.rounds, preload=preload)
    around = environment()
    heading("gunicorn -k gevent, one worker: requests per second, median of rounds", around)
    rows = [
        [name, f"{one['sleep']:.0f}", f"{one['sql']:.0f}", f"{one['ratio']:.2f}"]
        for name, one in figures.items()
    ]
    table(["", "sleep(0.1)", "pg_sleep(0.1)", "ratio"], rows)
    for name, one in figures.items():
        verdict = "PASS" if one["ratio"] >= GOAL else "miss"
        print(f"{verdict}  {one['ratio']:.2f} with {name} (goal: at least {GOAL:.2f})")
    save(asked.json, "gevent_worker", around, figures)


if __name__ == "__main__":
    main()
