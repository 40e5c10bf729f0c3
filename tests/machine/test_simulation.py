"""Every history that hypothesis can think of: `check` of world.py after each step, peace at the end."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
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
            self.world.faults_stop()
        finally:
            self.world.end()

    # -- borrowers

    @rule(owner=st.integers(0, 4), loose=st.sampled_from([False, False, False, True]))
    def borrow(self, owner: int, loose: bool) -> None:
        if self.world.may_borrow(owner):
            self.world.borrow(owner, loose=loose)
        self.world.check()

    @there_is("seats")
    @rule(which=SOME)
    def wake_up(self, which: int) -> None:
        self.world.wake_up(which % len(self.world.seats))
        self.world.check()

    @there_is("seats")
    @rule(which=SOME, timed_out=YES_OR_NO)
    def give_up(self, which: int, timed_out: bool) -> None:
        self.world.give_up(which % len(self.world.seats), timed_out=timed_out)
        self.world.check()

    @there_is("seats")
    @rule(which=SOME)
    def kill_waiter(self, which: int) -> None:
        self.world.kill_waiter(which % len(self.world.seats))
        self.world.check()

    @there_is("pings")
    @rule(which=SOME)
    def ping_ends(self, which: int) -> None:
        self.world.ping_ends(which % len(self.world.pings))
        self.world.check()

    @there_is("pings")
    @rule(which=SOME)
    def kill_pinger(self, which: int) -> None:
        self.world.kill_pinger(which % len(self.world.pings))
        self.world.check()

    @there_is("leases")
    @rule(which=SOME, reset=YES_OR_NO)
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
    @rule(which=SOME)
    def drop_lease(self, which: int) -> None:
        self.world.drop_lease(which % len(self.world.leases))
        self.world.check()

    # -- the keeper

    @there_is("flights")
    @rule(which=SOME)
    def order_is_done_and_not_answered_yet(self, which: int) -> None:
        self.world.work(which % len(self.world.flights))
        self.world.check()

    @there_is("flights")
    @rule(which=SOME)
    def order_is_answered(self, which: int) -> None:
        self.world.answer(which % len(self.world.flights))
        self.world.check()

    @there_is("flights")
    @rule()
    def oldest_order_is_answered(self) -> None:
        self.world.answer(0)
        self.world.check()

    @there_is("flights")
    @rule(which=SOME)
    def order_is_lost(self, which: int) -> None:
        self.world.lose(which % len(self.world.flights))
        self.world.check()

    @there_is("orphans")
    @rule(twice=YES_OR_NO)
    def orphan_is_brought_home(self, twice: bool) -> None:
        self.world.bring_home(twice=twice)
        self.world.check()

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0, 6.0, 25.0, 45.0, 120.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.let_pass(seconds)
        self.world.check()

    @there_is("alarms")
    @rule()
    def tick_is_due(self) -> None:
        self.world.next_alarm()
        self.world.check()

    @rule()
    def tick(self) -> None:
        self.world.tick()
        self.world.check()

    # -- the server and the watcher

    @rule(mode=st.just(Mode.UP) | st.sampled_from(Mode))
    def server_becomes(self, mode: Mode) -> None:
        self.world.server.mode = mode
        self.world.server.admit()
        self.world.check()

    @rule(which=SOME)
    def server_hangs_up(self, which: int) -> None:
        self.world.hang_up(which)
        self.world.check()

    @precondition(lambda self: bool(self.world.unnoticed()))
    @rule(which=SOME)
    def watcher_condemns(self, which: int) -> None:
        self.world.watcher_condemns(which)
        self.world.check()

    @there_is("condemned")
    @rule(which=SOME)
    def keeper_hears_of_it(self, which: int) -> None:
        self.world.keeper_hears(which % len(self.world.condemned))
        self.world.check()

    # -- the whole pool

    @rule()
    def drain(self) -> None:
        self.world.drain()
        self.world.check()

    @rule(min_size=st.integers(0, 2), more=st.integers(0, 2))
    def resize(self, min_size: int, more: int) -> None:
        self.world.resize(min_size, max(1, min_size + more))
        self.world.check()

    @rule(how=st.sampled_from(["close", "open", "open"]))
    def close_or_open(self, how: str) -> None:
        getattr(self.world, how)()
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


FIXED = settings(PLAIN, max_examples=300, derandomize=True, phases=[Phase.generate])
