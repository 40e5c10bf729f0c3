"""The pool as a pure state machine. Read `slot.py` first; then this file explains the pool.

One job: decide. Who gets which slot, when one more is opened, when one is closed, who must wait and
who is refused. It never acts: what has to be done comes back as a list of orders (`orders.py`).

It must not know: threads, sockets, drivers, clocks, randomness. `now` is a parameter, chance is a
callable, a link is opaque. It raises only for bugs in penstock; "closed", "full" and "unreachable"
are values (`Refusal`) that a runtime turns into exceptions.

Theory of operation
===================

Places. An idle slot is in `idle` (fit when it was put there) or in `aside` (somebody looked at it
and found that it wants a ping, or an end). A slot in use is in a lease, or on its way there in
`Waiter.slot`. A slot that is being opened or closed is in an order. Nowhere else; `refs`, the table
of all slots, holds weak references, so a slot that falls out of every place is freed by Python and
comes back through `bring_home`.

Two moves are hot and take no lock: `take` and `put`. Everything else is called under the runtime's
lock. They are right without a lock because of four facts:

1. `deque.pop` and `deque.append` are atomic. What `take` popped is ours alone; what `put` appends
   was ours until the append, *and not one line longer*: the next line may run when somebody else
   has lent the slot again. That is why `put` has three answers. With two, the caller had to look at
   `slot.state` after the append to tell them apart, and lent a slot twice (found by the interleaver
   at seed 105; 540,000 stressed borrows on three interpreters had not found it).
2. A waiter publishes itself in `waiters`, *then* looks at `idle`, then sleeps. `put` appends to
   `idle`, *then* looks at `waiters`. Whichever of the two comes second sees the other.
3. One comparison of epochs says that nothing changed since the slot was last known good. Drain, fork,
   close and suspicion raise the machine's epoch; condemning a slot takes its own away.
4. Where the interpreter has no global lock, facts 1 and 2 are not promised; the runtime then calls
   `take` and `put` under its lock, too.

Order. A slot that comes back while somebody waits goes to the first waiter directly, never through
`idle`, so newcomers cannot overtake; but for the window between the two looks of fact 2, in which
one newcomer can. Closing it would need a lock on every borrow.

Interrupts. A KeyboardInterrupt can strike after any call of a C function, also under the lock. So

* slow moves are ordered such that every prefix of their statements is a legal state, or one that
  `tick` repairs;
* the queue holds waiters weakly and the waiter holds the slot that was given to it: a waiter who is
  killed anywhere vanishes from the queue by himself, and his slot comes home;
* giving is: store the slot, wake, leave the queue. Each step can be repeated; `_flush` does;
* `bring_home` has one commit point, the store into `refs`;
* no loop stands directly inside a `with` or a `try`: 3.12 and 3.13 leave gaps in the exception table
  there. A loop is a function of its own, one step of it another (tests/machine/test_bytecode.py).

Outages. While the server cannot be reached there is an `Outage`. Then one probing connect runs per
pool, not one per waiter, spaced by `policy.retry_delay`. A failure that cannot heal (wrong password)
refuses everybody who waits, at once. A connect that is not answered holds nobody up for longer than
`silence.patience`: while somebody waits another one is tried beside it, outage or not, with little time
(`Slot.brief`), a few at most. What such a one says after others were answered is no news. An opening whose
worker does not come back has its right taken back (`take_back`); what that worker brings later is closed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from .asked import Asked
from .hanging import Hanging
from .orders import Close, Open, Order, Overdue, ReportOutage, TakeBack, TickAt
from .outage import Outage
from .pace import FIRST_WAVE, Pace
from .policy import Limits, retire_at
from .progress import BRIEF_SECONDS, CONNECT_SECONDS, Progress
from .schedule import CONNECTED, due_times
from .silence import (
    LONG_ONE_OF,
    PROBES,
    RESERVE,
    TIMES_USUAL,
    Silence,
    hanging_since,
    patience,
    silent_since,
)
from .slot import Move, Reason, Slot, SlotRef, SlotState, refer_to
from .tally import Tally
from .waiter import Refusal, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DONE", "LOOK_AGAIN", "SLOWLY", "Machine", "Phase", "Refusal", "Verdict", "Waiter"]

# What `put` answers. DONE is false, so that the hot path needs no name to compare with.
DONE: Final = 0
LOOK_AGAIN: Final = 1
SLOWLY: Final = 2

#: Seconds after which a closed or drained pool looks for what a `put` under way left behind.
LOOK_ONCE_MORE: Final = 1.0

#: Seconds that lie at least between two replacements of all connections since types have changed.
REPLACE_AGAIN: Final = 60.0

NEVER: Final = float("inf")

IN_USE: Final = SlotState.IN_USE
IDLE: Final = SlotState.IDLE

#: Connections that end for these reasons are not worth a farewell, or may be in somebody's hands.
_DISCARDED: Final = frozenset(
    {Reason.HUNG_UP, Reason.BROKEN, Reason.UNCLEAN, Reason.UNANSWERED, Reason.ORPHANED}
)


class Phase(Enum):
    """Where the pool is in its life."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


class Verdict(Enum):
    """In what condition a slot is given back."""

    CLEAN = "clean"
    BROKEN = "broken"  # the session has ended, or the borrower ended it
    UNCLEAN = "unclean"  # it lives, but could not be brought back to a clean state


class Machine:
    """All state of one pool. `take` and `put` need no lock, every other method the runtime's.

    Args:
        limits: sizes and times.
        orphans: a C function that is handed the `SlotRef` of a slot that nobody holds any more.
        random: gives numbers from 0 to 1, for jitter.
        home: what every `SlotRef` carries, so that the keeper finds the pool.
        reconnect_timeout: seconds of outage after which `ReportOutage` is ordered once.
    """

    __slots__ = (
        "_pop",
        "answered_at",
        "armed",
        "aside",
        "asked",
        "epoch",
        "generation",
        "hanging",
        "home",
        "idle",
        "limits",
        "opening",
        "orphans",
        "outage",
        "pace",
        "phase",
        "ping_after",
        "random",
        "reconnect_timeout",
        "refs",
        "replaced_at",
        "serials",
        "tally",
        "waiters",
    )

    def __init__(
        self,
        limits: Limits,
        *,
        orphans: Callable[[SlotRef], object],
        random: Callable[[], float],
        home: object = None,
        reconnect_timeout: float = float("inf"),
    ) -> None:
        self.limits = limits
        self.orphans = orphans
        self.random = random
        self.home = home
        self.reconnect_timeout = reconnect_timeout
        self.ping_after = limits.ping_after  # read on the hot path: one attribute instead of two
        self.phase = Phase.NEW
        self.generation = 0
        self.epoch = 0
        self.serials = 0
        self._empty()

    def _empty(self) -> None:
        """Every place new and empty: at the start, and in a forked child."""
        self.idle: deque[Slot] = deque()
        self._pop = self.idle.popleft if self.limits.fifo else self.idle.pop
        self.aside: deque[Slot] = deque()
        self.refs: dict[int, SlotRef] = {}
        self.opening: dict[int, SlotRef] = {}
        self.waiters: OrderedDict[int, weakref.ref[Waiter]] = OrderedDict()
        self.outage: Outage | None = None
        self.answered_at = -NEVER  # when a connection was opened last
        self.replaced_at = -NEVER  # when all were, since types had changed
        self.pace = Pace()
        self.asked = Asked()
        self.hanging = Hanging()
        self.armed = float("inf")
        self.tally = Tally()

    # -- the two hot moves: no lock ---------------------------------------------------------------

    def take(self, now: float, holder: int) -> Slot | None:
        """An idle slot that may be used as it is, or None: then queue up, under the lock."""
        try:
            slot = self._pop()
        except IndexError:
            return None
        if (
            slot.epoch == self.epoch
            and now < slot.retire_at
            and now - slot.borrowed_at < self.ping_after
        ):
            # The holder first: a slot in use under its last holder's name looks like a deadlock.
            slot.holder = holder
            slot.borrowed_at = now
            slot.state = IN_USE  # the table's (idle, take)
            return slot
        self.aside.append(slot)
        return None

    def put(self, slot: Slot) -> int:
        """Give back a clean slot: DONE, LOOK_AGAIN (call `look_again`), or SLOWLY (`returned`).

        After the append the slot is not ours: the caller must not look at it again.
        """
        if self.waiters or slot.epoch != self.epoch:
            return SLOWLY
        slot.ref.borrows += 1  # type: ignore[union-attr]  # the epoch says that it is ours
        slot.state = IDLE  # the table's (in use, put)
        self.idle.append(slot)
        if self.waiters:
            return LOOK_AGAIN
        return DONE

    # -- borrowers --------------------------------------------------------------------------------

    def queue_up(self, waiter: Waiter, now: float) -> list[Order]:
        """Wait for a slot. On return the waiter has a slot, or a refusal, or is in the queue."""
        waiter.refusal = self._refusal(waiter, now)
        if waiter.refusal is not None:
            self.tally.refused += 1
            # He may have put a slot aside, or taken the look of one who waits: look for them.
            return self.look_again(now)
        waiter.ticket = self.serials = self.serials + 1
        waiter.queued_at = now
        if not self.waiters:
            self.pace.begin(now)
        self.waiters[waiter.ticket] = weakref.ref(waiter)  # be seen, then look
        return self.look_again(now)

    def look_again(self, now: float) -> list[Order]:
        """Bring waiters and idle slots together, and grow if that was not enough. Repeatable."""
        orders: list[Order] = []
        self._hand_over_all(now, orders)
        self._grow(now, orders)
        return orders

    def give_up(self, waiter: Waiter, now: float, *, timed_out: bool) -> list[Order]:
        """Leave the queue: the timeout passed, or the borrower was interrupted. Repeatable.

        A slot that was just given and not touched goes to whoever is next.
        """
        if timed_out and waiter.slot is None:
            waiter.silent_since = self._unanswered_since(now, waiter)
        if self.waiters.pop(waiter.ticket, None) is not None:
            self.tally.wait_ended(now - waiter.queued_at, served=False)
        orders: list[Order] = []
        slot = waiter.slot
        if slot is not None:
            waiter.slot = None
            if self.has(slot):  # else it is of before a fork: the parent's
                self._pass_on(slot, now, orders)
        if timed_out and waiter.refusal is None:
            self.tally.timeouts += 1
        return orders + self.look_again(now)

    def pinged(self, slot: Slot, now: float) -> list[Order]:
        """The borrower's ping was answered: the slot is as good as a fresh one."""
        if self.has(slot) and slot.generation == self.generation and not slot.outdated:
            slot.vouch(self.epoch)
        slot.move(Move.PINGED)
        slot.borrowed_at = now
        orders: list[Order] = []
        self._arm(now, orders)
        return orders

    def reconsider(self, slot: Slot, waiter: Waiter, now: float) -> list[Order]:
        """What was given to a waiter has fallen into doubt before he could use it.

        Afterwards the slot is to be pinged by him, or it has ended and he is in the queue again.
        """
        if self.has(slot) and self._unfit(slot, now) is None:
            slot.asked_at = now
            slot.move(Move.DOUBT)
            return []
        orders: list[Order] = []
        if self.has(slot):
            self._end(slot, self._unfit(slot, now) or Reason.DRAINED, orders)
        self._queue_again(waiter)
        return orders + self.look_again(now)

    def ping_failed(self, slot: Slot, waiter: Waiter, now: float) -> list[Order]:
        """The borrower's ping was not answered; he goes back to his place in the queue."""
        orders: list[Order] = []
        if self.has(slot):
            self._end(slot, Reason.UNANSWERED, orders)
        self._note_unanswered(slot.asked_at, [waiter, *self.waiting()])
        self._doubt()
        self._queue_again(waiter)
        return orders + self.look_again(now)

    def returned(
        self, slot: Slot, now: float, verdict: Verdict, *, suspect: bool = False
    ) -> list[Order]:
        """A slot comes back the slow way.

        `suspect`: its session ended in a way that casts doubt on the others: they are pinged
        before they are lent.
        """
        orders: list[Order] = []
        if suspect:
            self._doubt()
        if not self.has(slot):
            return orders  # of before a fork, or brought home already: not ours any more
        if verdict is not Verdict.CLEAN:
            bad = Reason.BROKEN if verdict is Verdict.BROKEN else Reason.UNCLEAN
            self._end(slot, bad, orders)
        else:
            slot.ref.borrows += 1  # type: ignore[union-attr]  # _has() says that it has one
            if self.waiters:
                self.pace.returned(now)
            self._settle(slot, now, orders)
        return orders + self.look_again(now)

    # -- the runtime's answers to orders ----------------------------------------------------------

    def opened(self, slot: Slot, link: Any, now: float) -> list[Order]:
        """The answer to `Open`: here is the link."""
        orders: list[Order] = []
        ref = slot.ref
        late = self.hanging.came(ref, now)
        if ref is None or not self.has(slot):
            slot.link = link
            slot.state = SlotState.CLOSING  # forked, forgotten or too late: only its link counts
            reason = Reason.LATE if late else Reason.DRAINED
            if ref is not None and late:
                ref.link = link
                self.hanging.closing[ref.serial] = ref
            return [Close(slot, reason, discard=not late), *self.look_again(now)]
        self.opening.pop(ref.serial, None)
        slot.progress = None
        ref.link = link
        slot.link = link
        self.tally.connection_opened(now - slot.opened_at)
        slot.opened_at = slot.borrowed_at = now
        slot.retire_at = retire_at(now, self.limits.max_lifetime, self.random())
        slot.move(Move.OPENED)
        if slot.generation == self.generation:
            self.outage = None
            self.answered_at = now
            self.pace.opened(now)
            slot.vouch(self.epoch)
        self._settle(slot, now, orders)
        orders += self.look_again(now)
        self._arm(now, orders)
        return orders

    def open_failed(
        self,
        slot: Slot,
        error: Any,
        now: float,
        *,
        heals: bool,
        sqlstate: str | None,
        may_change: bool = False,
    ) -> list[Order]:
        """The answer to `Open`: it did not work.

        `may_change`: it would be tried with something else once the user's callable, or a file, says so. To be
        false after an attempt that was ordered `if_changed`: answers that are new each time are no news.
        """
        self.hanging.came(slot.ref, now)
        current = self.has(slot) and slot.generation == self.generation
        self._forget(slot)
        slot.move(Move.OPEN_FAILED)
        orders: list[Order] = []
        if current and self.phase is Phase.OPEN:  # else it says nothing of the server as it is now
            self._note_failure(
                slot, error, now, orders, heals=heals, sqlstate=sqlstate, may_change=may_change
            )
        return orders + self.look_again(now)

    def take_back(self, slot: Slot, error: Any, now: float) -> list[Order]:
        """The answer to `TakeBack`: what the opening hangs at. Its right is free; what it brings later is closed.

        Repeatable; nothing happens where its worker has come, or come to the next part, meanwhile.
        """
        ref, progress = slot.ref, slot.progress
        if ref is None or progress is None or not self.has(slot) or now < progress.until:
            return []
        self.hanging.add(ref, slot.opened_at)
        self.opening.pop(ref.serial, None)
        self.refs.pop(ref.serial, None)  # the commit point
        progress.taken_back = True
        orders: list[Order] = []
        if slot.generation == self.generation and self.phase is Phase.OPEN:
            self._note_failure(slot, error, now, orders, heals=True, sqlstate=None)
        return orders + self.look_again(now)

    def _note_failure(
        self,
        slot: Slot,
        error: Any,
        now: float,
        orders: list[Order],
        *,
        heals: bool,
        sqlstate: str | None,
        may_change: bool = False,
    ) -> None:
        """This slot could not be opened: what that says of the server."""
        self.tally.open_failures += 1
        if slot.opened_at < self.answered_at and now >= self._silent_from(slot):
            return  # left to itself, and others were answered since
        outage = self.outage or Outage(now)
        outage.note(
            error,
            now,
            heals=heals,
            sqlstate=sqlstate,
            random=self.random,
            may_change=may_change,
        )
        self.outage = outage  # complete: reports read it without the lock
        if not heals and not self._connected():
            self._refuse_all(Refusal.UNREACHABLE, now)
        self._report_outage(now, orders)

    def failed_late(self, slot: Slot, now: float) -> list[Order]:
        """The worker of an opening whose right was taken back has come, with nothing."""
        self.hanging.came(slot.ref, now)
        return self.look_again(now)

    def unchanged(self, slot: Slot, now: float) -> list[Order]:
        """The answer to `Open` with `if_changed`: it would be tried with what was refused."""
        self.hanging.came(slot.ref, now)
        current = self.has(slot) and slot.generation == self.generation
        self._forget(slot)
        slot.move(Move.OPEN_FAILED)
        outage = self.outage
        if current and outage is not None and not outage.heals:
            outage.unchanged(now)
            if not self._connected():
                self._refuse_all(Refusal.UNREACHABLE, now)
        return self.look_again(now)

    def closed(self, slot: Slot, reason: Reason, now: float) -> list[Order]:
        """The answer to `Close`: the connection has ended, its right is free."""
        ref = slot.ref
        if ref is not None and self.has(slot):
            self.tally.connection_closed(reason.value, ref.borrows)
        elif ref is not None:
            self.hanging.forget(ref)
        self._forget(slot)
        slot.move(Move.CLOSED)
        return self.look_again(now)

    def bring_home(self, ref: SlotRef, now: float) -> list[Order]:
        """A slot that nobody holds: free its right under a new slot. Repeatable.

        Its connection is discarded and replaced, never lent again: somebody may still hold it.
        """
        self.hanging.forget(ref)
        if self.refs.get(ref.serial) is not ref:
            return []  # brought home before, or of before a fork
        self.opening.pop(ref.serial, None)
        if ref.link is None:  # it was being opened: there is nothing to close
            self.refs.pop(ref.serial, None)
            return self.look_again(now)
        slot = Slot(generation=self.generation, epoch=self.epoch, now=now)
        slot.state = SlotState.CLOSING
        slot.link = ref.link
        successor = refer_to(slot, ref.serial, self.orphans, self.home)
        successor.borrows = ref.borrows
        successor.watched = ref.watched
        self.refs[ref.serial] = successor  # the commit point: from here on `ref` is not current
        self.tally.orphaned += 1
        return [Close(slot, Reason.ORPHANED, discard=True)]

    def hung_up(self, slot: Slot, now: float) -> list[Order]:
        """The watcher was told of this session's end and has condemned the slot: end it if idle."""
        orders: list[Order] = []
        self._end_idle(slot, Reason.HUNG_UP, orders)
        return orders + self.look_again(now)

    def doubt(self, _now: float) -> list[Order]:
        """A lent session has stopped answering: others are pinged before they are lent again."""
        self._doubt()
        return []

    def outdated(self, slot: Slot, now: float, *, ends: bool) -> list[Order]:
        """What the driver remembers for this slot's session is of an older schema; so it is for older ones.

        Each of them has it forgotten before it is lent again. `ends`: only a new session helps, so this one
        ends when it is given back, and all are replaced; but not again and again, since a program that goes on
        asking for a type that is gone fails over new sessions, too.
        """
        if not self.has(slot):
            return []
        if not ends:
            self._have_forgotten()
            return []
        slot.condemn(Reason.DRAINED)
        if now < self.replaced_at + REPLACE_AGAIN:
            return []
        self.replaced_at = now
        return self.drain(now)

    # -- the whole pool ---------------------------------------------------------------------------

    def open(self, now: float) -> list[Order]:
        """Start, or start again after `close`."""
        if self.phase is not Phase.OPEN:
            self.outage = None
            self.phase = Phase.OPEN
        return self.tick(now)

    def close(self, now: float) -> list[Order]:
        """Refuse everybody from now on; idle connections end now, those in use when given back."""
        # First: whoever gives back from now on comes the slow way and sees the rest.
        self.epoch += 1
        self.phase = Phase.CLOSED
        orders = self.drain(now)
        self._refuse_all(Refusal.CLOSED, now)
        return orders

    def drain(self, now: float) -> list[Order]:
        """Replace every connection: idle ones now, those in use when they are given back."""
        self.generation += 1
        self.epoch += 1
        orders: list[Order] = []
        closed = self.phase is Phase.CLOSED
        self._end_idles(Reason.POOL_CLOSED if closed else Reason.DRAINED, orders)
        # A `put` that had compared the epochs just before may append just after: look once more.
        self._arm_for(now + LOOK_ONCE_MORE, now, orders)
        return orders + self.look_again(now)

    def resize(self, min_size: int, max_size: int, now: float) -> list[Order]:
        """Change the limits. What is too much ends: idle connections now, others at their return."""
        self.limits = replace(self.limits, min_size=min_size, max_size=max_size)
        orders: list[Order] = []
        self._end_surplus(orders)
        orders += self.look_again(now)
        self._arm(now, orders)
        return orders

    def inherited(self) -> list[tuple[Any, bool]]:
        """In a forked child: the parent's links, and whether each was in use at the fork."""
        refs = [*self.refs.values(), *self.hanging.closing.values()]
        return [(ref.link, _busy(ref)) for ref in refs if ref.link is not None]

    def forked(self) -> None:
        """In a forked child, once the inherited links have been let go of: forget everything."""
        self.generation += 1
        self.epoch += 1
        self._empty()

    def tick(self, now: float) -> list[Order]:
        """What time brings: retire, shrink, probe, warn. Orders the next tick only if one is due.

        Also the backstop for interrupts: repeats what an interrupted move left half done.
        """
        orders: list[Order] = []
        self.armed = float("inf")
        self._audit(now)
        self._end_old(now, orders)
        self._take_back_all(now, orders)
        self._warn_overdue(now, orders)
        self._report_outage(now, orders)
        orders += self.look_again(now)
        self._arm(now, orders)
        return orders

    # -- what can be read -------------------------------------------------------------------------

    def ask(self, now: float) -> bool:
        """Somebody asks how the pool is, and decides by the answer whether it gets work. Takes no lock.

        While nothing can be opened he counts like one who waits, but for the pace: nobody borrows from a
        pool that is not ready. True: tick, in the background; the next attempt may be due by now.
        """
        self.asked.note(now)
        troubled = self.outage is not None or bool(self.opening)
        return troubled and self.phase is Phase.OPEN and self.asked.wakes(now)

    def slots(self) -> list[Slot]:
        """All slots that somebody holds. For reports: hold them no longer than needed."""
        return [slot for ref in list(self.refs.values()) if (slot := ref()) is not None]

    def held_by(self, owner: int) -> dict[int, Any]:
        """The links that are lent to `owner`, by their slots' serials; not what getconn() has lent.

        Not under the lock: whoever decides about them looks again (`Waiter.keeps`).
        """
        return {
            slot.ref.serial: slot.link
            for slot in self.slots()
            if slot.holder == owner and slot.state is IN_USE and not slot.loose and slot.ref
        }

    def count(self) -> dict[SlotState, int]:
        """How many slots are in which state; their sum is the pool's size."""
        counts = dict.fromkeys(SlotState, 0)
        for ref in list(self.refs.values()):
            slot = ref()
            # Freed, and on its way home: its connection still counts, as one that is closing.
            counts[SlotState.CLOSING if slot is None else slot.state] += 1
        return counts

    def waiting(self) -> list[Waiter]:
        """Everybody who waits, in order; without those who died and were not noticed yet."""
        found = [reference() for reference in list(self.waiters.values())]
        return [waiter for waiter in found if waiter is not None and waiter.slot is None]

    def borrows(self) -> int:
        """How many borrows ended with the connection given back."""
        return self.tally.borrows_of_gone + sum(ref.borrows for ref in list(self.refs.values()))

    def silent_since(self, now: float, unanswered: float | None = None) -> float | None:
        """Since when the server has owed an answer, if that is why nobody can be served."""
        return silent_since(self.slots(), unanswered, now, self.tally.usual_opening())

    def _unanswered_since(self, now: float, waiter: Waiter) -> float | None:
        """Since when the server, or a callable of the user's, has owed what this waiter waits for."""
        since = self.silent_since(now, waiter.unanswered)
        if since is None and not self.idle:
            since = hanging_since(self.slots(), now, self.tally.usual_opening())
        return since

    def lacks_connections(self) -> bool:
        """Whether there are fewer than there may be: one more could have served a borrower that got none."""
        return self._connected() < self.limits.max_size

    # -- giving -----------------------------------------------------------------------------------

    def _hand_over_all(self, now: float, orders: list[Order]) -> None:
        while self._hand_over_one(now, orders):
            pass

    def _hand_over_one(self, now: float, orders: list[Order]) -> bool:
        waiter = self._first_waiter(now)
        if waiter is None:
            return False
        slot = self._pick(now, orders)
        if slot is None:
            return False
        self._give(slot, waiter, now)
        return True

    def _first_waiter(self, now: float) -> Waiter | None:
        """Who is first in line and has nothing yet; on the way, complete interrupted gifts."""
        while self.waiters:
            ticket = next(iter(self.waiters))
            entry = self.waiters.get(ticket)  # a signal handler may have served it meanwhile
            waiter = None if entry is None else entry()
            if waiter is None:  # killed: it left by dying
                self.waiters.pop(ticket, None)
            elif waiter.slot is not None or waiter.refusal is not None:
                self._let_go(waiter, now)
            else:
                return waiter
        return None

    def _note_unanswered(self, asked_at: float, waiters: list[Waiter]) -> None:
        """All of them have waited for this answer, whoever asked."""
        for waiter in waiters:
            if waiter.unanswered is None:
                waiter.unanswered = asked_at

    def _queue_again(self, waiter: Waiter) -> None:
        """What was given to a waiter was of no use: back to his place, if the pool is still open."""
        waiter.slot = None
        if self.phase is Phase.OPEN:
            self._requeue(waiter)
        else:
            waiter.refusal = Refusal.CLOSED
            self.tally.refused += 1

    def _requeue(self, waiter: Waiter) -> None:
        """Put a waiter back to where he was in the queue: behind those who came before him."""
        self.waiters[waiter.ticket] = weakref.ref(waiter)
        for ticket in sorted(self.waiters, reverse=True):
            if ticket <= waiter.ticket:
                self.waiters.move_to_end(ticket, last=False)

    def _give(self, slot: Slot, waiter: Waiter, now: float) -> None:
        slot.holder = waiter.owner
        slot.asked_at = now
        waiter.slot = slot  # from here on it is the waiter's
        self._let_go(waiter, now)

    def _let_go(self, waiter: Waiter, now: float) -> None:
        """Wake a waiter who has his slot or his refusal, then take him out of the queue."""
        waiter.wake()
        if self.waiters.pop(waiter.ticket, None) is not None:
            self.tally.wait_ended(now - waiter.queued_at, served=waiter.refusal is None)

    def _pick(self, now: float, orders: list[Order]) -> Slot | None:
        """A slot for a waiter: a fit one, else one that he has to ping (its state says so)."""
        while self.idle:
            slot = self.take(now, 0)
            if slot is not None:
                return slot
        while self.aside:
            slot = self._second_look(self.aside.pop(), now, orders)
            if slot is not None:
                return slot
        return None

    def _second_look(self, slot: Slot, now: float, orders: list[Order]) -> Slot | None:
        """What to do with a slot that was not fit to be lent at once: ping it, or end it."""
        reason = self._unfit(slot, now)
        if reason is None:
            slot.move(Move.DOUBT)
            return slot
        self._end(slot, reason, orders)
        return None

    def _unfit(self, slot: Slot, now: float) -> Reason | None:
        """Why this slot must not be lent any more, ever."""
        if self.phase is Phase.CLOSED:
            return Reason.POOL_CLOSED
        if slot.condemned is not None:
            return slot.condemned
        if slot.generation != self.generation:
            return Reason.DRAINED
        if now >= slot.retire_at:
            return Reason.RETIRED
        if self._surplus() > 0:
            return Reason.SURPLUS
        return None

    def _surplus(self) -> int:
        """How many connections more than max_size would remain; only resize() makes it positive."""
        if len(self.refs) <= self.limits.max_size:
            return 0
        counts = self.count()
        return sum(counts.values()) - counts[SlotState.CLOSING] - self.limits.max_size

    def _pass_on(self, slot: Slot, now: float, orders: list[Order]) -> None:
        """Settle a slot that nobody has touched: a doubt that came up since it was given stands."""
        if slot.state is IN_USE and slot.epoch != self.epoch:
            slot.move(Move.DOUBT)
        self._settle(slot, now, orders)

    def _settle(self, slot: Slot, now: float, orders: list[Order]) -> None:
        """Bring a slot that we own to where it belongs: the first waiter, its place, or its end."""
        reason = self._unfit(slot, now)
        if reason is not None:
            self._end(slot, reason, orders)
            return
        if (slot.reset_pending or slot.outdated) and slot.state is IN_USE:
            slot.move(Move.DOUBT)  # whoever gets it reads the answer first, or has it forget
        waiter = self._first_waiter(now)
        if slot.state is SlotState.PINGING:
            if waiter is None:
                slot.move(Move.SPARE)
                self.aside.append(slot)
            else:
                self._give(slot, waiter, now)
            return
        # A clean return is proof of life: the slot is as good as the machine's epoch.
        slot.vouch(self.epoch)
        if waiter is not None:
            slot.move(Move.HAND_OVER if slot.state is IN_USE else Move.TAKE)
            slot.borrowed_at = now
            self._give(slot, waiter, now)
            return
        if slot.state is IN_USE:
            slot.move(Move.PUT)
        self.idle.append(slot)

    # -- growing and failing ----------------------------------------------------------------------

    def _grow(self, now: float, orders: list[Order]) -> None:
        wanted = self.waiters or self.opening or self.outage is not None
        if not wanted and len(self.refs) >= self.limits.min_size:
            return  # mostly: each return that is not simply clean asks
        while self._should_open(now, orders):
            serial = self.serials = self.serials + 1
            slot = Slot(generation=self.generation, epoch=self.epoch, now=now)
            slot.brief = self._is_brief(now)
            slot.progress = Progress(now, BRIEF_SECONDS if slot.brief else CONNECT_SECONDS)
            self.hanging.begins(now)
            ref = refer_to(slot, serial, self.orphans, self.home)
            self.refs[ref.serial] = ref
            self.opening[ref.serial] = ref
            outage = self.outage
            orders.append(Open(slot, if_changed=outage is not None and outage.asks(now)))
            self._arm_for(slot.progress.until, now, orders)
        self._look_later(now, orders)

    def _look_later(self, now: float, orders: list[Order]) -> None:
        """If fewer are being opened than could be, look again when that may be too few."""
        if not self._is_wanted(now) or not self._may_open():
            return
        due = self._next_silent(now)
        waiting, opening = min(len(self.waiters), self._most_at_once()), self._under_way(now)
        if opening < waiting and self.outage is None and not self._general_silence(now):
            usual = self.tally.usual_opening()
            due = min(due, self.pace.look_at(now, waiting, opening, usual))
        if due < NEVER:
            self._arm_for(due, now, orders)

    def _should_open(self, now: float, orders: list[Order]) -> bool:
        if not self._may_grow(now):
            return False
        if self.outage is not None and self._under_way(now):
            return False  # one probe at a time
        due = self._next_attempt(now)
        if now >= due:
            return True
        orders.append(TickAt(due))
        return False

    def _next_attempt(self, now: float) -> float:
        """Not before this, in an outage and beside openings that hang; else in the past."""
        beside, outage = self.hanging.next_at(), self.outage
        if outage is None:
            return beside
        due = outage.due(waited_for=bool(self.waiters), asked=self.asked.lately(now))
        return max(beside, due)

    def _may_open(self) -> bool:
        return self.phase is Phase.OPEN and len(self.refs) < self.limits.max_size

    def _may_grow(self, now: float) -> bool:
        """Whether one more connection is wanted, and allowed."""
        if not self._may_open():
            return False
        silence = self._general_silence(now)
        if silence is not None:
            return self._is_wanted(now) and not silence.under_way and silence.brief < PROBES
        opening = self._under_way(now)
        if opening < self._wanted(now, opening):
            return True
        if self.outage is not None and self._is_wanted(now) and not self._connected():
            return not opening  # also where min_size is 0: else it would never be ready again
        # Nobody waits. Before the first connection of all, open one and see: a wrong password is
        # then one failed login, not min_size of them.
        unproven = self.opening and not self.tally.opened
        return len(self.refs) < self.limits.min_size and not unproven

    def _is_wanted(self, now: float) -> bool:
        """Whether somebody wants a connection, or wants to know whether there is one."""
        return bool(self.waiters) or self.asked.lately(now)

    def _wanted(self, now: float, opening: int) -> int:
        """How many openings should be under way for those who wait, where `opening` are."""
        waiting = len(self.waiters)
        # With no slot but those, nothing can come back; in an outage there is one probe at a time.
        if opening < waiting and self.outage is None and len(self.refs) > 0:
            usual = self.tally.usual_opening()
            return min(self.pace.wanted(now, waiting, usual), self._most_at_once())
        return waiting

    def _most_at_once(self) -> int:
        """Before anybody was served some rights are kept: if none is answered, there is one to try with."""
        most = self.limits.max_size
        return most if self.pace.served is not None else max(FIRST_WAVE, most - RESERVE)

    # -- connects that are not answered -----------------------------------------------------------

    def _silent_from(self, slot: Slot) -> float:
        """When a connect that is under way is left to itself."""
        return slot.opened_at + patience(self.tally.usual_opening())

    def _silence(self, now: float) -> Silence | None:
        """What the connects under way say of the server, once the oldest is not answered for long."""
        oldest = next(iter(self.opening.values()), None)
        if oldest is None:
            return None
        slot = oldest()
        if slot is not None and now < self._silent_from(slot):
            return None  # the others are younger
        return Silence(list(self.opening.values()), now, self.tally.usual_opening())

    def _general_silence(self, now: float) -> Silence | None:
        """The same if nothing was answered since: then one more is tried at a time."""
        silence = self._silence(now)
        general = silence is not None and silence.is_general(self.answered_at)
        return silence if general else None

    def _under_way(self, now: float) -> int:
        """How many openings may still be answered soon."""
        silence = self._silence(now)
        return len(self.opening) if silence is None else silence.under_way

    def _is_brief(self, now: float) -> bool:
        """Whether what is opened now is tried beside one that has the whole time and is not answered."""
        silence = self._general_silence(now)
        if silence is not None:
            return silence.patient
        if TIMES_USUAL * self.tally.usual_opening() > BRIEF_SECONDS:
            return False  # slow as a rule
        if self.limits.max_size == 1:
            failures = 0 if self.outage is None else self.outage.failures
            return failures % LONG_ONE_OF != LONG_ONE_OF - 1
        # A small pool has no rights to keep for later: those come back soon.
        slots = [slot for ref in list(self.opening.values()) if (slot := ref()) is not None]
        patient = sum(not slot.brief for slot in slots)
        return patient >= max(1, self.limits.max_size - RESERVE)

    def _next_silent(self, now: float) -> float:
        """When the next of the connects under way is left to itself; infinite: none will be."""
        slots = [slot for ref in list(self.opening.values()) if (slot := ref()) is not None]
        times = map(self._silent_from, slots)
        return next((when for when in times if when > now), NEVER)

    def _report_outage(self, now: float, orders: list[Order]) -> None:
        outage = self.outage
        if outage is None or outage.reported or now - outage.since < self.reconnect_timeout:
            return
        outage.reported = True
        orders.append(ReportOutage(now - outage.since))

    def _refusal(self, waiter: Waiter, now: float) -> Refusal | None:
        if self.phase is not Phase.OPEN:
            return Refusal.CLOSED
        outage = self.outage
        if outage is not None and outage.is_hopeless(now) and not self._connected():
            return Refusal.UNREACHABLE
        if 0 < self.limits.max_waiting <= len(self.waiters) and (
            len(self.waiting()) >= self.limits.max_waiting
        ):
            return Refusal.TOO_MANY
        if self._would_wait_for_itself(waiter):
            return Refusal.DEADLOCK
        return None

    def _would_wait_for_itself(self, waiter: Waiter) -> bool:
        """Whether each connection stays lent for as long as somebody waits, this waiter included."""
        if not waiter.keeps or len(self.refs) < self.limits.max_size or self.idle or self.aside:
            return False
        kept = {n: each.owner for each in [*self.waiting(), waiter] for n in each.keeps}
        slots = self.slots()
        return len(slots) == len(self.refs) and all(
            slot.state is IN_USE
            and not slot.loose
            and slot.ref is not None
            and kept.get(slot.ref.serial) == slot.holder
            for slot in slots
        )

    def _connected(self) -> int:
        """How many connections there are that somebody could still give back, or ping."""
        counts = self.count()
        return sum(counts[state] for state in CONNECTED)

    def _refuse_all(self, refusal: Refusal, now: float) -> None:
        while (waiter := self._first_waiter(now)) is not None:
            waiter.refusal = refusal
            self.tally.refused += 1

    # -- ending -----------------------------------------------------------------------------------

    def _doubt(self) -> None:
        """Have every slot pinged before it is lent again."""
        self.epoch += 1

    def _have_forgotten(self) -> None:
        """Have the driver's memory of every session that is open now cleared before it is lent again."""
        for slot in self.slots():
            if slot.state is not SlotState.OPENING:
                slot.outdated = True
        self._doubt()  # last: who sees the epoch sees the mark

    def _end(self, slot: Slot, reason: Reason, orders: list[Order]) -> None:
        """End the connection of a slot that we own."""
        slot.move(Move.END)
        orders.append(Close(slot, reason, discard=reason in _DISCARDED))

    def _end_idle(self, slot: Slot, reason: Reason, orders: list[Order]) -> bool:
        """End the connection of a slot if it is idle: whoever takes it out of its place owns it."""
        for place in (self.idle, self.aside):
            try:
                place.remove(slot)  # atomic, like pop; linear in max_size
            except ValueError:
                continue
            self._end(slot, reason, orders)
            return True
        return False

    def _end_idles(self, reason: Reason, orders: list[Order]) -> None:
        for slot in self._cold_first():
            self._end_idle(slot, slot.condemned or reason, orders)

    def _cold_first(self) -> list[Slot]:
        """All slots that look idle now; only who takes one out of its place owns it."""
        return _snapshot(self.aside) + _snapshot(self.idle)

    def _end_old(self, now: float, orders: list[Order]) -> None:
        """Retire and shrink, from the cold end."""
        spare = self._connected() - self.limits.min_size
        for slot in self._cold_first():
            reason = self._unfit(slot, now)
            if reason is None and spare > 0 and now >= slot.borrowed_at + self.limits.max_idle:
                reason = Reason.SHRUNK
            if reason is not None and self._end_idle(slot, reason, orders):
                spare -= 1

    def _end_surplus(self, orders: list[Order]) -> None:
        """After resize(): end idle ones at once, condemn as many in use as are still too many."""
        surplus = self._surplus()
        for slot in self._cold_first():
            if surplus > 0 and self._end_idle(slot, Reason.SURPLUS, orders):
                surplus -= 1
        for slot in self.slots():
            if surplus > 0 and slot.state in {IN_USE, SlotState.PINGING}:
                slot.condemn(Reason.SURPLUS)
                surplus -= 1

    def _forget(self, slot: Slot) -> None:
        """Let go of a slot that has no connection any more; repeatable."""
        ref = slot.ref
        if ref is None:
            return
        if self.refs.get(ref.serial) is ref:
            self.opening.pop(ref.serial, None)
            self.refs.pop(ref.serial, None)
        slot.ref = None  # with its last reference, so that its death calls nobody

    def has(self, slot: Slot) -> bool:
        """Whether this slot is one of ours: not of before a fork, not brought home under another."""
        return slot.ref is not None and self.refs.get(slot.ref.serial) is slot.ref

    # -- time -------------------------------------------------------------------------------------

    def _audit(self, now: float) -> None:
        """Repair what an interrupt between two statements can leave behind."""
        for serial in list(self.opening):
            if serial not in self.refs:
                self.opening.pop(serial, None)
        if self.phase is Phase.CLOSED:
            self._refuse_all(Refusal.CLOSED, now)

    def _take_back_all(self, now: float, orders: list[Order]) -> None:
        for ref in list(self.opening.values()):
            slot = ref()
            if slot is not None and slot.progress is not None and now >= slot.progress.until:
                orders.append(TakeBack(slot))

    def _next_to_take_back(self, now: float) -> float:
        """When the next right is; one that is due may have been lost to an interrupt, with its order."""
        slots = [slot for ref in list(self.opening.values()) if (slot := ref()) is not None]
        until = [slot.progress.until for slot in slots if slot.progress is not None]
        return min((when if when > now else now + LOOK_ONCE_MORE for when in until), default=NEVER)

    def _warn_overdue(self, now: float, orders: list[Order]) -> None:
        for slot in self.slots():
            # Compared as `_due_times` computes it, so that no tick comes a rounding error early.
            if slot.state is not IN_USE or now < slot.borrowed_at + self.limits.overdue_after:
                slot.told = False
            elif not slot.told:
                slot.told = True
                orders.append(Overdue(slot, now - slot.borrowed_at))

    def _arm(self, now: float, orders: list[Order]) -> None:
        """Order the next tick, unless an earlier one is ordered: an idle pool wakes nobody."""
        due = self._next_due(now)
        if due < NEVER:
            self._arm_for(max(due, now), now, orders)

    def _next_due(self, now: float) -> float:
        shrinkable = self._connected() > self.limits.min_size
        due = min(due_times(self.slots(), self.limits, now, shrinkable=shrinkable), default=NEVER)
        due = min(due, self._next_to_take_back(now))
        hindered = self.outage is not None or len(self.hanging) > 0
        if hindered and not self._under_way(now) and self._may_grow(now):
            return min(due, self._next_attempt(now))
        return due

    def _arm_for(self, due: float, now: float, orders: list[Order]) -> None:
        # A tick whose time has passed may have been lost to an interrupt, with the list it was in.
        if due < self.armed or self.armed < now:
            self.armed = due
            orders.append(TickAt(due))


def _snapshot(place: deque[Slot]) -> list[Slot]:
    """What is in a place while `take` and `put` go on changing it without a lock."""
    while True:
        slots = _try_snapshot(place)
        if slots is not None:
            return slots


def _try_snapshot(place: deque[Slot]) -> list[Slot] | None:
    try:
        return list(place)
    except RuntimeError:  # changed while it was copied
        return None


def _busy(ref: SlotRef) -> bool:
    """Whether somebody may have been using this link at the moment of the fork."""
    slot = ref()
    return slot is None or slot.state is not IDLE
