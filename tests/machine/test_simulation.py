"""Histories by hypothesis and by chance: `check` of world.py after each step, peace at the end.

More of them: `pytest tests/machine/test_simulation.py --seeds=20000`.
"""

from __future__ import annotations

import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock._machine.machine import Machine, Verdict
from penstock._machine.policy import Limits
from penstock.testing import Mode
from tests.machine.walker import DURATIONS, walk
from tests.machine.world import World

SOME = st.integers(0, 7)  # which one of those there are
YES_OR_NO = st.booleans()
LIMITS = st.builds(
    Limits,
    min_size=st.integers(0, 2),
    max_size=st.integers(2, 3) | st.just(2),
    max_waiting=st.sampled_from([0, 0, 2]),
    max_lifetime=st.sampled_from([100.0, 1000.0]),
    max_idle=st.sampled_from([40.0, 15.0]),
    ping_after=st.just(5.0),
    overdue_after=st.just(20.0),
    fifo=YES_OR_NO,
)


def there_is(name: str) -> Any:
    return precondition(lambda self: bool(getattr(self.world, name)))


class Simulation(RuleBasedStateMachine):
    """The rules; which machine is simulated, a subclass may say (test_planted_faults.py)."""

    machine: type[Machine] = Machine

    @initialize(limits=LIMITS, chance=st.sampled_from([0.0, 0.5, 1.0]), mode=st.sampled_from(Mode))
    def begin(self, limits: Limits, chance: float, mode: Mode) -> None:
        self.world = World(limits, lambda: chance, self.machine)
        self.world.server.mode = mode if chance == 1.0 else Mode.UP
        self.world.open()
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if sys.exc_info()[0] is None:  # else this would hide what went wrong
                self.world.faults_stop()
        finally:
            self.world.end()

    # -- what mostly happens

    @rule(owner=st.integers(0, 4), loose=st.sampled_from([False, False, False, True]))
    def borrow(self, owner: int, loose: bool) -> None:
        if self.world.may_borrow(owner):
            self.world.borrow(owner, loose=loose)
        self.world.check()

    @rule(owner=st.integers(0, 4), steps=st.integers(1, 12))
    def borrow_and_all_runs_on(self, owner: int, steps: int) -> None:
        self.borrow(owner, False)
        self.world.run_on(steps)

    @rule(steps=st.integers(1, 12))
    def all_runs_on(self, steps: int) -> None:
        self.world.run_on(steps)

    @there_is("leases")
    @rule(which=SOME, reset=st.sampled_from([False, False, True]))
    def give_back_clean(self, which: int, reset: bool) -> None:
        index = which % len(self.world.leases)
        self.world.give_back(index, Verdict.CLEAN, suspect=False, reset=reset)
        self.world.check()

    @there_is("leases")
    @rule(which=SOME, verdict=st.sampled_from(Verdict), suspect=YES_OR_NO)
    def give_back(self, which: int, verdict: Verdict, suspect: bool) -> None:
        index = which % len(self.world.leases)
        self.world.give_back(index, verdict, suspect=suspect, reset=False)
        self.world.check()

    @there_is("leases")
    @rule(which=SOME, ends=YES_OR_NO)
    def meet_migration(self, which: int, ends: bool) -> None:
        self.world.meet_migration(which % len(self.world.leases), ends=ends)
        self.world.check()

    @there_is("flights")
    @rule(which=SOME, late=st.sampled_from([False, False, True]))
    def order_is_carried_out(self, which: int, late: bool) -> None:
        index = which % len(self.world.flights)
        if late:
            self.world.work(index)
        else:
            self.world.answer(index)
        self.world.check()

    @there_is("pings")
    @rule(which=SOME)
    def ping_ends(self, which: int) -> None:
        self.world.ping_ends(which % len(self.world.pings))
        self.world.check()

    @precondition(lambda self: any(seat.woken for seat in self.world.seats))
    @rule(which=SOME)
    def wake_up(self, which: int) -> None:
        woken = [index for index, seat in enumerate(self.world.seats) if seat.woken]
        self.world.wake_up(woken[which % len(woken)])
        self.world.check()

    @rule(seconds=st.sampled_from(DURATIONS), late=st.sampled_from([False, False, True]))
    def time_passes(self, seconds: float, late: bool) -> None:
        self.world.let_pass(seconds, late=late)
        self.world.check()

    @there_is("alarms")
    @rule()
    def tick_is_due(self) -> None:
        self.world.next_alarm()
        self.world.check()

    # -- what goes wrong

    @rule(mode=st.just(Mode.UP) | st.sampled_from(Mode))
    def server_becomes(self, mode: Mode) -> None:
        self.world.server.mode = mode
        self.world.server.admit()
        self.world.check()

    @rule(which=SOME, watched=YES_OR_NO)
    def server_hangs_up(self, which: int, watched: bool) -> None:
        self.world.hang_up(which)
        if watched and self.world.unnoticed():
            self.world.watcher_condemns(which)
        self.world.check()

    @there_is("condemned")
    @rule(which=SOME)
    def keeper_hears_of_it(self, which: int) -> None:
        self.world.keeper_hears(which % len(self.world.condemned))
        self.world.check()

    @there_is("orphans")
    @rule(twice=YES_OR_NO)
    def orphan_is_brought_home(self, twice: bool) -> None:
        self.world.bring_home(twice=twice)
        self.world.check()

    @there_is("seats")
    @rule(which=SOME, how=st.sampled_from(["times out", "is cancelled", "dies"]))
    def waiter_leaves(self, which: int, how: str) -> None:
        index = which % len(self.world.seats)
        if how == "dies":
            self.world.kill_waiter(index)
        else:
            self.world.give_up(index, timed_out=how == "times out")
        self.world.check()

    @rule(which=SOME, what=st.sampled_from(["pings", "leases", "flights"]))
    def somebody_is_killed(self, which: int, what: str) -> None:
        there = getattr(self.world, what)
        kill = {
            "pings": self.world.kill_pinger,
            "leases": self.world.drop_lease,
            "flights": self.world.lose,
        }
        if there:
            kill[what](which % len(there))
        self.world.check()

    # -- the whole pool

    @rule(how=st.sampled_from(["tick", "drain", "open", "close and open", "close", "ask", "ask"]))
    def somebody_says(self, how: str) -> None:
        for word in how.split(" and "):
            getattr(self.world, word)()
            self.world.check()

    @rule(min_size=st.integers(0, 2), more=st.integers(0, 2))
    def resize(self, min_size: int, more: int) -> None:
        self.world.resize(min_size, max(1, min_size + more))
        self.world.check()

    @rule(greenlets=YES_OR_NO)
    def fork(self, greenlets: bool) -> None:
        self.world.fork(greenlets=greenlets)
        self.world.check()


PLAIN = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def simulate(machine: type[Machine], how: settings) -> None:
    """Run the simulation with this machine; raises what the first history raises that goes wrong."""
    simulation = type("Simulation", (Simulation,), {"machine": machine})
    run_state_machine_as_test(simulation, settings=how)


def test_every_history_keeps_the_invariants_and_ends_at_rest():
    simulate(Machine, PLAIN)


def test_every_seeded_walk_keeps_them_too(seeds):
    for seed in [*seeds, *range(seeds[-1] + 1, seeds[-1] + 2 * len(seeds))]:
        try:
            walk(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")
