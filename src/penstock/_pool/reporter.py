"""What a pool tells people: errors, health, the one line of its repr. From its state alone.

One job: turn the machine's values (`Refusal`, `Outage`, counts) into exceptions and texts.

It must not know: threads, gates, how anything is done. It reads the machine without its lock: a
report is a snapshot, and must not wait for what it reports on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from penstock._machine.machine import Machine, Phase, Refusal
from penstock._machine.slot import SlotState
from penstock._process import runtime
from penstock._process.clock import clock
from penstock._process.stacks import first_of_user, seen
from penstock.errors import (
    MisuseError,
    PenstockError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    TooManyRequests,
    flavoured,
)
from penstock.errors.figures import (
    Counts,
    Hold,
    Holder,
    OwnHold,
)
from penstock.errors.next_steps import STEP_HANGS, STEP_OWN, STEP_SILENT, step_on_a_loop

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import FrameType

    from penstock._machine.outage import Outage
    from penstock._machine.progress import Progress
    from penstock._machine.slot import Slot
    from penstock._pool.opener import Failure

#: Where the holders stand is looked up at most once in so many seconds per pool: in a pile-up of
#: time-outs every borrower would walk every stack.
REPORT_EVERY = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What `pool.health()` answers, for liveness and readiness probes.

    Attributes:
        live: the process itself is fine. A database that is down is no reason to restart a worker:
            this is false only for a pool that was closed.
        ready: the pool can serve. A pool that is merely busy is ready.
        why: one line: the reason, free of secrets.
        since: seconds since when it is as it is; None if nothing happened yet.
    """

    live: bool
    ready: bool
    why: str
    since: float | None

    def __bool__(self) -> bool:
        return self.ready


class Reporter:
    """Reports on one pool."""

    def __init__(self, name: str, machine: Machine, driver: Any) -> None:
        self._name = name
        self._machine = machine
        self._driver = driver
        self._holders: tuple[float, tuple[Holder, ...]] = (float("-inf"), ())
        self.closed_at: float | None = None
        self.opened_at: float | None = None

    def counts(self) -> Counts:
        """How many slots are in which state."""
        counts = self._machine.count()
        return Counts(
            opening=counts[SlotState.OPENING],
            idle=counts[SlotState.IDLE],
            in_use=counts[SlotState.IN_USE],
            pinging=counts[SlotState.PINGING],
            closing=counts[SlotState.CLOSING],
            max_size=self._machine.limits.max_size,
            waiting=len(self._machine.waiting()),
        )

    def line(self, kind: str) -> str:
        """One line that tells all: what `repr(pool)` is."""
        counts, machine = self.counts(), self._machine
        parts = [f"{counts.idle} idle", f"{counts.in_use} in use", f"{counts.opening} opening"]
        parts += [f"{counts.pinging} pinging"] if counts.pinging else []
        parts += [f"{counts.closing} closing"] if counts.closing else []
        text = f"<{kind} {self._name!r} {machine.phase.value}: {', '.join(parts)} of "
        text += str(counts.max_size)
        waiting = machine.waiting()
        if waiting:
            longest = clock() - waiting[0].queued_at
            text += f"; {len(waiting)} waiting, longest {longest:.1f} s"
        outage = machine.outage
        if outage is not None:
            code = f" (SQLSTATE {outage.sqlstate})" if outage.sqlstate else ""
            text += f"; down for {clock() - outage.since:.1f} s{code}"
        return text + ">"

    def health(self) -> Health:
        """Live, ready, why, since when: from state, without borrowing."""
        machine, now = self._machine, clock()
        if machine.phase is Phase.CLOSED:
            since = None if self.closed_at is None else now - self.closed_at
            return Health(live=False, ready=False, why="closed", since=since)
        since = None if self.opened_at is None else now - self.opened_at
        if machine.phase is Phase.NEW:
            return Health(
                live=True, ready=True, why="not opened yet: nothing was tried", since=since
            )
        counts, outage = self.counts(), machine.outage
        alive = counts.idle + counts.in_use
        if outage is not None:
            why = f"cannot open connections: {outage.error.text}"
            why += f"; {alive} still open" if alive else ""
            # Who asks has it tried again, whatever min_size is (`Machine.ask`): this is never for ever.
            return Health(live=True, ready=alive > 0, why=why, since=now - outage.since)
        silent = machine.silent_since(now)
        if silent is not None:
            hanging = self._hanging()
            why = f"the server has not answered for {now - silent:.1f} s"
            if hanging is not None:
                why = f"{hanging.doing} has not returned for {now - hanging.since:.1f} s"
            return Health(live=True, ready=False, why=why, since=now - silent)
        if not alive and not machine.tally.opened:
            return Health(live=True, ready=True, why="no connection opened yet", since=since)
        why = f"{counts.in_use} of {counts.max_size} in use, {counts.waiting} waiting"
        return Health(live=True, ready=True, why=why, since=since)

    # -- errors -----------------------------------------------------------------------------------

    def error(
        self,
        refusal: Refusal | None,
        timeout: float,
        waited: float,
        *,
        silent_since: float | None = None,
        where: str | None = None,
        owner: int = 0,
        top: FrameType | None = None,
        loop: str = "",
    ) -> PenstockError:
        """Why a borrower got nothing; `refusal` None: its timeout passed. The cause is attached.

        `silent_since`: what the machine says of the server; `where`: which one that is. `owner` and
        `top`: who it is, and where it stands; `loop`: whose event loop it holds up.
        """
        machine = self._machine
        if refusal is Refusal.CLOSED:
            return self.closed()
        if refusal is Refusal.TOO_MANY:
            return self._make(
                TooManyRequests, max_waiting=machine.limits.max_waiting, counts=self.counts()
            )
        if refusal is Refusal.DEADLOCK:
            return self.deadlock(loop)
        outage = machine.outage
        if outage is not None and (
            refusal is Refusal.UNREACHABLE
            or silent_since is not None
            or machine.lacks_connections()
        ):
            return self._unavailable(outage, waited)
        if silent_since is not None:
            return self._silent(silent_since, waited, where)
        if refusal is Refusal.UNREACHABLE:  # and it healed in this very moment
            return self._make(
                ServerUnavailable, waited=waited, reason="it healed just now; try again"
            )
        failure = None if outage is None else outage.error
        error = self._make(
            PoolTimeout,
            timeout=timeout,
            waited=waited,
            counts=self.counts(),
            holders=self.holders(),
            own=self._own(owner, top),
            loop=loop,
            sqlstate=failure and failure.sqlstate,
            reason=failure and failure.text,
            next_step=failure and failure.next_step,
        )
        if failure is not None:  # full, and one that ends cannot be replaced
            error.__cause__ = failure.error
        return error

    def closed(self) -> PenstockError:
        """The pool is not open."""
        at = self.closed_at
        return self._make(PoolClosed, closed_seconds=None if at is None else clock() - at)

    def deadlock(self, loop: str = "") -> PenstockError:
        """Every connection is held by a borrower that waits for one, the caller among them."""
        in_use = f"({self.counts().in_use} of {self._machine.limits.max_size} in use)"
        if loop:
            return self.misuse(
                f"this thread runs an event loop ({loop}), which stands still while it waits, and holds "
                f"connections itself; every other one is held by a borrower that waits {in_use}: it "
                "would wait for itself",
                step_on_a_loop(loop),
            )
        return self.misuse(
            "this borrower holds a connection and asks for another, while every connection is held "
            f"by a borrower that waits {in_use}: it would wait for itself",
            STEP_OWN,
        )

    def locked(self, owner: int, timeout: float, waited: float) -> PenstockError:
        """The pool's own lock was not free; `owner`: the number of the thread that has it."""
        held_by = holder_report([Hold(ident=owner, seconds=waited)])
        return self._make(
            PoolTimeout,
            timeout=timeout,
            waited=waited,
            counts=self.counts(),
            locked_by=held_by[0] if held_by else None,
        )

    def ending(self) -> PenstockError:
        """No thread can be started, so nothing can be opened."""
        return self._make(
            ServerUnavailable,
            reason="no thread can be started to connect: the interpreter is ending",
            next_step="use the pool before the interpreter ends: atexit handlers and __del__ are late",
        )

    def misuse(self, what: str, next_step: str) -> PenstockError:
        """The program did something that cannot be right."""
        return self._make(MisuseError, what=what, next_step=next_step)

    def not_lent(self) -> PenstockError:
        """putconn() got what getconn() has not lent, or what was given back already."""
        return self.misuse(
            "putconn() got a connection that is not lent by getconn() of this pool",
            "give each connection back once, to the pool that it came from",
        )

    def _unavailable(self, outage: Outage, waited: float) -> PenstockError:
        failure = outage.error
        error = self._make(
            ServerUnavailable,
            attempts=outage.failures,
            down_seconds=clock() - outage.since,
            waited=waited,
            sqlstate=failure.sqlstate,
            reason=failure.text,
            heals=failure.heals,
            next_step=failure.next_step,
            holders=self.holders(),
            counts=self.counts(),
        )
        error.__cause__ = failure.error
        return error

    def _silent(self, since: float, waited: float, where: str | None) -> PenstockError:
        """Nothing was refused, and nothing answered: the server, or a callable of the program's own."""
        counts = self.counts()
        under_way = f"{counts.opening} being opened, {counts.pinging} being pinged"
        reason, step = f"{where or 'the server'} neither answers nor refuses", STEP_SILENT
        hanging = self._hanging()
        if hanging is not None:
            reason = f"{hanging.doing} has not returned for {clock() - hanging.since:.1f} s"
            step = STEP_HANGS
        return self._make(
            ServerUnavailable,
            attempts=0,
            down_seconds=clock() - since,
            waited=waited,
            reason=f"{reason} ({under_way})",
            next_step=step,
            counts=counts,
        )

    def _hanging(self) -> Progress | None:
        """The oldest connect under way, if it is in a callable of the user's and not at the server."""
        slots = [each for each in self._machine.slots() if each.state is SlotState.OPENING]
        oldest = min(slots, key=lambda each: each.opened_at, default=None)
        progress = None if oldest is None else oldest.progress
        return None if progress is None or progress.doing is None else progress

    def not_opened(self, failure: Failure | None, waited: float) -> PenstockError:
        """A connection outside the pool could not be opened; `failure` None: not in time."""
        if failure is None:
            return self._make(
                ServerUnavailable, waited=waited, reason=f"no answer within {waited:.1f} s"
            )
        error = self._make(
            ServerUnavailable,
            waited=waited,
            sqlstate=failure.sqlstate,
            reason=failure.text,
            heals=failure.heals,
            next_step=failure.next_step,
        )
        error.__cause__ = failure.error
        return error

    def _make(self, base: type[PenstockError], **fields: Any) -> PenstockError:
        made: PenstockError = flavoured(base, self._driver)(pool=self._name, **fields)
        return made

    # -- who holds what ---------------------------------------------------------------------------

    def holders(self) -> tuple[Holder, ...]:
        """Who has had connections longest, and where they stand; looked up once a second."""
        at, known = self._holders
        now = clock()
        if now - at < REPORT_EVERY:
            return known
        holds = [_hold(slot, now) for slot in self._machine.slots() if _is_lent(slot)]
        found = tuple(self._report(holds))
        self._holders = (now, found)
        return found

    def _own(self, owner: int, top: FrameType | None) -> list[OwnHold]:
        """What the borrower itself holds, longest first; `top`: where it stands."""
        now = clock()
        held = [
            (slot.borrowed_at, slot.place, slot.link, slot.loose)
            for slot in self._machine.slots()
            if owner and slot.holder == owner and _is_lent(slot) and slot.link is not None
        ]
        sights = seen({id(link.conn) for _, _, link, _ in held}, top) if held else {}
        found = []
        for since, noted, link, loose in sorted(held, key=itemgetter(0)):
            sight, seconds = sights.get(id(link.conn)), max(0.0, now - since)
            own = partial(OwnHold, seconds=seconds, kind=self._kind(), by_getconn=loose)
            if noted is not None and noted[0] == since:
                found.append(own(file=noted[1], line=noted[2]))
            elif sight is None:
                found.append(own())
            else:
                function = None if sight.bound else sight.function
                found.append(own(file=sight.file, line=sight.line, function=function))
        return found

    def _kind(self) -> str:
        return "greenlet" if runtime.is_green() else "thread"

    def holder_of(self, slot: Slot) -> Holder | None:
        """Where this slot's holder stands now."""
        found = self._report([_hold(slot, clock())])
        return found[0] if found else None

    def _report(self, holds: list[Hold]) -> list[Holder]:
        # Those of gevent's greenlets; a thread's are looked up by its number.
        frames, names = runtime.whereabouts(hold.ident for hold in holds)
        named = [
            replace(hold, thread=names[hold.ident], kind="greenlet")
            if hold.ident in names
            else hold
            for hold in holds
        ]
        return holder_report(named, frames=frames)


def _is_lent(slot: Slot) -> bool:
    return slot.state is SlotState.IN_USE


def _hold(slot: Slot, now: float) -> Hold:
    link = slot.link
    activity = None if link is None else link.activity().value
    return Hold(ident=slot.holder, seconds=max(0.0, now - slot.borrowed_at), activity=activity)


# -- where the holders stand ------------------------------------------------------------------------


def holder_report(
    holds: Iterable[Hold],
    *,
    limit: int = 3,
    frames: Mapping[int, FrameType] | None = None,
) -> list[Holder]:
    """Find out where the holders of connections stand right now.

    Costs nothing until it is called, and then one walk up each stack. Never raises an
    `Exception`: an error report must not hide the error.

    Args:
        holds: the leases to report.
        limit: how many to report, longest held first.
        frames: ident -> current frame; the default is `sys._current_frames()`. Runtimes whose
            borrowers are no threads hand in theirs.

    Returns:
        At most `limit` holders, longest first; empty if nothing could be found out.
    """
    now: Mapping[int, FrameType] | None = None
    try:
        longest = sorted(holds, key=lambda hold: hold.seconds, reverse=True)[:limit]
        now = sys._current_frames() if frames is None else frames
        return [_holder(hold, now.get(hold.ident)) for hold in longest]
    except Exception:  # noqa: BLE001  see above
        return []
    finally:
        now = None  # it holds this frame, too: a cycle that would keep every thread's variables


def _holder(hold: Hold, top: FrameType | None) -> Holder:
    frame = first_of_user(top)
    return Holder(
        seconds=hold.seconds,
        thread=hold.thread or _thread_name(hold.ident),
        file=None if frame is None else frame.f_code.co_filename,
        line=None if frame is None else frame.f_lineno,
        # co_qualname has the class, too
        function=None if frame is None else frame.f_code.co_qualname,
        activity=hold.activity,
        query=hold.query,
        kind=hold.kind,
    )


def _thread_name(ident: int) -> str:
    # Only where threading is in use already; `enumerate()` would take a lock of threading's.
    threading = sys.modules.get("threading")
    thread = getattr(threading, "_active", {}).get(ident)
    return str(getattr(thread, "name", ident))
