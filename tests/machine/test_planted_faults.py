"""The simulation is tested, too: it must find each of these faults, planted into the machine.

Every fault is a subclass of `Machine` with the sentence that says what is wrong with it. The runs
are fixed: the same histories each time, until one goes wrong.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase as Stage
from hypothesis import settings

from penstock._machine.machine import DONE, Machine, Phase, Refusal, Verdict
from penstock._machine.orders import Close
from penstock._machine.slot import SlotState
from tests.machine.test_simulation import PLAIN, simulate
from tests.machine.walker import walk

FIXED = settings(PLAIN, max_examples=400, derandomize=True, phases=[Stage.generate])

FAULTS: dict[str, type[Machine]] = {}


def fault(sentence):
    def plant(machine):
        FAULTS[sentence] = machine
        return machine

    return plant


@fault("who gives up stays in the queue")
class StaysInQueue(Machine):
    __slots__ = ()

    def give_up(self, waiter, now, *, timed_out):
        entry = self.waiters.get(waiter.ticket)
        orders = super().give_up(waiter, now, timed_out=timed_out)
        if entry is not None:
            self.waiters[waiter.ticket] = entry
        return orders


@fault("drain does not raise the epoch, and old connections are lent the fast way")
class LendsOldGeneration(Machine):
    __slots__ = ()

    def drain(self, now):
        self.generation += 1
        return self.look_again(now)


@fault("the generation of what is given back is not looked at")
class SettlesOldGeneration(Machine):
    __slots__ = ()

    def _unfit(self, slot, now):
        slot.generation = self.generation
        return super()._unfit(slot, now)


@fault("a returned slot becomes idle although somebody waits")
class ForgetsWaiters(Machine):
    __slots__ = ()

    def put(self, slot):
        slot.ref.borrows += 1
        slot.state = SlotState.IDLE
        self.idle.append(slot)
        return DONE


@fault("one connection more than max_size")
class OneTooMany(Machine):
    __slots__ = ()

    def _may_grow(self, now):
        if len(self.refs) == self.limits.max_size:
            return len(self.opening) < len(self.waiters)
        return super()._may_grow(now)


@fault("a broken connection is put back")
class PutsBackBroken(Machine):
    __slots__ = ()

    def returned(self, slot, now, verdict, *, suspect=False):
        return super().returned(slot, now, Verdict.CLEAN, suspect=suspect)


@fault("an outage has as many probes as waiters")
class ManyProbes(Machine):
    __slots__ = ()

    def _should_open(self, now, orders):
        return super()._should_open(now, orders) or self._may_grow(now)


@fault("an orphan is lent again as it is")
class LendsOrphans(Machine):
    __slots__ = ()

    def bring_home(self, ref, now):
        for order in (orders := super().bring_home(ref, now)):
            if isinstance(order, Close):
                order.slot.state = SlotState.IDLE
                self.idle.append(order.slot)
                return self.look_again(now)
        return orders


@fault("a waiter who was served stays first in line and is served again")
class ServesTwice(Machine):
    __slots__ = ()

    def _give(self, slot, waiter, now):
        slot.holder = waiter.owner
        waiter.slot = slot
        waiter.wake()

    def _first_waiter(self, now):
        for reference in self.waiters.values():
            waiter = reference()
            if waiter is not None and waiter.refusal is None:
                return waiter
        return None


@fault("a closed pool lends what is idle")
class LendsWhenClosed(Machine):
    __slots__ = ()

    def close(self, now):
        self.phase = Phase.CLOSED
        self._refuse_all(Refusal.CLOSED, now)
        return []


@fault("a connection that is too old is lent")
class LendsRetired(Machine):
    __slots__ = ()

    def take(self, now, holder):
        slot = super().take(now, holder)
        if slot is None and self.aside and now >= self.aside[-1].retire_at:
            slot = self.aside.pop()
            slot.holder, slot.borrowed_at, slot.state = holder, now, SlotState.IN_USE
        return slot


@fault("the counters of a closed slot are not folded into the pool's")
class ForgetsCounters(Machine):
    __slots__ = ()

    def closed(self, slot, reason, now):
        if slot.ref is not None:
            slot.ref.borrows = 0
        return super().closed(slot, reason, now)


@fault("suspicion casts no doubt on idle connections")
class KnowsNoDoubt(Machine):
    __slots__ = ()

    def _doubt(self):
        pass


@fault("newcomers are served first")
class LastComeFirstServed(Machine):
    __slots__ = ()

    def _first_waiter(self, now):
        first = super()._first_waiter(now)
        if first is None:
            return None
        last = next(reversed(self.waiters.values()))()
        return first if last is None or last.slot or last.refusal else last


@fault("a waiter is served and not woken")
class WakesNobody(Machine):
    __slots__ = ()

    def _let_go(self, waiter, now):
        wake, waiter.wake = waiter.wake, list
        super()._let_go(waiter, now)
        waiter.wake = wake


@fault("whose ping failed is not put back into the queue")
class LosesPinger(Machine):
    __slots__ = ()

    def _requeue(self, waiter):
        pass


@fault("a forked child keeps the parent's idle connections")
class SharesWithParent(Machine):
    __slots__ = ()

    def forked(self):
        idle = list(self.idle)
        super().forked()
        for slot in idle:
            slot.epoch, slot.generation = self.epoch, self.generation
        self.idle.extend(idle)


@fault("what the watcher condemned is lent")
class LendsCondemned(Machine):
    __slots__ = ()

    def take(self, now, holder):
        for slot in self.idle:
            slot.epoch = self.epoch
        return super().take(now, holder)


@fault("a failed connect does not give back the right to a connection")
class KeepsFailed(Machine):
    __slots__ = ()

    def open_failed(self, slot, error, now, **said):
        ref = slot.ref
        orders = super().open_failed(slot, error, now, **said)
        if ref is not None and ref.serial not in self.refs:
            self.refs[ref.serial] = ref
        return orders


@fault("nothing is ever shrunk")
class NeverShrinks(Machine):
    __slots__ = ()

    def _end_old(self, now, orders):
        pass


@fault("an outage wakes the keeper though nobody wants a connection")
class Spins(Machine):
    __slots__ = ()

    def _next_due(self, now):
        due = super()._next_due(now)
        if self.outage is not None and self.phase is Phase.OPEN and not self.opening:
            return min(due, self.outage.next_for_nobody)
        return due


@fault("a connection in somebody's hands is closed with a farewell")
class ClosesPolitely(Machine):
    __slots__ = ()

    def bring_home(self, ref, now):
        return [
            Close(order.slot, order.reason, discard=False) if isinstance(order, Close) else order
            for order in super().bring_home(ref, now)
        ]


@pytest.mark.parametrize("sentence", FAULTS)
def test_a_seeded_walk_finds_that(sentence):
    for seed in range(3000):
        try:
            walk(seed, FAULTS[sentence])
        except AssertionError as error:
            print(f"{sentence}: seed {seed}: {error}")
            return
    pytest.fail("not found")


# Those that its histories, which are shorter and fewer, come across.
EASY = [
    "who gives up stays in the queue",
    "the generation of what is given back is not looked at",
    "a returned slot becomes idle although somebody waits",
    "one connection more than max_size",
    "a broken connection is put back",
    "an outage has as many probes as waiters",
    "an orphan is lent again as it is",
    "a waiter who was served stays first in line and is served again",
    "a closed pool lends what is idle",
    "the counters of a closed slot are not folded into the pool's",
    "newcomers are served first",
    "a waiter is served and not woken",
]


@pytest.mark.parametrize("sentence", EASY)
def test_hypothesis_finds_that(sentence):
    with pytest.raises(AssertionError) as caught:
        simulate(FAULTS[sentence], FIXED)
    print(f"{sentence}: {caught.value}")


def test_nothing_is_found_where_nothing_was_planted():
    simulate(Machine, settings(FIXED, max_examples=100))
    for seed in range(500):
        walk(seed)
