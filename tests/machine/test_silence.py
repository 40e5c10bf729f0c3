"""When a server that says nothing is called silent, and when a pool is merely full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock._machine.machine import Machine, Verdict, Waiter
from penstock._machine.orders import Open
from penstock._machine.policy import Limits
from penstock._machine.slot import SlotState

if TYPE_CHECKING:
    from penstock._machine.slot import SlotRef


def machine_of(max_size, **limits):
    orphans: list[SlotRef] = []
    machine = Machine(
        Limits(min_size=0, max_size=max_size, **limits),
        orphans=orphans.append,
        random=lambda: 0.5,
    )
    machine.open(0.0)
    return machine


def opens(orders):
    return [order.slot for order in orders if isinstance(order, Open)]


def comes(machine, now):
    """A borrower who waits, and the slots that are to be opened."""
    waiter = Waiter(0, list)
    return waiter, opens(machine.queue_up(waiter, now))


def borrowed(machine, now, takes=0.0):
    """A slot that is lent, opened in so many seconds."""
    waiter, (slot,) = comes(machine, now)
    machine.opened(slot, object(), now + takes)
    given, waiter.slot = waiter.slot, None
    return given


def silence_at(machine, waiter, now):
    machine.give_up(waiter, now, timed_out=True)
    return waiter.silent_since


def test_a_connect_that_does_not_end_is_silence_after_half_a_second():
    machine = machine_of(2)
    first, slots = comes(machine, 1.0)
    second, more = comes(machine, 1.2)
    assert silence_at(machine, second, 1.4) is None
    assert silence_at(machine, first, 1.5) == 1.0
    del slots, more


def test_a_server_that_is_always_slow_is_not_silent_before_four_times_its_usual_time():
    machine = machine_of(3)
    lent = borrowed(machine, 0.0, takes=1.0)
    waiters = [comes(machine, 10.0) for _ in range(2)]
    assert silence_at(machine, waiters[0][0], 13.9) is None
    assert silence_at(machine, waiters[1][0], 14.1) == 10.0
    del lent


def test_a_callable_that_hangs_is_why_however_many_are_lent():
    machine = machine_of(3)
    lent = [borrowed(machine, 0.0), borrowed(machine, 0.0)]
    waiters = [comes(machine, 1.0) for _ in range(2)]
    (slot,) = waiters[0][1]
    slot.progress.comes_to("kwargs=token", 1.0, 10.0)
    assert silence_at(machine, waiters[0][0], 1.4) is None
    assert silence_at(machine, waiters[1][0], 1.6) == 1.0
    assert machine.silent_since(1.6) is None, "what is lent works"
    del lent, slot, waiters


def test_a_pool_that_is_full_with_a_slow_connect_beside_is_not_silent():
    machine = machine_of(3)
    lent = [borrowed(machine, 0.0), borrowed(machine, 0.0)]
    waiter, slots = comes(machine, 1.0)
    assert silence_at(machine, waiter, 9.0) is None
    assert [slot.state for slot in lent] == [SlotState.IN_USE] * 2
    del slots


def test_pings_that_others_wait_for_are_silence_too():
    machine = machine_of(2, ping_after=10.0)
    for slot in [borrowed(machine, 0.0), borrowed(machine, 0.0)]:
        machine.put(slot)
    del slot
    pingers = [Waiter(0, list) for _ in range(2)]
    for waiter in pingers:
        assert machine.take(20.0, 0) is None
        machine.queue_up(waiter, 20.0)
        assert waiter.slot is not None
        assert waiter.slot.state is SlotState.PINGING
    late, _ = comes(machine, 21.0)
    assert silence_at(machine, late, 23.0) == 20.0
    for waiter in pingers:
        assert waiter.slot is not None
        machine.pinged(waiter.slot, 23.0)
    later, _ = comes(machine, 23.0)
    assert silence_at(machine, later, 25.0) is None, "both are lent: it is full"


@pytest.mark.parametrize("answered", [False, True])
def test_an_unanswered_ping_counts_from_when_it_was_sent(answered):
    machine = machine_of(1, ping_after=10.0)
    machine.put(borrowed(machine, 0.0))
    waiter = Waiter(0, list)
    assert machine.take(20.0, 0) is None
    machine.queue_up(waiter, 20.0)
    slot, waiter.slot = waiter.slot, None
    (close,) = machine.ping_failed(slot, waiter, 20.4)
    (opening,) = opens(machine.closed(close.slot, close.reason, 20.4))
    if answered:
        machine.opened(opening, object(), 20.45)
        assert waiter.slot is opening
        return
    assert silence_at(machine, waiter, 20.6) == 20.0


def test_a_server_that_was_slow_once_is_silent_as_soon_as_any_other():
    machine = machine_of(3)
    lent = [borrowed(machine, 0.0, takes=9.0), borrowed(machine, 10.0, takes=0.1)]
    for slot in lent:
        machine.returned(slot, 20.0, Verdict.BROKEN)
    waiter, slots = comes(machine, 20.0)
    assert silence_at(machine, waiter, 21.0) == 20.0
    del slots


def test_a_ping_that_another_borrower_sent_in_vain_counts_for_those_who_waited_for_it():
    machine = machine_of(1, ping_after=10.0)
    machine.put(borrowed(machine, 0.0))
    assert machine.take(20.0, 0) is None
    waiter, _ = comes(machine, 20.0)
    other, _ = comes(machine, 20.1)
    slot, waiter.slot = waiter.slot, None
    (close,) = machine.ping_failed(slot, waiter, 20.4)
    late, _ = comes(machine, 20.5)
    (opening,) = opens(machine.closed(close.slot, close.reason, 20.5))
    assert silence_at(machine, other, 20.8) == 20.0
    assert silence_at(machine, late, 20.8) is None, "he knows of a connect of 0.3 s only"
    del opening


def test_who_leaves_for_another_reason_is_told_nothing():
    machine = machine_of(1)
    waiter, slots = comes(machine, 0.0)
    machine.give_up(waiter, 9.0, timed_out=False)
    assert waiter.silent_since is None
    del slots
