"""A queue that refuses, in any schedule: nobody is left to sleep beside a connection that is free.

One job: `max_waiting=1` with borrows that all come the slow way (`ping_after=0.0`), one opcode at a
time; `pytest --seeds=1000` for more.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest

from penstock._machine import machine as machine_module
from penstock._machine.machine import Machine, Refusal, Waiter
from penstock._machine.orders import Open
from penstock._machine.policy import Limits
from penstock._machine.slot import SlotState
from tests.machine.interleaver import Deadlock, Interleaver, SimGate
from tests.machine.pond import Pond

#: All that decides, in whichever file it is.
WATCHED = [str(path) for path in Path(machine_module.__file__).parent.glob("*.py")]


class FullPond(Pond):
    """Borrowers who may be told that too many wait already, and are patient otherwise."""

    refused = 0

    def wait_for_slot(self, *, may_time_out):
        gate = SimGate(self.sim)
        waiter = Waiter(threading.get_ident(), gate.wake)
        with self.lock:
            orders = self.machine.queue_up(waiter, self.now)
        self.carry_out(orders)
        if waiter.refusal is Refusal.TOO_MANY:
            self.refused += 1
            return None
        assert waiter.refusal is None
        gate.wait(may_time_out=may_time_out)
        slot, waiter.slot = waiter.slot, None
        assert slot is not None
        if slot.state is SlotState.PINGING:
            with self.lock:
                orders = self.machine.pinged(slot, self.now)
            self.carry_out(orders)
        return slot


def run_full_queue(seed):
    sim = Interleaver(seed, *WATCHED)
    size = sim.random.choice([1, 1, 2])
    pond = FullPond(sim, Limits(min_size=0, max_size=size, max_waiting=1, ping_after=0.0))
    pond.borrowers = sim.random.choice([3, 4])
    for number in range(pond.borrowers):
        times = sim.random.choice([1, 2, 3])
        work = partial(pond.borrow_and_return, times, may_time_out=False)
        sim.spawn(work, f"borrower-{number}")
    sim.spawn(pond.keep, "keeper")
    sim.run()
    while pond.todo:
        pond.carry_out(pond.answer(pond.todo.pop(0)))
    pond.check_rest()
    return pond


def test_whoever_waits_is_served_in_any_schedule_though_others_are_refused(seeds):
    served = refused = 0
    for seed in seeds:
        try:
            pond = run_full_queue(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")
        served += pond.served
        refused += pond.refused
    print(f"{len(seeds)} schedules: {served} served, {refused} refused")
    assert served >= len(seeds)
    assert refused > 0


def refuse_without_a_look(machine, waiter, now):
    """What `queue_up` must not be: whoever is sent away leaves at once."""
    waiter.refusal = machine._refusal(waiter, now)
    if waiter.refusal is not None:
        return []
    return QUEUE_UP(machine, waiter, now)


QUEUE_UP = Machine.queue_up


def test_the_interleaver_finds_the_sleeper_when_a_refusal_does_not_look_again(monkeypatch):
    monkeypatch.setattr(Machine, "queue_up", refuse_without_a_look)
    for seed in range(900, 3900):  # what comes before only takes time
        try:
            run_full_queue(seed)
        except Deadlock as found:
            print(f"found at seed {seed}: {found}")
            return
    pytest.fail("a borrower who left a free connection aside was never met")


def test_a_refused_borrower_leaves_what_he_put_aside_to_the_one_who_waits():
    """The history as it was found: put and take cross each other, and then the queue is full."""
    limits = Limits(min_size=0, max_size=1, max_waiting=1, ping_after=30.0)
    machine = Machine(limits, orphans=lambda ref: None, random=lambda: 0.5)
    machine.open(0.0)
    holder = Waiter(1, lambda: None)
    [opening] = [each for each in machine.queue_up(holder, 0.0) if isinstance(each, Open)]
    machine.opened(opening.slot, object(), 0.0)
    slot, holder.slot = holder.slot, None
    assert slot is not None

    # `put` compared and found nobody; now somebody queues up, finds nothing, and sleeps.
    waiter = Waiter(2, lambda: None)
    machine.queue_up(waiter, 40.0)
    slot.state = SlotState.IDLE
    machine.idle.append(slot)  # the second half of `put`
    taken = machine._pop()  # the first half of another's `take`, for whom it was lent too long ago
    machine.look_again(40.0)  # what `put` ends with: there is nothing to see
    machine.aside.append(taken)  # the second half of `take`

    newcomer = Waiter(3, lambda: None)
    machine.queue_up(newcomer, 40.0)
    assert newcomer.refusal is Refusal.TOO_MANY
    assert waiter.slot is slot
