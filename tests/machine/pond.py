"""A machine with everything that it has to be told: a small runtime, for the interleaver.

One job: play borrowers, keeper and server against a real `Machine` in the threads of an
`Interleaver`, and check after each step that no connection is lent twice.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import TYPE_CHECKING

from penstock._machine import machine as machine_module
from penstock._machine import slot as slot_module
from penstock._machine.machine import LOOK_AGAIN, SLOWLY, Machine, Refusal, Verdict, Waiter
from penstock._machine.orders import Close, Open, Order
from penstock._machine.policy import Limits
from penstock._machine.slot import Reason, Slot, SlotRef, SlotState
from penstock._pool import two_ends
from penstock._pool.sync import lease as lease_module
from penstock._pool.sync.lease import LeaseInTurns
from penstock._pool.two_ends import Entering
from penstock._process.clock import clock
from penstock.errors import MisuseError
from tests.machine.interleaver import Interleaver, SimGate, SimLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock._pool.sync.lease import Lease

WATCHED = (machine_module.__file__, slot_module.__file__, lease_module.__file__, two_ends.__file__)


class FakeHandle:
    """A libpq handle that is always at rest."""

    transaction_status = 0
    pipeline_status = 0


class FakeLink:
    """A connection that knows who has it; of psycopg's shape, so that every lease can use it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.conn = self
        self.attributes: dict[str, object] = {"pgconn": None}
        self.handle = FakeHandle()
        self.dead = None
        self.touched: set[str] = set()
        self.holder: str | None = None
        self.closed = False
        self.generation = 0

    def lend(self) -> None:
        self.attributes["pgconn"] = self.handle

    def park(self) -> bool:
        self.attributes["pgconn"] = self.dead
        return True


class Pond:
    """The runtime. `borrow_and_return` is what a borrower does, `keep` what the keeper does."""

    def __init__(
        self,
        interleaver: Interleaver,
        limits: Limits,
        *,
        put: Callable[[Machine, Slot], int] = Machine.put,
    ) -> None:
        self.sim = interleaver
        self.lock = SimLock(interleaver)
        self.orphans: queue.SimpleQueue[SlotRef] = queue.SimpleQueue()
        self.machine = Machine(limits, orphans=self.orphans.put, random=lambda: 0.5)
        self.put = put
        self.todo: list[Order] = []
        self.links = 0
        self.refused = 0
        self.inside = False
        self._entering = Entering()
        self._left_behind: list[object] = []
        self.served = 0
        self.timed_out = 0
        self.borrowers = 0
        self.now = clock()  # leases read the real one
        self.carry_out(self.machine.open(self.now))

    # -- borrowers --------------------------------------------------------------------------------

    def borrow_and_return(self, times: int, *, may_time_out: bool = True) -> None:
        for _ in range(times):
            slot = self.machine.take(self.now, threading.get_ident())
            if slot is None:
                slot = self.wait_for_slot(may_time_out=may_time_out)
            if slot is None:
                self.timed_out += 1
            else:
                self.use(slot)
                self.give_back(slot)
                del slot
        self.borrowers -= 1

    def lease(self, kind: type[Lease[FakeLink]], times: int) -> None:
        """What a borrower does in a program: `with pool.connection() as conn`."""
        for _ in range(times):
            lease = kind()
            lease._pool = self  # type: ignore[assignment]  # all of a pool that a lease needs
            lease._slot = None
            with lease as link:
                assert link.attributes["pgconn"] is link.handle
                self.touch(link)
        self.borrowers -= 1

    def kept(self) -> LeaseInTurns[FakeLink]:
        """A lease as a pool makes it where there is no global lock."""
        lease = LeaseInTurns[FakeLink]()
        lease._pool = self  # type: ignore[assignment]  # as above
        lease._slot = None
        lease._round = {}
        return lease

    def share(self, lease: LeaseInTurns[FakeLink], times: int) -> None:
        """What must not be: several borrowers who have kept one lease."""
        for _ in range(times):
            try:
                link = lease.__enter__()
            except MisuseError:
                self.refused += 1
                continue
            assert not self.inside, "two are inside of one lease"
            self.inside = True
            assert link.attributes["pgconn"] is link.handle
            self.touch(link)
            self.inside = False
            lease.__exit__(None, None, None)
        self.borrowers -= 1

    @property
    def _reporter(self) -> Pond:
        return self

    def misuse(self, what: str, next_step: str) -> MisuseError:
        return MisuseError(what, next_step=next_step)

    def _cut_short(self) -> None:
        """Nothing to do: nobody is interrupted here."""

    @property
    def _machine(self) -> Machine:
        return self.machine

    def _borrow_slowly(self) -> Slot:
        slot = self.wait_for_slot(may_time_out=False)
        assert slot is not None
        return slot

    def _give_back(self, slot: Slot, error: BaseException | None) -> None:
        assert error is None, error
        with self.lock:
            orders = self.machine.returned(slot, self.now, Verdict.CLEAN)
        self.carry_out(orders)

    def _look_again(self) -> None:
        with self.lock:
            orders = self.machine.look_again(self.now)
        self.carry_out(orders)

    def wait_for_slot(self, *, may_time_out: bool) -> Slot | None:
        gate = SimGate(self.sim)
        waiter = Waiter(threading.get_ident(), gate.wake)
        with self.lock:
            orders = self.machine.queue_up(waiter, self.now)
        self.carry_out(orders)
        while True:
            gate.wait(may_time_out=may_time_out)
            slot = waiter.slot
            if slot is not None:
                waiter.slot = None
                if slot.state is SlotState.PINGING:
                    with self.lock:
                        orders = self.machine.pinged(slot, self.now)
                    self.carry_out(orders)
                return slot
            if waiter.refusal is not None:
                assert waiter.refusal is Refusal.CLOSED
                return None
            with self.lock:
                orders = self.machine.give_up(waiter, self.now, timed_out=True)
            self.carry_out(orders)
            return None

    def use(self, slot: Slot) -> None:
        assert slot.state is SlotState.IN_USE, slot.state
        self.touch(slot.link)

    def touch(self, link: FakeLink) -> None:
        me = threading.current_thread().name
        assert link.holder is None, f"connection {link.number} lent to {link.holder} and {me}"
        assert not link.closed, "a closed connection was lent"
        link.holder = me
        for _ in range(self.sim.random.randrange(1, 12)):
            self.sim.pause()
        assert link.holder == me
        link.holder = None
        self.served += 1

    def give_back(self, slot: Slot) -> None:
        answer = self.put(self.machine, slot)
        if answer == LOOK_AGAIN:
            self._look_again()
        elif answer == SLOWLY:
            self._give_back(slot, None)

    # -- keeper -----------------------------------------------------------------------------------

    def carry_out(self, orders: list[Order]) -> None:
        self.todo.extend(order for order in orders if isinstance(order, Open | Close))

    def keep(self) -> None:
        """Carry out orders until no borrower is left and nothing is to be done."""
        while True:
            self.sim.wait_until(lambda: bool(self.todo) or self.borrowers == 0)
            if not self.todo:
                return
            order = self.todo.pop(0)
            with self.lock:
                orders = self.answer(order)
            self.carry_out(orders)

    def answer(self, order: Order) -> list[Order]:
        if isinstance(order, Open):
            self.links += 1
            link = FakeLink(self.links)
            link.generation = order.slot.generation
            return self.machine.opened(order.slot, link, self.now)
        assert isinstance(order, Close)
        assert order.slot.link.holder is None or order.reason is Reason.ORPHANED
        order.slot.link.closed = True
        return self.machine.closed(order.slot, order.reason, self.now)

    # -- disturbances -----------------------------------------------------------------------------

    def condemn_one(self) -> None:
        """What the watcher does, and then the keeper."""
        for slot in self.machine.slots()[:1]:
            if slot.link is not None:
                slot.condemn(Reason.HUNG_UP)
                with self.lock:
                    orders = self.machine.hung_up(slot, self.now)
                self.carry_out(orders)

    def drain(self) -> None:
        with self.lock:
            orders = self.machine.drain(self.now)
        self.carry_out(orders)

    def tick(self) -> None:
        with self.lock:
            orders = self.machine.tick(self.now)
        self.carry_out(orders)

    # -- checks -----------------------------------------------------------------------------------

    def check_rest(self) -> None:
        """Nobody borrows any more: everything is in its place, exactly once."""
        machine = self.machine
        places = [*machine.idle, *machine.aside]
        assert len(places) == len(set(map(id, places))), "a slot is in two places"
        assert len(places) == len(machine.refs), "a slot is in no place"
        assert len(machine.refs) <= machine.limits.max_size
        assert not machine.waiting(), "somebody was forgotten"
        assert not machine.opening
        assert self.orphans.empty(), "a slot fell out of every place"
        assert self.served == machine.borrows(), (self.served, machine.borrows())


def run_schedule(
    seed: int,
    *,
    put: Callable[[Machine, Slot], int] = Machine.put,
    crowded: bool = False,
    lease: type[Lease[FakeLink]] | None = None,
    shares: bool = False,
    watched: tuple[str, ...] = WATCHED,
) -> Pond:
    """One seeded history: borrowers, a keeper, and something that disturbs them.

    `crowded`: three or four patient borrowers on one connection and no disturbance, where the
    windows of `put` are met most often. `lease`: borrow by this class instead of `take` and `put`;
    `shares`: all by one and the same, which is made for that.
    """
    sim = Interleaver(seed, *watched)
    rng = sim.random
    limits = Limits(
        min_size=rng.choice([0, 1, 2]), max_size=1 if crowded else rng.choice([1, 2, 3])
    )
    pond = Pond(sim, limits, put=put)
    pond.borrowers = rng.choice([3, 4] if crowded else [2, 3, 4])
    impatient = not crowded and rng.random() < 0.5
    kept = pond.kept() if shares else None
    for number in range(pond.borrowers):
        times = 3 if crowded else rng.choice([1, 2, 3])
        work: Callable[[], None] = partial(pond.borrow_and_return, times, may_time_out=impatient)
        if kept is not None:
            work = partial(pond.share, kept, times)
        elif lease is not None:
            work = partial(pond.lease, lease, times)
        sim.spawn(work, f"borrower-{number}")
    sim.spawn(pond.keep, "keeper")
    if not crowded:
        what = rng.choice([pond.condemn_one, pond.drain, pond.tick, lambda: None])
        sim.spawn(what, "disturber")
    sim.run()
    while pond.todo:
        pond.carry_out(pond.answer(pond.todo.pop(0)))
    pond.check_rest()
    return pond
