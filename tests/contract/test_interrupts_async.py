"""A signal's exception strikes an asyncio pool's own work, in an outage and after it: nobody is forgotten.

One job: SIGINT is pulled at one instruction after another of the pool's upkeep and of its machine, where the
handler raises KeyboardInterrupt out of the loop; the loop goes on. Whoever waited and was not struck is
served, without anybody's help, and the pool has all that is its own.

Struck are tasks, the pool's own and its borrowers', and not asyncio's code: between two tasks an interrupt
makes asyncio forget what it was about to call.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
from typing import Any

import pytest

from penstock import AsyncConnectionPool
from penstock._machine import policy
from penstock._machine.machine import Machine
from penstock.testing import AsyncFakeDriver, FakeServer, Mode
from tests.contract.interrupting import SOURCES, NoTripwire, Tripwire, unmonitor

#: At so many instructions of some 15,000; with another number, other ones.
STRIKES = 40
BORROWERS = 3
#: Whoever waits so long, in seconds, was forgotten.
PATIENCE = 5.0
STRUCK = tuple(f"{SOURCES}{name}" for name in ("async_upkeep", "async_opening", "_machine/"))


@pytest.fixture(scope="module")
def tripwire(tmp_path_factory):
    try:
        wire = Tripwire(tmp_path_factory.mktemp("tripwire"), sources=STRUCK)
    except NoTripwire as missing:
        pytest.skip(f"the tripwire needs {missing}")
    yield wire
    unmonitor()


class Play:
    """One pool on a loop of its own, whose server is down for three attempts."""

    def __init__(self, server, *, wait=True):
        self.server = server
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(
            lambda _loop, _context: None
        )  # what struck was never retrieved
        self.pool = AsyncConnectionPool(
            driver=AsyncFakeDriver(self.server), min_size=1, max_size=2, timeout=None, name="struck"
        )
        self.loop.run_until_complete(self.pool.open(wait=wait))
        self.tasks = []
        self.where = None

    def raises(self, _signal, frame):
        inside = str(frame.f_globals.get("__name__"))
        if asyncio.current_task(self.loop) is not None and inside.startswith("penstock."):
            self.where = f"{inside}:{frame.f_lineno} {frame.f_code.co_name}()"
            raise KeyboardInterrupt

    def act(self):
        self.server.mode = Mode.DOWN
        self.loop.run_until_complete(self.pool.drain())
        self.tasks = [self.loop.create_task(self.borrow()) for _ in range(BORROWERS)]
        self.go_on(lambda: self.pool._machine.tally.open_failures > 2)
        self.server.mode = Mode.UP
        self.go_on(self.all_served)

    async def borrow(self):
        async with self.pool.connection():
            pass

    def all_served(self):
        return all(task.done() for task in self.tasks)

    def go_on(self, condition):
        """Run the loop until it holds; whether it does."""

        async def turns():
            async with asyncio.timeout(PATIENCE):
                while not condition():  # noqa: ASYNC110  it is no event
                    await asyncio.sleep(0.0002)

        task = self.loop.create_task(turns())
        while not task.done():
            try:
                self.loop.run_until_complete(task)
            except TimeoutError:
                break
            except RuntimeError as error:
                # The end of a run that was struck may stop the loop once more.
                if "stopped before" not in str(error):
                    raise
        return task.exception() is None

    def faults(self):
        """What is wrong afterwards: one sentence each, none when all is well."""
        self.server.mode = Mode.UP
        found = [] if self.go_on(self.all_served) else ["somebody who waited was forgotten"]
        errors = [task.exception() for task in self.tasks if task.done()]
        found += [f"a borrower got {error!r}" for error in errors if isinstance(error, Exception)]
        self.tasks, errors = [], []
        gc.collect()

        def rests():
            stats = self.pool.stats()
            return stats.idle == stats.size == len(self.server.sessions) >= 1

        if not self.go_on(rests):
            found.append(f"{self.pool.stats()}, {len(self.server.sessions)} sessions")
        return found

    def end(self):
        self.loop.run_until_complete(self.pool.close(timeout=0))
        self.loop.close()


def play(wire, k):
    """Once, struck at instruction k; where it was struck, and how many instructions there were."""
    with FakeServer() as server:
        one = Play(server)
        before = signal.signal(signal.SIGINT, one.raises)
        try:
            _, count = wire.run(one.act, k)
        finally:
            signal.signal(signal.SIGINT, before)
        faults = one.faults()
        assert not faults, f"struck at instruction {k}, {one.where}: {faults}"
        one.end()
        return one.where, count


# A coroutine that was made and whose task was not, or the other way round, is Python's to tell.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_whatever_of_the_pools_own_is_struck_out_of_the_loop_nobody_is_forgotten(
    tripwire, monkeypatch, rng
):
    monkeypatch.setattr(policy, "FIRST_DELAYS", (0.0005, 0.0005))
    monkeypatch.setattr(policy, "SHORT_DELAY", 0.0005)
    _, count = play(tripwire, 0)
    places = set()
    for k in sorted(rng.sample(range(1, count + 1), STRIKES)):
        where, _ = play(tripwire, k)
        places.add(where)
    gc.collect()  # what was struck is told of here, and not in the next test
    assert len(places) > STRIKES // 10, places


def test_what_is_struck_between_the_connect_and_the_pool_leaves_no_session(monkeypatch):
    """Found by the test above at one instruction in two thousand; here the place is sought out."""
    stored: Any = vars(Machine)["outage"]
    left = [1]

    def looked_at(machine):
        if left and sys._getframe(1).f_code.co_name == "_open_slot":
            left.pop()
            raise KeyboardInterrupt
        return stored.__get__(machine)

    monkeypatch.setattr(Machine, "outage", property(looked_at, stored.__set__))
    with FakeServer() as server:
        one = Play(server, wait=False)
        with contextlib.suppress(KeyboardInterrupt):
            one.go_on(lambda: not left)
        assert not one.faults()
        assert not left, "nothing was struck"
        one.end()
