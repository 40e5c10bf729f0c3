"""Histories that the simulation found, told by hand: each was a bug of the machine once."""

from __future__ import annotations

from penstock._machine.machine import DONE, Machine, Refusal, Verdict, Waiter
from penstock._machine.orders import Close, Open, TickAt
from penstock._machine.policy import Limits
from penstock._machine.slot import Reason, Slot, SlotRef, SlotState
from penstock._machine.stats import snapshot


def machine_with(**limits):
    orphans: list[SlotRef] = []  # of no interest here
    return Machine(Limits(**limits), orphans=orphans.append, random=lambda: 0.5)


def only(orders, kind):
    found = [order for order in orders if isinstance(order, kind)]
    assert len(found) == 1, orders
    return found[0]


def ticks(orders):
    return [order.when for order in orders if isinstance(order, TickAt)]


def open_one(machine, now, owner=1) -> tuple[Slot, Waiter]:
    """A borrower comes, finds nothing idle, and gets a new connection."""
    waiter = Waiter(owner, list)
    order = only(machine.queue_up(waiter, now), Open)
    machine.opened(order.slot, object(), now)
    slot, waiter.slot = waiter.slot, None
    assert slot is order.slot
    return slot, waiter


def test_an_outage_that_nobody_minds_any_more_wakes_nobody():
    machine = machine_with(min_size=0)
    machine.open(0.0)
    waiter = Waiter(1, list)
    order = only(machine.queue_up(waiter, 0.0), Open)
    machine.open_failed(order.slot, "refused", 0.1, heals=True, sqlstate=None)
    machine.give_up(waiter, 0.12, timed_out=True)
    assert not ticks(machine.tick(0.2)), "it was asked to come again at once, for ever"
    assert not ticks(machine.tick(50.0))


def test_shrinking_twice_before_a_close_is_answered_does_not_go_below_min_size():
    machine = machine_with(min_size=1, max_size=2, max_idle=100.0)
    orders = machine.open(0.0)
    slots = [only(orders, Open).slot]
    waiters = [Waiter(1, list), Waiter(2, list)]
    orders = [*machine.queue_up(waiters[0], 0.0), *machine.queue_up(waiters[1], 0.0)]
    slots.append(only(orders, Open).slot)
    for slot in slots:
        machine.opened(slot, object(), 0.0)
    for waiter in waiters:
        assert waiter.slot is not None
        assert machine.put(waiter.slot) == DONE
    closed = only(machine.tick(100.0), Close)
    assert closed.reason is Reason.SHRUNK
    again = machine.tick(100.0)
    assert not [order for order in again if isinstance(order, Close)]
    assert all(when > 100.0 for when in ticks(again))


def test_a_connection_that_comes_back_overdue_is_still_shrunk():
    machine = machine_with(min_size=0, max_idle=100.0, overdue_after=60.0)
    machine.open(0.0)
    slot, _ = open_one(machine, 0.0)
    due = ticks(machine.tick(60.0))
    assert due, "overdue, and said so: from here on nobody would have looked again"
    assert machine.put(slot) == DONE
    while due and due[0] < 1000.0:
        now = due[0]
        orders = machine.tick(now)
        if any(isinstance(order, Close) and order.reason is Reason.SHRUNK for order in orders):
            return
        due = ticks(orders)
    raise AssertionError("never shrunk")


def test_a_connection_that_comes_back_is_still_shrunk_when_nothing_is_ever_overdue():
    machine = machine_with(min_size=0, max_idle=100.0, overdue_after=float("inf"))
    machine.open(0.0)
    _slot, _ = open_one(machine, 0.0)
    assert ticks(machine.tick(0.0))


def test_a_smaller_min_size_lets_what_is_idle_shrink():
    machine = machine_with(min_size=1, max_idle=100.0, max_lifetime=float("inf"))
    machine.opened(only(machine.open(0.0), Open).slot, object(), 0.0)
    machine.tick(70.0)
    assert ticks(machine.resize(0, 10, 71.0)) == [100.0]


def test_a_tick_that_was_lost_to_an_interrupt_is_ordered_again():
    machine = machine_with(min_size=0, max_idle=100.0)
    machine.open(0.0)
    held = open_one(machine, 0.0)  # its TickAt is lost here
    waiter = Waiter(2, list)
    orders = machine.queue_up(waiter, 500.0)
    order = only(orders, Open)
    assert ticks(orders + machine.opened(order.slot, object(), 500.0))
    del held


def test_two_whose_pings_fail_keep_their_order():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    first, second, third = Waiter(1, list), Waiter(2, list), Waiter(3, list)
    slots = [open_one(machine, 0.0, owner)[0] for owner in (7, 8)]
    for waiter in (first, second, third):
        machine.queue_up(waiter, 1.0)
    for slot in slots:
        slot.reset_pending = True
        machine.returned(slot, 2.0, Verdict.CLEAN)
    del slot, slots
    for waiter in (first, second):
        assert waiter.slot is not None
        assert waiter.slot.state is SlotState.PINGING
        machine.ping_failed(waiter.slot, waiter, 3.0)
    assert machine.waiting() == [first, second, third]


def test_who_is_refused_after_a_failed_ping_is_counted():
    machine = machine_with(min_size=0, max_size=1)
    machine.open(0.0)
    slot, _ = open_one(machine, 0.0)
    waiter = Waiter(2, list)
    machine.queue_up(waiter, 1.0)
    slot.reset_pending = True
    machine.returned(slot, 1.0, Verdict.CLEAN)
    machine.close(2.0)
    machine.ping_failed(slot, waiter, 3.0)
    assert waiter.refusal is Refusal.CLOSED
    assert snapshot(machine, "it", 3.0).refused == 1


def test_who_was_refused_just_before_his_time_was_up_did_not_time_out_as_well():
    machine = machine_with(min_size=0)
    machine.open(0.0)
    waiter = Waiter(1, list)
    machine.queue_up(waiter, 0.0)
    machine.close(1.0)
    machine.give_up(waiter, 1.0, timed_out=True)
    stats = snapshot(machine, "it", 1.0)
    assert (stats.refused, stats.timeouts) == (1, 0)


def test_what_a_greenlet_was_given_before_a_fork_is_not_the_childs_to_close():
    machine = machine_with(min_size=0)
    machine.open(0.0)
    slot, waiter = open_one(machine, 0.0)
    waiter.slot = slot  # given, and not touched yet
    machine.forked()
    assert machine.give_up(waiter, 1.0, timed_out=False) == []


def test_a_wrong_password_is_not_tried_every_second_while_nobody_waits():
    machine = machine_with(min_size=1)
    slot = only(machine.open(0.0), Open).slot
    now, tries = 0.0, 0
    while now < 600.0:
        orders = machine.open_failed(slot, "no", now, heals=False, sqlstate="28P01")
        tries += 1
        now = min(ticks(orders))
        slot = only(machine.tick(now), Open).slot
    assert tries < 60


def test_a_connection_put_back_in_the_very_moment_of_close_does_not_stay():
    machine = machine_with(min_size=0, max_idle=float("inf"), max_lifetime=float("inf"))
    machine.open(0.0)
    slot, _ = open_one(machine, 0.0)
    # put() has compared the epochs; before its next opcode another thread closes the pool.
    due = min(ticks(machine.close(1.5)))
    slot.state = SlotState.IDLE
    machine.idle.append(slot)
    assert only(machine.tick(due), Close).reason is Reason.POOL_CLOSED


def test_who_leaves_with_an_unread_reset_in_his_hands_passes_it_on():
    machine = machine_with(min_size=0, max_size=1)
    machine.open(0.0)
    slot, _ = open_one(machine, 0.0)
    leaving, next_one = Waiter(2, list), Waiter(3, list)
    machine.queue_up(leaving, 1.0)
    machine.queue_up(next_one, 1.0)
    slot.reset_pending = True
    machine.returned(slot, 1.0, Verdict.CLEAN)
    machine.give_up(leaving, 1.0, timed_out=False)
    assert next_one.slot is slot
    assert slot.state is SlotState.PINGING


def test_a_connection_that_was_given_and_never_touched_is_no_proof_of_life():
    machine = machine_with(min_size=0, max_size=2)
    machine.open(0.0)
    suspicious, _ = open_one(machine, 0.0, owner=1)
    slot, waiter = open_one(machine, 0.0, owner=2)
    waiter.slot = slot  # given, and not touched
    machine.returned(suspicious, 1.0, Verdict.BROKEN, suspect=True)
    next_one = Waiter(3, list)
    machine.queue_up(next_one, 1.0)
    machine.give_up(waiter, 1.0, timed_out=False)
    assert next_one.slot is slot
    assert slot.state is SlotState.PINGING, "it was to be pinged first: the other's end casts doubt"
