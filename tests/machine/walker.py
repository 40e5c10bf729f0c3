"""Seeded walks through the world: the same steps as the simulation's, drawn by plain chance.

One job: many histories a second (about 500, against hypothesis's 100), deep ones too, each named by
its seed. Every walk draws how likely each kind of step is, so that some forget to give back, some
fork all the time, and some are nothing but waiting.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from penstock._machine.machine import Machine, Verdict
from penstock._machine.policy import Limits
from penstock.testing import Mode
from tests.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

DURATIONS = [0.01, 0.2, 1.0, 6.0, 25.0, 45.0, 120.0]
RARE = {"fork", "close", "drop", "kill waiter", "kill pinger", "lose", "resize", "drain", "migrate"}
FREQUENT = {"borrow", "wake up", "answer"}


class Walker:
    """One walk. `tell` hears of every step, for whoever wants to read a history."""

    def __init__(
        self, seed: int, machine: type[Machine] = Machine, tell: Callable[..., object] | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.tell = tell
        self.world = World(self._limits(), self.random.random, machine)
        self.weights: dict[str, float] = {}

    def _limits(self) -> Limits:
        chance = self.random
        return Limits(
            min_size=chance.randint(0, 2),
            max_size=chance.choice([2, 2, 3]),
            max_waiting=chance.choice([0, 0, 2]),
            max_lifetime=chance.choice([100.0, 1000.0]),
            max_idle=chance.choice([15.0, 40.0]),
            ping_after=5.0,
            overdue_after=20.0,
            fifo=chance.random() < 0.5,
        )

    def walk(self, steps: int) -> None:
        try:
            self.world.open()
            for _ in range(steps):
                self._step()
            self.world.faults_stop()
        finally:
            self.world.end()

    def _step(self) -> None:
        there = self._possible()
        name = self.random.choices(list(there), [self._weight(name) for name in there])[0]
        if self.tell is not None:
            self.tell(name, self.world.now, self.world.machine.count())
        there[name]()
        self.world.check()

    def _weight(self, name: str) -> float:
        """How likely a kind of step is: drawn once a walk."""
        if name not in self.weights:
            weight = self.random.choice([0.001, 0.3, 1.0, 1.0, 3.0])
            if name in FREQUENT:
                weight = max(weight, 3.0)
            self.weights[name] = weight * (0.3 if name in RARE else 1.0)
        return self.weights[name]

    # -- the steps that are possible now ----------------------------------------------------------

    def _possible(self) -> dict[str, Callable[[], object]]:
        return {
            "borrow": self._borrow,
            **self._of_borrowers(),
            **self._of_runtime(),
            **self._of_pool(),
        }

    def _of_borrowers(self) -> dict[str, Callable[[], object]]:
        world = self.world
        found: dict[str, Callable[[], object]] = {}
        if world.seats:
            found["wake up"] = lambda: world.wake_up(self._one_of(world.seats))
            found["give up"] = lambda: world.give_up(
                self._one_of(world.seats), timed_out=self._even()
            )
            found["kill waiter"] = lambda: world.kill_waiter(self._one_of(world.seats))
        if world.pings:
            found["ping"] = lambda: world.ping_ends(self._one_of(world.pings))
            found["kill pinger"] = lambda: world.kill_pinger(self._one_of(world.pings))
        if world.leases:
            found["give back"] = self._give_back
            found["give back clean"] = lambda: world.give_back(
                self._one_of(world.leases), Verdict.CLEAN, suspect=False, reset=self._seldom()
            )
            found["migrate"] = lambda: world.meet_migration(
                self._one_of(world.leases), ends=self._seldom()
            )
            found["drop"] = lambda: world.drop_lease(self._one_of(world.leases))
        return found

    def _of_runtime(self) -> dict[str, Callable[[], object]]:
        world = self.world
        found: dict[str, Callable[[], object]] = {}
        found["time"] = lambda: world.let_pass(self.random.choice(DURATIONS), late=self._seldom())
        found["tick"] = world.tick
        if world.alarms:
            found["alarm"] = world.next_alarm
        if world.flights:
            found["work"] = lambda: world.work(self._one_of(world.flights))
            found["answer"] = lambda: world.answer(self._one_of(world.flights))
            found["lose"] = lambda: world.lose(self._one_of(world.flights))
        if world.orphans:
            found["home"] = lambda: world.bring_home(twice=self._even())
        if world.unnoticed():
            found["condemn"] = lambda: world.watcher_condemns(self.random.randrange(8))
        if world.condemned:
            found["hear"] = lambda: world.keeper_hears(self._one_of(world.condemned))
        return found

    def _of_pool(self) -> dict[str, Callable[[], object]]:
        world = self.world
        return {
            "mode": self._mode,
            "hang up": lambda: world.hang_up(self.random.randrange(8)),
            "open": world.open,
            "close": world.close,
            "ask": world.ask,
            "drain": world.drain,
            "resize": self._resize,
            "fork": lambda: world.fork(greenlets=self._even()),
        }

    def _borrow(self) -> None:
        owner = self.random.randint(0, 4)
        if self.world.may_borrow(owner):
            self.world.borrow(owner, loose=self._seldom())

    def _give_back(self) -> None:
        verdict = self.random.choice(list(Verdict))
        index = self._one_of(self.world.leases)
        self.world.give_back(index, verdict, suspect=self._even(), reset=False)

    def _mode(self) -> None:
        self.world.server.mode = self.random.choice([Mode.UP, Mode.UP, *Mode])
        self.world.server.admit()

    def _resize(self) -> None:
        min_size = self.random.randint(0, 2)
        self.world.resize(min_size, max(1, min_size + self.random.randint(0, 2)))

    def _one_of(self, things: list[Any]) -> int:
        return self.random.randrange(len(things))

    def _even(self) -> bool:
        return self.random.random() < 0.5

    def _seldom(self) -> bool:
        return self.random.random() < 0.25


def steps_of(seed: int) -> int:
    """Short walks fail in ways that are easy to read, long ones get further."""
    return (10, 25, 60)[seed % 3]


def walk(seed: int, machine: type[Machine] = Machine) -> None:
    """One history; raises what goes wrong in it."""
    Walker(seed, machine).walk(steps_of(seed))
