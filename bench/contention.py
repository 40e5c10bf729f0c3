"""Many threads, few connections: how much gets through, how long it waits, and whether it is fair.

    python bench/contention.py [--json FILE] [--seconds S]

Each case runs for a fixed time, for each pool in turn, on a real PostgreSQL. "Work" is a sleep while
the connection is held: it lets other threads run, as waiting for a server does. The wait is the
time from asking for a connection to having it. min and max say how often the least and the most
lucky thread got one.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg_pool
from report import environment, heading, options, save, table

from penstock import ConnectionPool
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

#: (threads, connections, seconds of work)
CASES = ((64, 8, 0.0), (64, 8, 100e-6), (16, 4, 0.0), (16, 4, 100e-6))


def borrow_until(
    stop: threading.Event,
    connection: Callable[[], AbstractContextManager[Any]],
    work: float,
    waits: list[float],
) -> None:
    while not stop.is_set():
        began = time.perf_counter()
        with connection():
            waits.append(time.perf_counter() - began)
            if work:
                time.sleep(work)


def run(pool: Any, threads: int, work: float, seconds: float) -> dict[str, float]:
    """One case with one pool."""
    stop = threading.Event()
    waits: list[list[float]] = [[] for _ in range(threads)]
    workers = [
        threading.Thread(target=borrow_until, args=(stop, pool.connection, work, own))
        for own in waits
    ]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    stop.set()
    took = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return summary(waits, took)


def summary(waits: list[list[float]], took: float) -> dict[str, float]:
    everything = sorted(wait for own in waits for wait in own)
    count = len(everything)
    return {
        "per_second": round(count / took),
        "wait_p50_ms": round(everything[count // 2] * 1e3, 3),
        "wait_p99_ms": round(everything[count * 99 // 100] * 1e3, 3),
        "wait_max_ms": round(everything[-1] * 1e3, 3),
        "thread_min": min(map(len, waits)),
        "thread_max": max(map(len, waits)),
    }


def pools(dsn: str, size: int, closing: ExitStack) -> dict[str, Any]:
    ours = closing.enter_context(
        ConnectionPool(dsn, name="bench", min_size=size, max_size=size, timeout=30.0)
    )
    ours.open(wait=True)
    peer = closing.enter_context(
        psycopg_pool.ConnectionPool(dsn, min_size=size, max_size=size, timeout=30.0)
    )
    peer.wait()
    return {"penstock": ours, "psycopg_pool": peer}


def main() -> None:
    parser = options("threads waiting for connections")
    parser.add_argument("--seconds", type=float, default=1.5, help="per case and pool")
    asked = parser.parse_args()
    figures = []
    with Server() as server:
        for threads, size, work in CASES:
            with ExitStack() as closing:
                for name, pool in pools(server.conninfo(), size, closing).items():
                    found = run(pool, threads, work, asked.seconds)
                    case = {"pool": name, "threads": threads, "connections": size, "work": work}
                    figures.append({**case, **found})
    around = environment()
    heading("threads waiting for connections, wall time", around)
    print_figures(figures)
    save(asked.json, "contention", around, figures)


def print_figures(figures: list[dict[str, Any]]) -> None:
    rows = [
        [
            f"{one['threads']}/{one['connections']}, "
            + (f"{one['work'] * 1e6:.0f} us: " if one["work"] else "no work: ")
            + one["pool"],
            f"{one['per_second']:,}",
            f"{one['wait_p50_ms']:.2f}",
            f"{one['wait_p99_ms']:.2f}",
            f"{one['wait_max_ms']:.1f}",
            f"{one['thread_min']}",
            f"{one['thread_max']}",
        ]
        for one in figures
    ]
    head = ["threads/connections", "per second", "p50 ms", "p99 ms", "max ms", "min", "max"]
    table(head, rows)


if __name__ == "__main__":
    main()
