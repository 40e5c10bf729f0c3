"""A session has stopped answering in the middle of its lease: the machine's rule for all others."""

from __future__ import annotations

from penstock._machine.machine import DONE, SLOWLY, Waiter
from penstock._machine.slot import SlotState
from tests.machine.test_found_by_simulation import machine_with, open_one


def test_whoever_takes_an_idle_connection_after_a_doubt_pings_it_first():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    slot, _ = open_one(machine, 0.0)
    assert machine.put(slot) == DONE
    assert not machine.doubt(1.0), "nothing to carry out: who borrows next looks"
    assert machine.take(1.0, 2) is None
    waiter = Waiter(2, list)
    machine.queue_up(waiter, 1.0)
    assert waiter.slot is slot
    assert slot.state is SlotState.PINGING


def test_what_is_opened_or_given_back_after_a_doubt_is_above_it():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    machine.doubt(0.0)
    slot, _ = open_one(machine, 0.0)
    assert machine.put(slot) == DONE
    assert machine.take(1.0, 2) is slot


def test_a_connection_that_was_lent_during_the_doubt_comes_back_the_slow_way():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    slot, _ = open_one(machine, 0.0)
    machine.doubt(1.0)
    assert machine.put(slot) == SLOWLY
