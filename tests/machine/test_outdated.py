"""A migration has made what drivers remember outdated: the machine's rule for all connections."""

from __future__ import annotations

from penstock._machine.machine import REPLACE_AGAIN, SLOWLY, Verdict, Waiter
from penstock._machine.orders import Close
from penstock._machine.slot import SlotState
from tests.machine.test_found_by_simulation import machine_with, open_one


def two_lent():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    return machine, open_one(machine, 0.0)[0], open_one(machine, 0.0)[0]


def taken(machine, now):
    """What a borrower gets who queues up."""
    waiter = Waiter(7, list)
    machine.queue_up(waiter, now)
    slot, waiter.slot = waiter.slot, None
    return slot


def test_each_connection_forgets_before_it_is_lent_again():
    machine, one, other = two_lent()
    machine.returned(other, 1.0, Verdict.CLEAN)
    machine.outdated(one, 1.0, ends=False)
    assert machine.put(one) == SLOWLY
    machine.returned(one, 1.0, Verdict.CLEAN)
    for _ in range(2):
        assert machine.take(1.0, 7) is None
        slot = taken(machine, 1.0)
        assert (slot.state, slot.outdated) == (SlotState.PINGING, True)
        slot.outdated = False  # as the runtime does that has it forget
        machine.pinged(slot, 1.0)
        assert slot.epoch == machine.epoch


def test_a_connection_that_is_pinged_when_a_migration_is_met_is_pinged_once_more():
    machine, one, other = two_lent()
    machine.returned(other, 1.0, Verdict.CLEAN)
    machine.doubt(1.0)
    slot = taken(machine, 1.0)
    assert (slot, slot.outdated) == (other, False)
    machine.outdated(one, 1.0, ends=False)
    machine.pinged(slot, 1.0)
    assert slot.epoch != machine.epoch, "who gets it would use what it remembers"
    machine.reconsider(slot, Waiter(7, list), 1.0)
    assert slot.state is SlotState.PINGING


def test_a_connection_opened_afterwards_has_nothing_to_forget():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    one, _ = open_one(machine, 0.0)
    machine.outdated(one, 1.0, ends=False)
    other, _ = open_one(machine, 1.0)
    machine.returned(other, 1.0, Verdict.CLEAN)
    assert machine.take(1.0, 7) is other


def test_where_only_a_new_session_helps_all_are_replaced():
    machine, one, other = two_lent()
    machine.returned(other, 1.0, Verdict.CLEAN)
    orders = machine.outdated(one, 1.0, ends=True)
    orders += machine.returned(one, 1.0, Verdict.CLEAN)
    assert [order.slot for order in orders if isinstance(order, Close)] == [other, one]


def test_a_program_that_fails_over_new_sessions_too_has_only_its_own_ended_for_a_minute():
    machine, one, other = two_lent()
    machine.outdated(one, 1.0, ends=True)
    first = machine.generation
    machine.outdated(other, REPLACE_AGAIN, ends=True)
    assert machine.generation == first
    assert other.condemned
    machine.outdated(other, REPLACE_AGAIN + 1.0, ends=True)
    assert machine.generation > first


def test_what_was_lent_before_a_fork_says_nothing_of_the_childs_connections():
    machine, one, _ = two_lent()
    machine.forked()
    assert not machine.outdated(one, 1.0, ends=True)
    assert one.condemned is None
