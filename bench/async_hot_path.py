"""What a borrow and a return cost on asyncio, without SQL, beside other pools in the same run.

    python bench/async_hot_path.py [--json FILE] [--rounds N] [--uvloop]

One task, a real PostgreSQL, one connection that is always idle. Rounds are interleaved, and what is
read is the CPU time of the loop's thread. Goals (DESIGN section 10 gives the peers' figures): a borrow
and return is at most 0.20 of psycopg's AsyncConnectionPool and at most 0.10 of asyncpg's pool without
its reset, which with it costs a round trip more.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg_pool
from report import environment, heading, options, save, table

from penstock import AsyncConnectionPool, PoolConfig
from penstock.config.conninfo import parse, to_url
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

BORROWS = 1_000  # in one round of one contestant: about 1 to 20 ms

OURS = "penstock, psycopg"
OURS_ASYNCPG = "penstock, asyncpg"
PEER = "psycopg_pool AsyncConnectionPool"
PEER_ASYNCPG = "asyncpg pool, without its reset"

#: (contestant, at most this share, of this peer)
GOALS = ((OURS, 0.20, PEER), (OURS_ASYNCPG, 0.10, PEER_ASYNCPG))


@dataclass
class Contestant:
    """One way to borrow and return."""

    name: str
    borrow: Callable[[], Any]

    async def once(self) -> None:
        async with self.borrow():
            pass

    async def loop(self, n: int) -> None:
        borrow = self.borrow
        for _ in range(n):
            async with borrow():
                pass


async def leave_as_it_is(_connection: object) -> None:
    """What asyncpg's pool is told to do at each return instead of its reset."""


async def contestants(dsn: str, closing: AsyncExitStack) -> list[Contestant]:
    found = []
    for name, driver in ((OURS, "psycopg"), (OURS_ASYNCPG, "asyncpg")):
        pool = AsyncConnectionPool.from_config(
            PoolConfig(conninfo=dsn, driver=driver, name="bench")
        )
        await closing.enter_async_context(pool)
        await pool.open(wait=True)
        found.append(Contestant(name, pool.connection))
    peer = psycopg_pool.AsyncConnectionPool(dsn, min_size=1, max_size=10, open=False)
    await closing.enter_async_context(peer)
    await peer.wait()
    found.append(Contestant(PEER, peer.connection))
    plain = asyncpg.create_pool(to_url(parse(dsn)), min_size=1, reset=leave_as_it_is)
    await closing.enter_async_context(plain)
    found.append(Contestant(PEER_ASYNCPG, plain.acquire))
    return found


async def measure(found: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Nanoseconds per borrow and return, one figure per round."""
    figures: dict[str, list[float]] = {one.name: [] for one in found}
    for one in found:
        await one.loop(BORROWS)  # to warm up
    for number in range(rounds):
        at = number % len(found)
        for one in found[at:] + found[:at]:  # nobody is always behind the same one
            began = time.thread_time_ns()
            await one.loop(BORROWS)
            figures[one.name].append((time.thread_time_ns() - began) / BORROWS)
    return figures


def instructions(one: Contestant) -> int:
    """Bytecode instructions of one borrow and return that suspends nowhere; -1 if it does."""
    count = 0

    def tracer(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        return tracer

    for _ in range(2):  # 3.12 begins to report instructions with the second trace only
        count = 0
        steps = one.once()
        sys.settrace(tracer)
        try:
            steps.send(None)
        except StopIteration:
            pass
        else:
            steps.close()
            return -1
        finally:
            sys.settrace(None)
    return count


async def run(dsn: str, rounds: int) -> dict[str, dict[str, float]]:
    async with AsyncExitStack() as closing:
        found = await contestants(dsn, closing)
        times = await measure(found, rounds)
        counts = {one.name: instructions(one) for one in found[:2]}
    return {
        name: {
            "ns_minimum": round(min(each), 1),
            "ns_median": round(statistics.median(each), 1),
            "instructions": counts.get(name, -1),
        }
        for name, each in times.items()
    }


def main() -> None:
    parser = options("borrow + return without SQL, on asyncio")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's loop")
    asked = parser.parse_args()
    factory = None
    if asked.uvloop:
        import uvloop  # noqa: PLC0415  optional

        factory = uvloop.new_event_loop
    with Server() as server, asyncio.Runner(loop_factory=factory) as runner:
        figures = runner.run(run(server.conninfo(), asked.rounds))
    around = environment()
    heading("borrow + return, no SQL, one task, ns of CPU time", around)
    print_figures(figures)
    save(asked.json, "async_hot_path", around, figures)


def print_figures(figures: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            name,
            f"{one['ns_minimum']:,.0f}",
            f"{one['ns_median']:,.0f}",
            f"{figures[OURS]['ns_minimum'] / one['ns_minimum']:.2f}",
            f"{one['instructions']}" if one["instructions"] > 0 else "",
        ]
        for name, one in figures.items()
    ]
    table(["", "minimum", "median", "penstock/it", "instructions"], rows)
    for name, share, peer in GOALS:
        ratio = figures[name]["ns_minimum"] / figures[peer]["ns_minimum"]
        verdict = "PASS" if ratio <= share else "miss"
        print(f"{verdict}  {name}: {ratio:.2f} of {peer} (goal: at most {share:.2f})")
    print()


if __name__ == "__main__":
    main()
