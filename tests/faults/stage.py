"""What a row of the fault table is given: servers, proxies, pools, borrowers, and a place for its figures.

Its one job: hold what a fault needs, whatever the runtime and the driver, and end all of it. A row (see
`tests.faults.rows`) is written once, as a coroutine; `tests.contract.runtimes` drives it.

A *figure* is what was seen, the goal that issue and docs name, whether it was met, and whether it is
good enough for a test to pass. Where the goal is counted, the two are the same. Where it is a time, the test's
bound is far beyond: a busy machine is no bug.

It must not know: what a fault is. It takes no lock; figures are told by the row's own thread or task.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.contract.runtimes import Asyncio, Gevent, Threads, settled
from tests.faults.proxy import ProxyProcess

from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]

#: Seconds that anything may take that has to happen: the price of a failure.
PATIENCE = 60.0

now = time.monotonic


class Combination(NamedTuple):
    """A runtime and a driver."""

    runtime: type
    driver: str

    @property
    def needs(self):
        """What has to be installed."""
        return {self.driver, "psycopg"} | ({"gevent"} if self.runtime is Gevent else set())


COMBINATIONS = {
    "threads-psycopg": Combination(Threads, "psycopg"),
    "gevent-psycopg": Combination(Gevent, "psycopg"),
    "asyncio-psycopg": Combination(Asyncio, "psycopg"),
    "asyncio-asyncpg": Combination(Asyncio, "asyncpg"),
    "threads-psycopg2": Combination(Threads, "psycopg2"),
    "gevent-psycopg2": Combination(Gevent, "psycopg2"),
}


@dataclass(frozen=True)
class Figure:
    """One cell: what was measured, the goal, whether it was met, and whether a test may pass."""

    name: str
    value: str
    goal: str
    met: bool
    holds: bool


@dataclass
class Try:
    """One borrow: when it was asked for, lent and over (0.0: never), and how it ended."""

    asked: float
    lent: float = 0.0
    over: float = 0.0
    error: Exception | None = None
    answer: Any = None

    @property
    def good(self):
        return self.error is None

    @property
    def took(self):
        return self.over - self.asked


class Stage:
    """The row's `w`.

    Args:
        name: one of `COMBINATIONS`.
        long: whether the row takes the time that the issue's table names; otherwise a few seconds.
        seed: of `rng`.
        shared: gives a server that is running and is to be left as it is.
    """

    def __init__(self, name: str, *, long: bool = False, seed: str = "", shared: Any = None):
        self.name = name
        self.runtime = COMBINATIONS[name].runtime()
        self.driver = COMBINATIONS[name].driver
        self.long = long
        self.rng = random.Random(seed)
        self.figures: list[Figure] = []
        self._shared = shared
        self._closing = ExitStack()
        self._pools: list[Any] = []

    def play(self, row: Callable[..., Any], *, plainly: bool = False, **given: Any) -> Any:
        """Run a row's coroutine function to its end, and end what it left.

        Args:
            plainly: as a program does, by `asyncio.run` alone: what goes on in the loop is not waited for.
        """

        async def whole():
            try:
                return await row(self, **given)
            finally:
                for pool in self._pools:
                    await pool.close(timeout=1.0)

        with self._closing:
            return asyncio.run(whole()) if plainly else self.runtime.run(whole())

    # -- the world ---------------------------------------------------------------------------------

    def server(self) -> Server:
        """One that must be left as it is."""
        if self._shared is None:
            own = self.fresh_server(max_connections=250)
            self._shared = lambda: own
        server: Server = self._shared()
        return server

    def fresh_server(self, *, hba: Any = None, tls: bool = False, **settings: Any) -> Server:
        """One to mistreat."""
        options: Any = {} if hba is None else {"hba": hba}
        return self._closing.enter_context(Server(settings=settings, tls=tls, **options))

    def owns(self, context: Any) -> Any:
        """Enter a context that ends with the stage."""
        return self._closing.enter_context(context)

    def proxy(self, port: int) -> ProxyProcess:
        """A way to a server's port that can be broken."""
        return self._closing.enter_context(ProxyProcess("127.0.0.1", port))

    def pool(self, conninfo: str, **options: Any) -> Any:
        """A pool of this runtime and driver, closed at the end."""
        pool = self.runtime.pool(conninfo, driver=self.driver, **options)
        self._pools.append(pool)
        return pool

    def forget(self, pool: Any) -> None:
        """The row closes this one itself."""
        self._pools.remove(pool)

    def process(
        self, row: str, *, quiet: bool = False, module: str = "tests.faults.run", **given: Any
    ) -> Worker:
        """Another process with this runtime and driver, which runs the row's `worker`.

        Args:
            module: what is run as its main one.
            quiet: what it prints as errors is kept for `Worker.errors`.
            given: the worker's arguments.
        """
        words = [module, self.name, row, "worker"]
        worker: Worker = self._closing.enter_context(Worker(words, given, quiet=quiet))
        return worker

    async def aside(self, call: Callable[[], Any]) -> Any:
        """Run what blocks beside the loop, where there is one."""
        return await asyncio.to_thread(call) if self.runtime.asynchronous else call()

    async def pause(self, seconds: float) -> None:
        await self.runtime.pause(seconds)

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Look at it until it is true."""
        deadline = now() + PATIENCE
        while not condition():
            assert now() < deadline, f"never came true: {what}; {self._pools}"
            await self.runtime.pause(0.003)

    # -- borrowers ---------------------------------------------------------------------------------

    async def ask(self, conn: Any, query: str) -> list[tuple]:
        """A statement's rows, in the driver's spelling."""
        if self.driver == "asyncpg":
            return [tuple(row) for row in await conn.fetch(query)]
        cursor = conn.cursor()
        await settled(cursor.execute(query))
        return [] if cursor.description is None else await settled(cursor.fetchall())

    async def borrow(self, pool: Any, query: str = "", *, hold: float = 0.0, **options: Any) -> Try:
        """Borrow once, ask something, hold it for a while, give it back; errors are the answer's."""
        this = Try(now())
        try:
            async with pool.connection(**options) as conn:
                this.lent = now()
                if query:
                    this.answer = await self.ask(conn, query)
                if hold:
                    await self.runtime.pause(hold)
        except Exception as error:
            this.error = error
        this.over = now()
        return this

    def spawn(self, coro: Any) -> Any:
        """Something that goes on beside the row."""
        return self.runtime.spawn(coro)

    def crowd(self, number: int, body: Callable[[int], Any]) -> Crowd:
        """So many borrowers at once; each runs `body(its number)`."""
        return Crowd(self, [self.runtime.spawn(body(one)) for one in range(number)])

    async def loops(self, number: int, pool: Any, query: str, stop: Any, **options: Any) -> Crowd:
        """Borrowers that go on until `stop`; each gives its list of tries."""

        async def loop(_number):
            tries = []
            while not stop.is_set():
                tries.append(await self.borrow(pool, query, **options))
                await self.runtime.pause(0.001)
            return tries

        return self.crowd(number, loop)

    # -- what was seen -----------------------------------------------------------------------------

    def figure(
        self, name: str, value: Any, *, goal: str, met: bool, holds: bool | None = None
    ) -> None:
        """Tell a figure; `holds` is what a test asserts, where that is less than `met`."""
        holds = met if holds is None else holds
        self.figures.append(Figure(name, str(value), goal, bool(met), bool(holds)))

    def seconds(self, name: str, value: float, *, at_most: float, fails_at: float = 30.0) -> None:
        """Tell a time; a test fails at `fails_at` only."""
        self.figure(
            name,
            f"{value:.3f} s",
            goal=f"<= {at_most:g} s",
            met=value <= at_most,
            holds=value < fails_at,
        )

    def count(self, name: str, value: int, *, exactly: int | None = None, at_most: int = 0) -> None:
        """Tell a number, which no clock is needed for."""
        if exactly is None:
            self.figure(name, value, goal=f"<= {at_most}", met=value <= at_most)
        else:
            self.figure(name, value, goal=f"{exactly}", met=value == exactly)


class Crowd:
    """Several borrowers under way."""

    def __init__(self, stage, flights):
        self._stage = stage
        self._flights = flights

    async def all(self) -> list[Any]:
        """Wait for them; what each gave. What one raised is raised."""
        deadline = now() + PATIENCE
        while not all(flight.done for flight in self._flights):
            assert now() < deadline, "borrowers that do not come to their end"
            await self._stage.runtime.pause(0.005)
        for flight in self._flights:
            await flight.join()
            if flight.error is not None:
                raise flight.error
        return [flight.result for flight in self._flights]

    async def tries(self) -> list[Try]:
        """Of all of them, in the order in which they were asked."""
        found = [this for own in await self.all() for this in own]
        return sorted(found, key=lambda this: this.asked)


class Worker:
    """`python -m tests.faults.run` in a process of its own: says lines, gives its last as an answer."""

    def __init__(self, words, given, *, quiet=False):
        self._words = words
        self._given = given
        self._errors: Any = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115  closed at the exit
        self.process: Any = None

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self._words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        )
        self.process.stdin.write(json.dumps(self._given))
        self.process.stdin.close()
        return self

    def line(self):
        """The next thing that it says; "" when it has ended."""
        return self.process.stdout.readline().strip()

    def answer(self):
        """The last thing that it says, when it has ended."""
        *_, last = self.process.stdout.read().splitlines()
        self.process.wait(PATIENCE)
        return json.loads(last)

    def errors(self):
        """What it has printed as errors; for one that was started `quiet`."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def __exit__(self, *_exc):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self.process.stdout.close()
        if self._errors is not None:
            self._errors.close()
