"""What a borrow and a return cost, without SQL, beside other pools in the same run.

    python bench/hot_path.py [--json FILE] [--rounds N]

One thread, a real PostgreSQL, one connection that is always idle. Rounds are interleaved, so that a
slow moment of the machine hits all; what is read is the CPU time of the borrowing thread, so that
other processes count less. The instructions and calls of one borrow and return are counted, too:
they do not depend on the machine at all, only on the interpreter.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg2.pool
import psycopg_pool
from report import environment, heading, options, save, table

from penstock import ConnectionPool
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

BORROWS = 2_000  # in one round of one contestant: about 1 to 8 ms

WITH = "penstock, with connection()"
GETCONN = "penstock, getconn/putconn"
WITH_2 = "penstock, psycopg2, with connection()"
PEER_WITH = "psycopg_pool, with connection()"
PEER_GETCONN = "psycopg_pool, getconn/putconn"
PEER_2 = "psycopg2 ThreadedConnectionPool"
FLOOR = "floor: with of a new object, pop, append"

#: (contestant, at most this share, of this peer)
GOALS = (
    (WITH, 0.20, PEER_WITH),
    (WITH, 0.40, PEER_GETCONN),
    (WITH, 1.00, PEER_2),
    (WITH_2, 1.00, PEER_2),
)


@dataclass
class Contestant:
    """One way to borrow and return; `once` does it once, `loop` many times."""

    name: str
    once: Callable[[], object]
    loop: Callable[[int], object]


class Empty:
    """The least that a lease can be."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        return None


def with_pool(name: str, pool: Any) -> Contestant:
    connection = pool.connection

    def once() -> None:
        with connection():
            pass

    def loop(n: int) -> None:
        for _ in range(n):
            with connection():
                pass

    return Contestant(name, once, loop)


def with_pair(name: str, pool: Any) -> Contestant:
    getconn, putconn = pool.getconn, pool.putconn

    def once() -> None:
        putconn(getconn())

    def loop(n: int) -> None:
        for _ in range(n):
            putconn(getconn())

    return Contestant(name, once, loop)


def floor() -> Contestant:
    idle = deque([object()])
    pop, append = idle.pop, idle.append

    def once() -> None:
        with Empty():
            append(pop())

    def loop(n: int) -> None:
        for _ in range(n):
            with Empty():
                append(pop())

    return Contestant(FLOOR, once, loop)


def sqlalchemy(dsn: str) -> Contestant | None:
    try:
        import psycopg  # noqa: PLC0415  with the optional one below
        from sqlalchemy.pool import QueuePool  # noqa: PLC0415  optional
    except ImportError:
        return None
    connect = QueuePool(lambda: psycopg.connect(dsn), pool_size=10, max_overflow=0).connect

    def once() -> None:
        connect().close()

    def loop(n: int) -> None:
        for _ in range(n):
            connect().close()

    return Contestant("SQLAlchemy QueuePool", once, loop)


def contestants(dsn: str, closing: ExitStack) -> list[Contestant]:
    ours = closing.enter_context(ConnectionPool(dsn, name="bench"))
    ours.open(wait=True)
    older = closing.enter_context(ConnectionPool(dsn, driver="psycopg2", name="bench"))
    older.open(wait=True)
    peer = closing.enter_context(psycopg_pool.ConnectionPool(dsn, min_size=1, max_size=10))
    peer.wait()
    second = psycopg2.pool.ThreadedConnectionPool(1, 10, dsn)
    closing.callback(second.closeall)
    found = [
        with_pool(WITH, ours),
        with_pair(GETCONN, ours),
        with_pool(WITH_2, older),
        with_pool(PEER_WITH, peer),
        with_pair(PEER_GETCONN, peer),
        with_pair(PEER_2, second),
        sqlalchemy(dsn),
        floor(),
    ]
    return [contestant for contestant in found if contestant is not None]


# -- time -----------------------------------------------------------------------------------------


def measure(found: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Nanoseconds per borrow and return, one figure per round."""
    figures: dict[str, list[float]] = {contestant.name: [] for contestant in found}
    for contestant in found:
        contestant.loop(BORROWS)  # to warm up
    for number in range(rounds):
        at = number % len(found)
        for contestant in found[at:] + found[:at]:  # nobody is always behind the same one
            figures[contestant.name].append(one_round(contestant))
    return figures


def one_round(contestant: Contestant) -> float:
    began = time.thread_time_ns()
    contestant.loop(BORROWS)
    return (time.thread_time_ns() - began) / BORROWS


# -- counts ---------------------------------------------------------------------------------------


def instructions(action: Callable[[], object]) -> int:
    """Bytecode instructions that one call of `action` executes, those of the call left out."""
    return _instructions(action) - _instructions(_nothing)


def _instructions(action: Callable[[], object]) -> int:
    count = 0

    def tracer(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        return tracer

    def traced() -> int:
        nonlocal count
        count = 0
        sys.settrace(tracer)
        try:
            action()
        finally:
            sys.settrace(None)
        return count

    traced()  # 3.12 begins to report instructions with the second trace only
    return traced()


def calls(action: Callable[[], object]) -> tuple[int, int]:
    """Calls of Python functions and of C functions in one call of `action`, itself left out."""
    python = native = 0

    def profiler(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal python, native
        python += event == "call"
        native += event == "c_call"

    action()
    sys.setprofile(profiler)
    try:
        action()
    finally:
        sys.setprofile(None)
    return python - 1, native - 1  # `action`, and the setprofile that ends it


def _nothing() -> None:
    pass


# -- report ---------------------------------------------------------------------------------------


def main() -> None:
    parser = options("borrow + return without SQL")
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    with Server() as server, ExitStack() as closing:
        found = contestants(server.conninfo(), closing)
        times = measure(found, asked.rounds)
        counts = {one.name: (instructions(one.once), *calls(one.once)) for one in found}
    figures = {
        name: {
            "ns_minimum": round(min(rounds), 1),
            "ns_median": round(statistics.median(rounds), 1),
            "instructions": counts[name][0],
            "python_calls": counts[name][1],
            "c_calls": counts[name][2],
        }
        for name, rounds in times.items()
    }
    around = environment()
    heading("borrow + return, no SQL, one thread, ns of CPU time", around)
    print_figures(figures)
    print_goals(figures)
    save(asked.json, "hot_path", around, figures)


def print_figures(figures: dict[str, dict[str, float]]) -> None:
    own = figures[WITH]["ns_minimum"]
    rows = [
        [
            name,
            f"{one['ns_minimum']:,.0f}",
            f"{one['ns_median']:,.0f}",
            f"{own / one['ns_minimum']:.2f}",
            f"{one['instructions']}",
            f"{one['python_calls']}",
            f"{one['c_calls']}",
        ]
        for name, one in figures.items()
    ]
    table(["", "minimum", "median", "penstock/it", "instructions", "calls", "C calls"], rows)


def print_goals(figures: dict[str, dict[str, float]]) -> None:
    for name, share, peer in GOALS:
        ratio = figures[name]["ns_minimum"] / figures[peer]["ns_minimum"]
        verdict = "PASS" if ratio <= share else "miss"
        print(f"{verdict}  {name}: {ratio:.2f} of {peer} (goal: at most {share:.2f})")
    print()


if __name__ == "__main__":
    main()
