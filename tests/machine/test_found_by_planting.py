"""What no other test noticed when it was planted (tests/planted): histories of the machine, told by hand."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial

import pytest

from penstock._machine import slot as slot_module
from penstock._machine.machine import DONE, LOOK_AGAIN, SLOWLY, Machine, Phase, Verdict, Waiter
from penstock._machine.orders import Close, Open
from penstock._machine.policy import Limits
from penstock._machine.slot import CONDEMNED_EPOCH, Reason, Slot, SlotRef, SlotState
from tests.machine.interleaver import Interleaver


def machine_with(size=1, **limits):
    """A machine with `size` connections, all idle; they have their numbers for links."""
    orphans: list[SlotRef] = []  # of no interest here
    limits = {"min_size": 0, "max_size": 4} | limits
    machine = Machine(Limits(**limits), orphans=orphans.append, random=lambda: 0.5)
    orders, held = machine.open(0.0), []
    for number in range(1, size + 1):
        waiter = Waiter(number, list)
        orders += machine.queue_up(waiter, 0.0)
        for order in orders:
            if isinstance(order, Open) and order.slot.state is SlotState.OPENING:
                machine.opened(order.slot, number, 0.0)
        held.append(waiter.slot)
        waiter.slot = None
    while held:
        slot = held.pop()
        assert slot is not None
        assert machine.put(slot) == DONE
    assert len(machine.idle) == size
    return machine


def closes(orders):
    return [order for order in orders if isinstance(order, Close)]


def take(machine: Machine, now: float) -> Slot:
    slot = machine.take(now, 1)
    assert slot is not None
    return slot


def test_a_connection_whose_ping_was_answered_needs_no_other_for_a_while():
    machine = machine_with(ping_after=30.0)
    waiter = Waiter(1, list)
    assert machine.take(31.0, 1) is None
    machine.queue_up(waiter, 31.0)
    slot, waiter.slot = waiter.slot, None
    assert slot is not None and slot.state is SlotState.PINGING
    machine.pinged(slot, 31.0)
    assert machine.put(slot) == DONE
    assert machine.take(32.0, 1) is slot, "it was to be pinged again"


def test_of_four_that_nobody_needs_three_are_shrunk_where_one_is_to_stay():
    machine = machine_with(4, min_size=1, max_idle=100.0)
    assert [order.reason for order in closes(machine.tick(101.0))] == [Reason.SHRUNK] * 3


def test_who_holds_what_another_thread_may_give_back_is_no_deadlock():
    machine = machine_with(max_size=1)
    held = take(machine, 1.0)
    held.loose = True
    waiter = Waiter(1, list)
    waiter.keeps = {ref.serial for ref in machine.refs.values()}
    machine.queue_up(waiter, 1.0)
    assert waiter.refusal is None


def test_a_return_the_slow_way_counts_as_a_borrow():
    machine = machine_with()
    before = machine.borrows()
    machine.returned(take(machine, 1.0), 1.0, Verdict.CLEAN)
    assert machine.borrows() == before + 1


def test_a_child_knows_which_links_were_in_somebodys_hands():
    machine = machine_with(2)
    held = take(machine, 1.0)
    assert sorted(machine.inherited()) == [(1, True), (2, False)]
    del held
    assert sorted(machine.inherited()) == [(1, True), (2, False)], "an orphan may be, too"


def test_a_slot_of_before_a_fork_does_not_go_the_fast_way_into_the_childs_pool():
    machine = machine_with()
    held = take(machine, 1.0)
    machine.forked()
    assert machine.put(held) != DONE
    assert not machine.idle


def test_a_waiter_whose_wake_was_cut_off_is_woken_by_the_next_move():
    calls: list[None] = []

    def wake():
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt

    machine = machine_with(max_size=1)
    held = take(machine, 1.0)
    waiter = Waiter(2, wake)
    machine.queue_up(waiter, 1.0)
    with pytest.raises(KeyboardInterrupt):
        machine.returned(held, 2.0, Verdict.CLEAN)
    assert waiter.slot is held
    machine.tick(3.0)
    assert len(calls) == 2


def test_a_condemned_slot_is_not_lent_before_the_keeper_has_come_to_it():
    machine = machine_with()
    machine.idle[0].condemn(Reason.HUNG_UP)
    assert machine.take(1.0, 1) is None


def test_a_failed_connect_gives_its_right_back_at_once():
    machine = machine_with(0)
    order = next(o for o in machine.queue_up(Waiter(1, list), 0.0) if isinstance(o, Open))
    machine.open_failed(order.slot, "refused", 0.1, heals=True, sqlstate=None)
    assert not machine.refs


def test_an_orphan_comes_home_once_and_keeps_what_it_counted():
    machine = machine_with()
    ref = weakref.proxy(machine.idle[0]).ref
    before = machine.borrows()
    machine.idle.clear()  # nobody holds it any more
    assert len(closes(machine.bring_home(ref, 1.0))) == 1
    assert not closes(machine.bring_home(ref, 1.0)), "and not a second time"
    assert machine.borrows() == before


def test_a_closed_pool_is_closed_for_whoever_gives_back_while_it_closes(monkeypatch):
    machine = machine_with(2)
    held = take(machine, 1.0)
    answers = []
    drain = Machine.drain

    def drain_late(self, now):
        answers.append((self.phase, self.put(held)))
        return drain(self, now)

    monkeypatch.setattr(Machine, "drain", drain_late)
    machine.close(2.0)
    assert answers == [(Phase.CLOSED, 2)], "it was put back into a pool that is closed"


def test_condemned_and_vouched_for_at_once_a_slot_is_condemned_in_any_schedule(seeds):
    for seed in seeds:
        sim = Interleaver(seed, slot_module.__file__)
        slot = Slot(generation=0, epoch=0, now=0.0)
        sim.spawn(partial(slot.condemn, Reason.HUNG_UP), "watcher")
        sim.spawn(partial(slot.vouch, 5), "owner")
        sim.run()
        assert slot.epoch == CONDEMNED_EPOCH, f"seed {seed}"


class Idle(deque):
    """An idle deque in which others get a turn right after each append."""

    def __init__(self, slots, turn):
        super().__init__(slots)
        self.turn = turn

    def append(self, slot):
        super().append(slot)
        self.turn(slot)


def test_who_queues_up_in_the_middle_of_a_return_is_looked_for():
    machine = machine_with()
    held = take(machine, 1.0)
    waiter = Waiter(2, list)
    machine.idle = Idle((), lambda _slot: machine.waiters.update({99: weakref.ref(waiter)}))
    assert machine.put(held) == LOOK_AGAIN


def test_after_the_append_a_slot_is_not_touched_by_who_gave_it_back():
    machine = machine_with()
    held = take(machine, 1.0)

    def lend(slot):
        assert slot.state is SlotState.IDLE
        slot.state = SlotState.IN_USE
        slot.holder = 2

    machine.idle = Idle((), lend)
    machine.put(held)
    assert (held.state, held.holder) == (SlotState.IN_USE, 2)


def test_what_comes_back_while_somebody_waits_does_not_become_idle():
    machine = machine_with(max_size=1)
    held = take(machine, 1.0)
    waiter = Waiter(2, list)
    machine.queue_up(waiter, 1.0)
    assert machine.put(held) == SLOWLY
    assert not machine.idle, "a newcomer would overtake"


def test_one_connection_that_could_be_opened_ends_an_outage():
    machine = machine_with(0)
    waiter = Waiter(1, list)
    first = next(o for o in machine.queue_up(waiter, 0.0) if isinstance(o, Open))
    machine.open_failed(first.slot, "refused", 0.1, heals=True, sqlstate=None)
    second = next(o for o in machine.tick(50.0) if isinstance(o, Open))
    machine.opened(second.slot, "link", 50.1)
    assert machine.outage is None
