"""A machine in a made-up world: borrowers, keeper, watcher, server and time, one step at a time.

One job: the steps that can happen to a pool, each a method, and `check`, which looks at everything
after each of them. Who decides what happens next is somebody else (test_simulation.py).

Orders in flight are a bag: they are answered in any order, late, or lost. Slots must die when the
world drops them, so nothing here keeps one in a local variable of a frame that goes on.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from penstock._machine.machine import (
    DONE,
    LOOK_AGAIN,
    REPLACE_AGAIN,
    Machine,
    Phase,
    Refusal,
    Verdict,
    Waiter,
)
from penstock._machine.orders import Close, Open, Order, Overdue, ReportOutage, TakeBack, TickAt
from penstock._machine.pace import AFTER, FIRST_WAVE, WAVE_EVERY
from penstock._machine.silence import PROBES, RESERVE, patience
from penstock._machine.slot import Reason, Slot, SlotRef, SlotState
from penstock._machine.stats import snapshot
from penstock.drivers import Recipe
from penstock.testing import FakeClock, FakeDriver, FakeError, FakeLink, FakeServer, Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock._machine.policy import Limits

FOREVER = 10_000.0  # longer than every limit that a test sets
UNSEEN = 4  # a borrower whose connections others may give back: the runtime sees none on its stack


class Seat:
    """A borrower who waits: he holds his waiter, and the waiter what was given to him."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.woken = 0
        self.seen = False  # what was given to it has been checked
        self.waiter = Waiter(owner, self._gate())

    def _gate(self) -> Callable[[], object]:
        me = weakref.ref(self)

        def wake() -> None:
            seat = me()
            if seat is not None:
                seat.woken += 1

        return wake


class Lease:
    """A borrower who has a connection."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class Flight:
    """An order that the runtime has and has not answered; `result` is there once it is done."""

    def __init__(self, order: Open | Close) -> None:
        self.order = order
        self.outdated = False
        self.result: FakeLink | FakeError | None = None


class World:
    """One pool. Every public method is a step; `check` belongs after each."""

    def __init__(
        self, limits: Limits, chance: Callable[[], float], machine: type[Machine] = Machine
    ) -> None:
        self.clock = FakeClock()
        self.server = FakeServer(clock=self.clock)
        self.driver = FakeDriver(self.server)
        self.orphans: deque[SlotRef] = deque()
        self.machine = machine(
            limits, orphans=self.orphans.append, random=chance, reconnect_timeout=60.0
        )
        self.flights: list[Flight] = []
        self.alarms: list[float] = []
        self.leases: list[Lease] = []
        self.seats: list[Seat] = []  # in the queue, or served and not awake yet
        self.pings: list[Seat] = []  # awake, and asking whether their connection lives
        self.condemned: list[weakref.ref[Slot]] = []  # by the watcher; the keeper will hear
        self.inherited: list[FakeLink] = []  # the parent's, after a fork
        self.abandoned: list[FakeLink] = []  # those of them that the machine knew of
        self.left: list[Waiter] = []  # who gave up may live on: in a traceback that somebody keeps
        self.late: list[FakeLink] = []  # of an opening whose right was taken back: never to be lent
        self.spoiled: list[FakeLink] = []  # given back broken or unclean: never to be lent again
        self.doubtful: list[FakeLink] = []  # in doubt: not to be lent without a ping
        self.outdated: list[FakeLink] = []  # of before a drain: not to be lent any more
        self.remembering: list[
            FakeLink
        ] = []  # of before a migration: to forget before they are lent
        self.dropped = 0  # slots that a step dropped, and that are not home yet
        self.replaced_at = -FOREVER
        self.bound = limits.max_size
        self.may_change = chance() > 0.6  # the password comes from a callable
        self.reported = 0
        self._start_counting()

    def _start_counting(self) -> None:
        self.borrowed = self.returned = self.timeouts = self.refused = 0
        self.opened = self.open_failures = self.orphaned = self.gifts = 0
        self.closed: dict[str, int] = {}

    @property
    def now(self) -> float:
        return self.clock()

    # -- borrowers --------------------------------------------------------------------------------

    def may_borrow(self, owner: int) -> bool:
        """A thread that waits cannot ask a second time."""
        return owner == 0 or all(seat.owner != owner for seat in self.seats + self.pings)

    def borrow(self, owner: int, *, loose: bool) -> None:
        slot = self.machine.take(self.now, owner)
        if slot is not None:
            slot.loose = loose
            self._check_fit(slot)
            self._lease(slot)
            return
        seat = Seat(owner)
        if owner != UNSEEN:
            seat.waiter.keeps = set(self.machine.held_by(owner))
        before, queued = self._holders(), len(self.machine.waiting())
        orders = self.machine.queue_up(seat.waiter, self.now)
        if seat.waiter.refusal is None:
            self.seats.append(seat)
        else:
            self._check_refusal(seat.waiter, before, queued)
            self.refused += 1
        self._take_on(orders)

    def _lease(self, slot: Slot) -> None:
        assert slot.state is SlotState.IN_USE, f"lent while {slot.state}"
        if slot.link not in self.inherited:
            assert self.machine.has(slot), "a slot that is not the pool's was lent"
        assert slot.link not in self.spoiled, "a connection was lent that was given back unusable"
        assert slot.link not in self.late, "what came after its right was taken back was lent"
        slot.link.lend()
        self.leases.append(Lease(slot))
        self.borrowed += 1

    def wake_up(self, index: int) -> None:
        """A borrower who was woken looks at what he got."""
        seat = self.seats[index]
        if seat.waiter.refusal is not None:
            self.refused += 1
            del self.seats[index]
        elif seat.waiter.slot is not None:
            del self.seats[index]
            if seat.waiter.slot.state is SlotState.PINGING:
                self.pings.append(seat)
            else:
                self._lease_of(seat)

    def _lease_of(self, seat: Seat) -> None:
        slot, seat.waiter.slot = seat.waiter.slot, None
        assert slot is not None
        self._lease(slot)

    def ping_ends(self, index: int) -> None:
        """A ping comes to its end, well or badly, as the server is."""
        seat = self.pings.pop(index)
        slot = seat.waiter.slot
        assert slot is not None
        answered = slot.link.finish_reset(1.0) if slot.reset_pending else slot.link.ping(1.0)
        slot.reset_pending = False
        if slot.outdated:
            slot.outdated = False
            self.remembering = [link for link in self.remembering if link is not slot.link]
        if answered:
            self._trust(slot.link)
            self._take_on(self.machine.pinged(slot, self.now))
            self._lease_of(seat)
            return
        seat.seen, seat.woken = False, 0
        self.seats.append(seat)
        self._doubt_all()
        self._take_on(self.machine.ping_failed(slot, seat.waiter, self.now))
        if seat.waiter.refusal is not None:
            seat.woken += 1  # he is awake: nobody has to wake him

    def give_back(self, index: int, verdict: Verdict, *, suspect: bool, reset: bool) -> None:
        slot = self.leases.pop(index).slot
        ours = self.machine.has(slot)
        slot.link.park()
        slot.loose = False
        if suspect:
            self._doubt_all()
        if verdict is not Verdict.CLEAN:
            self.spoiled.append(slot.link)
        else:
            self._trust(slot.link)
            self.returned += ours
            slot.reset_pending = reset
            if not reset and not suspect:
                self._put(slot)
                return
        self._take_on(self.machine.returned(slot, self.now, verdict, suspect=suspect))

    def meet_migration(self, index: int, *, ends: bool) -> None:
        """A borrower's statement fails: what was remembered for its session is of an older schema."""
        slot = self.leases[index].slot
        if self.machine.has(slot) and ends:
            if self.now >= self.replaced_at + REPLACE_AGAIN:
                self.replaced_at = self.now
                self._outdate_all()
            self.outdated.append(slot.link)
        elif self.machine.has(slot):
            links = (ref.link for ref in self.machine.refs.values())
            self.remembering = [link for link in links if link is not None]
        self._take_on(self.machine.outdated(slot, self.now, ends=ends))

    def _put(self, slot: Slot) -> None:
        answer = self.machine.put(slot)
        if answer == LOOK_AGAIN:
            self._take_on(self.machine.look_again(self.now))
        elif answer != DONE:
            self._take_on(self.machine.returned(slot, self.now, Verdict.CLEAN))

    def _doubt_all(self) -> None:
        self.doubtful = [ref.link for ref in self.machine.refs.values() if ref.link is not None]

    def _trust(self, link: FakeLink) -> None:
        self.doubtful = [other for other in self.doubtful if other is not link]

    def give_up(self, index: int, *, timed_out: bool) -> None:
        """The timeout passed, perhaps just after a slot or a refusal came; or he was cancelled."""
        waiter = self.seats.pop(index).waiter
        if waiter.refusal is not None:
            self.refused += 1
        elif timed_out:
            self.timeouts += 1
        self.left = [waiter]
        self._take_on(self.machine.give_up(waiter, self.now, timed_out=timed_out))

    def kill_waiter(self, index: int) -> None:
        """Without a word, with whatever he was given."""
        seat = self.seats.pop(index)
        self.refused += seat.waiter.refusal is not None
        self._expect_orphan(seat.waiter.slot)

    def kill_pinger(self, index: int) -> None:
        self._expect_orphan(self.pings.pop(index).waiter.slot)

    def drop_lease(self, index: int) -> None:
        self._expect_orphan(self.leases.pop(index).slot)

    def _expect_orphan(self, slot: Slot | None) -> None:
        self.dropped += slot is not None and self.machine.has(slot)

    # -- the keeper -------------------------------------------------------------------------------

    def work(self, index: int) -> None:
        """Do what an order asks for, without telling the machine yet."""
        flight = self.flights[index]
        if flight.result is None and isinstance(flight.order, Open):
            try:
                flight.result = self.driver.open(Recipe(), 5.0)
            except FakeError as error:
                flight.result = error.with_traceback(None)

    def answer(self, index: int) -> None:
        self.work(index)
        flight = self.flights.pop(index)
        if isinstance(flight.order, Close):
            self._answer_close(flight.order)
        else:
            if flight.outdated and isinstance(flight.result, FakeLink):
                self.outdated.append(flight.result)
            self._answer_open(flight.order.slot, flight.result, if_changed=flight.order.if_changed)

    def _answer_close(self, order: Close) -> None:
        link = order.slot.link
        if link in self.inherited:
            assert order.discard or link.ended or link in self.abandoned, (
                "a forked child ended its parent's session"
            )
        elif order.discard:
            assert link not in self.late, "what came late was not closed politely"
            link.discard()
        else:
            assert link.user is None, "a connection in use was closed"
            link.close()
        if self.machine.has(order.slot):
            self.closed[order.reason.value] = self.closed.get(order.reason.value, 0) + 1
        self._take_on(self.machine.closed(order.slot, order.reason, self.now))

    def _answer_open(
        self, slot: Slot, result: FakeLink | FakeError | None, *, if_changed: bool
    ) -> None:
        known = self.machine.has(slot)
        if isinstance(result, FakeLink):
            self.opened += known
            if slot.ref is not None and self.machine.hanging.has(slot.ref):
                self.late.append(result)
            self._take_on(self.machine.opened(slot, result, self.now))
            return
        assert result is not None
        if slot.progress is not None and slot.progress.taken_back and not known:
            self._take_on(self.machine.failed_late(slot, self.now))
            return
        said = self.driver.diagnose(result, Recipe(), 1.0)
        if if_changed and not said.heals:  # refused before, and it would be the same again
            self._take_on(self.machine.unchanged(slot, self.now))
            return
        current = slot.generation == self.machine.generation
        self.open_failures += known and current and self.machine.phase is Phase.OPEN
        self._take_on(
            self.machine.open_failed(
                slot,
                result,
                self.now,
                heals=said.heals,
                sqlstate=said.sqlstate,
                may_change=self.may_change and not if_changed,
            )
        )

    def lose(self, index: int) -> None:
        """An interrupt struck between the machine and the keeper: nobody has the order any more."""
        flight = self.flights[index]
        # A Close for a link that is not the pool's any more would leave it to Python to end it.
        if flight.result is None and self.machine.has(flight.order.slot):
            self.dropped += 1
            del self.flights[index]

    def bring_home(self, *, twice: bool) -> None:
        ref = self.orphans.popleft()
        if self.machine.refs.get(ref.serial) is ref:
            self.dropped -= 1
            self.orphaned += ref.link is not None
        self._take_on(self.machine.bring_home(ref, self.now))
        if twice:
            assert self.machine.bring_home(ref, self.now) == []

    def let_pass(self, seconds: float, *, late: bool = False) -> None:
        """Time passes, and if a tick is due after it, it comes; or it is later still."""
        self.clock.advance(seconds)
        if not late and self.alarms and min(self.alarms) <= self.now:
            self.tick()

    def next_alarm(self) -> None:
        self.clock.now = max(self.clock.now, *self.alarms)
        self.tick()

    def tick(self) -> None:
        self.alarms = [when for when in self.alarms if when > self.now]
        spare = self._connected() - self.machine.limits.min_size
        orders = self.machine.tick(self.now)
        self._take_on(orders)
        slots = [slot for ref in self.machine.opening.values() if (slot := ref()) is not None]
        kept = [slot for slot in slots if slot.progress and self.now >= slot.progress.until]
        assert not kept, "an opening that does not end keeps its right"
        assert all(when > self.now for when in self.alarms), "the keeper would spin"
        shrunk = [o for o in orders if isinstance(o, Close) and o.reason is Reason.SHRUNK]
        assert len(shrunk) <= max(spare, 0), "shrunk below min_size"

    def ask(self) -> None:
        """An orchestrator asks for the pool's health."""
        if self.machine.ask(self.now):
            self.tick()

    def _connected(self) -> int:
        counts = self.machine.count()
        return counts[SlotState.IDLE] + counts[SlotState.IN_USE] + counts[SlotState.PINGING]

    # -- the server and the watcher ---------------------------------------------------------------

    def hang_up(self, index: int) -> None:
        sessions = list(self.server.sessions)
        if sessions:
            self.server.hang_up(sessions[index % len(sessions)])

    def unnoticed(self) -> list[SlotRef]:
        """Whose session has ended without the watcher's having said so."""
        refs = self.machine.refs.values()
        return [ref for ref in refs if ref.link and ref.link.ended and _is_uncondemned(ref)]

    def watcher_condemns(self, index: int) -> None:
        refs = self.unnoticed()
        slot = refs[index % len(refs)]()
        assert slot is not None
        slot.condemn(Reason.HUNG_UP)
        self.condemned.append(weakref.ref(slot))

    def keeper_hears(self, index: int) -> None:
        slot = self.condemned.pop(index)()
        if slot is not None:
            self._take_on(self.machine.hung_up(slot, self.now))

    # -- the whole pool ---------------------------------------------------------------------------

    def open(self) -> None:
        self._take_on(self.machine.open(self.now))

    def _outdate_all(self) -> None:
        self.outdated += [ref.link for ref in self.machine.refs.values() if ref.link is not None]
        for flight in self.flights:
            flight.outdated = True

    def close(self) -> None:
        self._outdate_all()
        self._take_on(self.machine.close(self.now))

    def drain(self) -> None:
        self._outdate_all()
        self._take_on(self.machine.drain(self.now))

    def resize(self, min_size: int, max_size: int) -> None:
        self.bound = max(max_size, len(self.machine.refs))
        self._take_on(self.machine.resize(min_size, max_size, self.now))

    def fork(self, *, greenlets: bool) -> None:
        """The child's side. Greenlets live on in it; threads do not, but for the forking one."""
        self._outdate_all()
        links = [link for link, _ in self.machine.inherited()]
        self.machine.forked()
        assert len(links) == len({id(link) for link in links})
        for link in links:
            link.abandon(busy=False)  # and closed: one process plays thousands of children
        self.abandoned += links
        self.inherited += self.server.sessions.values()
        self.server.sessions.clear()
        self.alarms.clear()
        self.orphans.clear()  # a new sink, with the new machinery
        self.dropped = 0
        if not greenlets:
            self.flights.clear()
            self.seats.clear()
            self.pings.clear()
            del self.leases[1:]
        for flight in self.flights:
            flight.result = None if isinstance(flight.result, FakeLink) else flight.result
        # Who waited in the parent's queue must leave by himself; his refusal still stands.
        for index in reversed(range(len(self.seats))):
            self.give_up(index, timed_out=False)
        for index in reversed(range(len(self.pings))):
            self._ping_fails_after_fork(index)
        self._start_counting()
        self.machine.tally.timeouts = 0
        self.machine.tally.refused = sum(s.waiter.refusal is not None for s in self.seats)
        self._take_on(self.machine.tick(self.now))

    def _ping_fails_after_fork(self, index: int) -> None:
        seat = self.pings.pop(index)
        slot = seat.waiter.slot
        assert slot is not None
        self.seats.append(seat)
        seat.seen, seat.woken = False, 0
        self._take_on(self.machine.ping_failed(slot, seat.waiter, self.now))
        seat.woken += seat.waiter.refusal is not None

    # -- orders -----------------------------------------------------------------------------------

    def _take_on(self, orders: list[Order]) -> None:
        opens = 0
        for order in orders:
            if isinstance(order, Open | Close):
                self.flights.append(Flight(order))
                opens += isinstance(order, Open)
            elif isinstance(order, TakeBack):
                self._take_back(order.slot)
            elif isinstance(order, TickAt):
                self.alarms = [min([order.when, *self.alarms])]  # as the keeper does
            elif isinstance(order, Overdue):
                assert order.slot.state is SlotState.IN_USE
                assert order.seconds > self.machine.limits.overdue_after - 0.001
            elif isinstance(order, ReportOutage):
                assert order.seconds >= self.machine.reconnect_timeout
        if opens and self.machine.outage is not None:
            assert len(self._awake()) == 1, "more than one probe in an outage"
            assert self._brief() <= PROBES, "too many probes that are not answered"
        self._check_gifts()

    def _take_back(self, slot: Slot) -> None:
        """An opening has had all its time; its worker, whose flight goes on, may come later or never."""
        progress = slot.progress
        assert progress is not None and self.now >= progress.until
        current = slot.generation == self.machine.generation
        self.open_failures += current and self.machine.phase is Phase.OPEN
        error = FakeError("it hangs")
        orders = self.machine.take_back(slot, error, self.now)
        assert progress.taken_back and not self.machine.has(slot)
        assert self.machine.take_back(slot, error, self.now) == []
        self._take_on(orders)

    def _check_gifts(self) -> None:
        """What was given in this step was fit to be given, and to whoever was first in line."""
        given, waiting = [], []
        for seat in self.seats:
            slot = seat.waiter.slot
            if slot is None:
                if seat.waiter.refusal is None:
                    waiting.append(seat.waiter.ticket)
            elif not seat.seen:
                seat.seen = True
                given.append(seat.waiter.ticket)
                self._check_fit(slot)
                assert seat.waiter.refusal is None, "served and refused"
        self.gifts += len(given)
        assert not given or not waiting or max(given) < min(waiting), "somebody was overtaken"

    def _check_fit(self, slot: Slot) -> None:
        machine = self.machine
        assert machine.phase is Phase.OPEN, "a closed pool lends"
        assert slot.link not in self.outdated, "a connection of an older generation was lent"
        assert slot.generation == machine.generation, "a connection of an older generation was lent"
        assert slot.condemned is None, "a connection was lent whose end was known"
        assert self.now < slot.retire_at, "a connection was lent that was too old"
        assert slot.state in {SlotState.IN_USE, SlotState.PINGING}
        if slot.state is SlotState.IN_USE:
            assert slot.epoch == machine.epoch, "a connection in doubt was lent without a ping"
            assert slot.link not in self.doubtful, "a connection in doubt was lent without a ping"
            assert not slot.reset_pending, "a connection was lent with a reset under way"
            assert slot.link not in self.remembering, "a connection was lent that remembers"

    def _holders(self) -> tuple[bool, set[int], set[int]]:
        held = [lease.slot for lease in self.leases if self.machine.has(lease.slot)]
        given = [s.waiter.slot for s in self.seats if s.waiter.slot is not None]
        every = len(held) + len(given) == len(self.machine.refs) >= self.machine.limits.max_size
        holders = {slot.holder for slot in held + given}
        waiting = {s.owner for s in self.seats if s.waiter.slot is None}
        return every, holders, waiting

    def _check_refusal(
        self, waiter: Waiter, before: tuple[bool, set[int], set[int]], queued: int
    ) -> None:
        assert waiter.slot is None
        every, holders, waiting = before
        if waiter.refusal is Refusal.DEADLOCK:
            assert every
            assert waiter.owner in holders
            assert holders <= waiting | {waiter.owner}, "somebody could still give back"
            assert UNSEEN not in holders, "another thread could still give back"
        elif waiter.refusal is Refusal.CLOSED:
            assert self.machine.phase is not Phase.OPEN
        elif waiter.refusal is Refusal.TOO_MANY:
            assert queued >= self.machine.limits.max_waiting > 0
        else:
            assert self.machine.outage is not None
            assert not self.machine.outage.heals

    # -- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        self._check_places()
        self._check_links()
        self._check_sizes()
        self._check_queue()
        self._check_who_asks()
        self._check_counters()

    def _places(self) -> list[tuple[Slot, set[SlotState]]]:
        machine = self.machine
        places = [(slot, {SlotState.IDLE}) for slot in [*machine.idle, *machine.aside]]
        places += [(lease.slot, {SlotState.IN_USE}) for lease in self.leases]
        for seat in self.seats + self.pings:
            if seat.waiter.slot is not None:
                places.append((seat.waiter.slot, {SlotState.IN_USE, SlotState.PINGING}))
        for flight in self.flights:
            state = SlotState.OPENING if isinstance(flight.order, Open) else SlotState.CLOSING
            places.append((flight.order.slot, {state}))
        return places

    def _check_places(self) -> None:
        places = self._places()
        assert len(places) == len({id(slot) for slot, _ in places}), "a slot is in two places"
        for slot, states in places:
            assert slot.state in states, f"{slot} where it should be {states}"
        ours = {id(slot) for slot, _ in places if self.machine.has(slot)}
        alive = {id(slot) for slot in self.machine.slots()}
        assert ours == alive, "a slot is in no place"
        dead = {serial for serial, ref in self.machine.refs.items() if ref() is None}
        assert dead <= {ref.serial for ref in self.orphans}, "a slot was lost"
        assert len(dead) == self.dropped, "the machine itself dropped a slot"

    def _check_links(self) -> None:
        held = {id(ref.link) for ref in self.machine.refs.values()}
        held |= {id(flight.result) for flight in self.flights}
        # A link that came for a slot which is not the pool's any more is in its Close only.
        held |= {id(flight.order.slot.link) for flight in self.flights}
        leaked = [link for link in self.server.sessions.values() if id(link) not in held]
        assert not leaked, f"sessions that nobody will ever close: {leaked}"

    def _check_sizes(self) -> None:
        machine = self.machine
        size = len(machine.refs)
        assert sum(machine.count().values()) == size
        self.bound = max(machine.limits.max_size, min(self.bound, size))
        assert size <= self.bound, f"{size} of {machine.limits.max_size} connections"
        assert set(machine.opening) <= set(machine.refs)

    def _check_queue(self) -> None:
        machine = self.machine
        seated = [s.waiter for s in self.seats if s.waiter.slot is None and not s.waiter.refusal]
        assert {id(w) for w in machine.waiting()} == {id(w) for w in seated}, "not in the queue"
        tickets = [waiter.ticket for waiter in machine.waiting()]
        assert tickets == sorted(tickets), "somebody was overtaken"
        for seat in self.seats:
            served = seat.waiter.slot is not None or seat.waiter.refusal is not None
            assert seat.woken or not served, "somebody was given something and not told"
        if tickets:
            self._check_nobody_waits_for_nothing(len(tickets))

    def _check_who_asks(self) -> None:
        """While somebody asks, a pool that has nothing is tried again soon, whatever its sizes are."""
        machine = self.machine
        outage = machine.outage
        if outage is None or machine.phase is not Phase.OPEN or not machine.asked.lately(self.now):
            return
        if self._connected() or self._awake() or len(machine.refs) >= machine.limits.max_size:
            return
        if self.dropped or machine.count()[SlotState.CLOSING]:
            return  # the end of that is looked at
        if self._brief() >= PROBES:
            return
        assert self.alarms, "an unready pool that is asked about is not tried again"
        due = max(outage.next_for_asked, machine.hanging.next_at(), self.now)
        assert min(self.alarms) <= due, "nor in time"

    def _check_nobody_waits_for_nothing(self, waiting: int) -> None:
        machine = self.machine
        assert machine.phase is Phase.OPEN, "somebody waits for a closed pool"
        assert not machine.idle, "somebody waits beside an idle connection"
        assert not machine.aside, "somebody waits beside an idle connection"
        if len(machine.refs) >= machine.limits.max_size:
            return
        awake = self._awake()
        if min(awake, default=self.now) > self.now:
            assert self.alarms, "nobody will try beside a connect that is not answered"
            assert min(self.alarms) <= min(awake), "nor in time"
        unserved = machine.pace.served is None
        kept = unserved and len(awake) >= max(FIRST_WAVE, machine.limits.max_size - RESERVE)
        if len(awake) >= waiting or kept or self._brief() >= PROBES:
            return
        if awake and self._nothing_was_answered():
            return  # one at a time, beside those that are not answered
        if machine.outage is not None:
            if not awake:
                due = max(machine.outage.next_for_waiters, machine.hanging.next_at(), self.now)
                assert self.alarms, "nobody will try again"
                assert min(self.alarms) <= due, "nobody will try again in time"
        elif self._nothing_was_answered():
            assert self.alarms, "nobody will try beside those that are not answered"
            assert min(self.alarms) <= max(self.now, machine.hanging.next_at()), "nor in time"
        else:
            self._check_that_it_is_held_back()

    def _awake(self) -> list[float]:
        """When each of the connects will be left to itself that may still be answered soon; now: it was lost."""
        wait = patience(self.machine.tally.usual_opening())
        slots = [ref() for ref in self.machine.opening.values()]
        until = [self.now if slot is None else slot.opened_at + wait for slot in slots]
        return [
            when for slot, when in zip(slots, until, strict=True) if not slot or self.now < when
        ]

    def _nothing_was_answered(self) -> bool:
        """Since the youngest of the connects began that are left to themselves."""
        slots = [slot for ref in self.machine.opening.values() if (slot := ref()) is not None]
        wait = patience(self.machine.tally.usual_opening())
        silent = [slot.opened_at for slot in slots if self.now >= slot.opened_at + wait]
        return bool(silent) and max(silent) >= self.machine.answered_at

    def _brief(self) -> int:
        """How many were begun beside others that were not answered."""
        slots = [ref() for ref in self.machine.opening.values()]
        return sum(slot is not None and slot.brief for slot in slots)

    def _check_that_it_is_held_back(self) -> None:
        """Somebody waits and there is room for one more: for one connect's time at most, from the first on."""
        machine = self.machine
        beside = machine.hanging.next_at()
        if self.now < beside:
            assert self.alarms, "nobody will try again beside what hangs"
            assert min(self.alarms) <= beside, "nor in time"
            return
        assert machine.refs, "somebody waits, nothing can come back, and nothing is opened"
        if self.dropped:
            return  # whoever brings that home looks
        assert self.alarms, "nobody will look whether one more is wanted"
        bound = machine.pace.served
        if bound is None:
            bound = max(machine.pace.began, self.now) + WAVE_EVERY
        due = max(self.now, bound + machine.tally.usual_opening()) + 2 * AFTER
        assert min(self.alarms) <= due, "nobody will look in time whether one more is wanted"

    def _check_counters(self) -> None:
        machine, tally = self.machine, self.machine.tally
        stats = snapshot(machine, "it", self.now)
        unseen = sum(seat.waiter.refusal is not None for seat in self.seats)
        in_use = sum(slot.state is SlotState.IN_USE for slot in machine.slots())
        assert stats.in_use == in_use
        assert stats.borrows == self.returned, "a counter was lost"
        assert stats.opened == self.opened
        assert stats.open_failures == self.open_failures
        assert stats.timeouts == self.timeouts, "timeouts"
        assert stats.refused == self.refused + unseen, "refused"
        assert stats.orphaned == self.orphaned
        assert stats.closed == self.closed
        assert sum(tally.waits) == stats.queued
        assert stats.size == stats.opened - sum(self.closed.values()) + self._without_link()

    def _without_link(self) -> int:
        return sum(ref.link is None for ref in self.machine.refs.values())

    # -- the end ----------------------------------------------------------------------------------

    def faults_stop(self) -> None:
        """From here on all goes well: everybody is served, and the pool comes to rest."""
        self.server.mode = Mode.UP
        if self.machine.phase is not Phase.OPEN:
            assert not self.machine.waiting()
            self.open()
        self._settle_all()
        assert not self.seats, "somebody was forgotten"
        assert not self.leases
        assert not self.flights
        self._rest()
        limits, counts = self.machine.limits, self.machine.count()
        assert counts[SlotState.IDLE] == limits.min_size == len(self.machine.refs), (
            f"not back at min_size {limits.min_size}: {counts}"
        )

    def _settle_all(self) -> None:
        """Play on until nobody has anything to do and nobody waits."""
        for _ in range(200):
            if not self._something_happens():
                if not self.seats:
                    return
                assert self.alarms, "somebody waits, and nothing will happen"
                self.next_alarm()
            self.check()
        raise AssertionError("it does not come to an end")

    def run_on(self, steps: int) -> None:
        """Let the keeper and whoever was woken do what is to be done, as far as it goes."""
        while steps and self._something_happens(give_back=False):
            steps -= 1
            self.check()

    def _something_happens(self, *, give_back: bool = True) -> bool:
        if self.orphans:
            self.bring_home(twice=False)
        elif any(ref() is not None for ref in self.unnoticed()):
            self.watcher_condemns(0)
        elif self.condemned:
            self.keeper_hears(0)
        elif self.flights:
            self.answer(0)
        elif self.pings:
            self.ping_ends(0)
        elif ready := [i for i, seat in enumerate(self.seats) if seat.woken]:
            self.wake_up(ready[0])
        elif give_back and self.leases:
            self.give_back(0, Verdict.CLEAN, suspect=False, reset=False)
        else:
            return False
        return True

    def _rest(self) -> None:
        """Nobody borrows for a long time: the pool shrinks, and wakes only for something due."""
        until = self.now + 2 * self.machine.limits.max_idle + 2 * self.machine.limits.overdue_after
        in_vain = 0
        while self.alarms and min(self.alarms) <= until:
            flown = self.server.connects, sum(self.closed.values())
            self.next_alarm()
            self._settle_all()
            in_vain = (
                in_vain + 1 if flown == (self.server.connects, sum(self.closed.values())) else 0
            )
            assert in_vain <= 4, "an idle pool is woken for nothing"
        self.clock.now = max(self.clock.now, until)

    def end(self) -> Any:
        """Close the fake sockets."""
        self.server.hang_up()
        for link in self.inherited:
            link.close()


def _is_uncondemned(ref: SlotRef) -> bool:
    slot = ref()
    states = (SlotState.OPENING, SlotState.CLOSING)
    return slot is not None and slot.condemned is None and slot.state not in states
