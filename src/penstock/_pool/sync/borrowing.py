"""The slow half of a borrow: waiting for a slot, making sure of it, and giving it back unclean.

One job: everything between a borrower and the machine that is not the hot path (`_pool/sync/lease.py`).

It must not know: how connections are opened and closed (`_pool/sync/executor.py`), when to grow and whom to serve
(the machine). It takes the pool's `_lock` for one move at a time, never while it waits, pings, rolls
back or runs the user's code, and waits for it as long as the borrower would (`_take_lock`).

Interrupts: whoever holds a slot in a local variable drops it when an exception passes; the slot then
comes home by itself (`slot.py`). He drops it when he returns, too: a frame may be kept by an error
that was caught below it, in the user's code, a driver's or a signal handler's. A waiter's guard gives
an untouched slot to the next in line.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock._machine.machine import LOOK_AGAIN, SLOWLY, Phase, Verdict, Waiter
from penstock._machine.policy import retry_delay
from penstock._machine.slot import Reason, Slot, SlotState
from penstock._pool.procedures import (
    LEAST_PING_SECONDS,
    LONGEST_SLEEP,
    PING_SECONDS,
    PING_SHARE,
    STILL_HELD,
    TIDY_SECONDS,
    GivenBack,
    explain_by,
    kept_on_stack,
    left_in,
)
from penstock._pool.statement_limit import within
from penstock._pool.sync.executor import RETURN_LOCK_SECONDS, Upkeep
from penstock._process import (
    fork,
    keeper,
    runtime,
    stacks,
    watch,
)
from penstock._process.clock import clock
from penstock._process.fork import notice_fork
from penstock._process.stacks import called_at
from penstock._process.watchdog import Alarm
from penstock.drivers import Activity, Outdated
from penstock.errors import ConfigError, PenstockError, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from penstock._pool.two_ends import Entering


_log = logging.getLogger("penstock")


class Borrowing(Upkeep):
    """What a borrower meets when no fit connection is idle, or when he gives back an unclean one."""

    _driver: Any
    _entering: Entering
    _dedicated: dict[int, Any]
    _plain: bool  # no option asks for more than a rollback at the return

    # -- a borrow that finds nothing idle ---------------------------------------------------------

    def _borrow_slowly(self, timeout: float | None = None) -> Slot:
        """A slot that may be used as it is, in use by the calling thread; or an error."""
        notice_fork()
        seconds = self._seconds(timeout)
        if runtime.is_running_callbacks():
            raise self._reporter.misuse(
                "a connection is asked for in gevent's hub, which cannot wait for one",
                "borrow in a greenlet: gevent.spawn(...) in the callback or signal handler",
            )
        # What an interrupt left behind is the keeper's to bring home, and nobody else opens.
        kept = keeper.current()
        if sys.is_finalizing() or not kept.ensure_running():  # what "runs" then, never runs again
            raise self._reporter.ending()
        self._machine.orphans = kept.inbox.put  # another keeper's, since gevent has patched
        if self._machine.phase is Phase.NEW and self._config.open:
            self._open(seconds)
        gate = runtime.gate()
        began = clock()
        waiter = Waiter(threading.get_ident(), partial(gate.put, None))
        try:
            waiter.keeps = self._kept(seconds)
            self._queue_up(waiter, began + seconds)
            return self._wait(waiter, gate, seconds, began)
        except BaseException:
            self._leave_queue(waiter)
            raise

    def _queue_up(self, waiter: Waiter, deadline: float) -> None:
        lock = self._take_lock(deadline - clock())
        try:
            orders = self._machine.queue_up(waiter, clock())
        finally:
            lock.release()
        self._carry_out(orders)

    def _kept(self, seconds: float) -> Collection[int]:
        """Serials of the connections that stay lent while the calling thread waits so long."""
        held = self._machine.held_by(threading.get_ident())
        if held and _blocked_loop(seconds):
            return held  # nothing else runs in this thread that could give them back
        return kept_on_stack(held, sys._getframe()) if held else ()

    def _wait(self, waiter: Waiter, gate: runtime.Gate, seconds: float, began: float) -> Slot:
        while True:
            slot = self._receive(waiter, gate, seconds, began)
            try:
                if self._accept(slot, waiter, began + seconds - clock()):
                    return slot
            finally:
                # It goes back to be closed, or to the caller; no frame of ours keeps it alive.
                del slot

    def _receive(self, waiter: Waiter, gate: runtime.Gate, seconds: float, began: float) -> Slot:
        """What was given to the waiter, as soon as something is; raises when nothing is."""
        while waiter.slot is None and waiter.refusal is None:
            left = began + seconds - clock()
            if left <= 0:
                break
            _sleep_at(gate, left)
        slot = waiter.slot
        waiter.slot = None
        if slot is None and waiter.refusal is None:
            slot = self._time_out(waiter)
        try:
            if slot is not None:
                return slot
        finally:
            del slot
        raise self._reporter.error(
            waiter.refusal,
            seconds,
            clock() - began,
            silent_since=waiter.silent_since,
            where=self._opener.where,
            owner=waiter.owner,
            top=sys._getframe(),
            loop=_blocked_loop(seconds),
        )

    def _time_out(self, waiter: Waiter) -> Slot | None:
        """The time is up: leave the queue, unless something came at the last moment."""
        lock = self._take_lock(0.0)
        try:
            slot = waiter.slot
            waiter.slot = None
            orders = self._machine.give_up(waiter, clock(), timed_out=slot is None)
        finally:
            lock.release()
        self._carry_out(orders)
        return slot

    def _leave_queue(self, waiter: Waiter) -> None:
        """An exception passes: leave the queue. What was given and not touched goes to the next.

        Where the lock is not free the keeper does it: an error that is kept keeps the waiter, too.
        """
        if waiter.ticket == 0:
            return
        try:
            lock = self._take_lock(0.0)
        except PoolTimeout:
            keeper.current().tell(partial(self._take_out, waiter))
            return
        try:
            orders = self._machine.give_up(waiter, clock(), timed_out=False)
        finally:
            lock.release()
        self._carry_out(orders)

    def _take_out(self, waiter: Waiter) -> None:
        """In the keeper: a waiter that is gone leaves the queue."""
        with self._lock:
            orders = self._machine.give_up(waiter, clock(), timed_out=False)
        self._carry_out(orders)

    def _accept(self, slot: Slot, waiter: Waiter, left: float) -> bool:
        """Whether the slot that was given may be used; if not, the waiter is in the queue again.

        Between being given and being received it may have fallen into doubt: its session ended, the
        pool was drained.
        """
        try:
            return self._accept_once(slot, waiter, left) or self._accept_again(slot, waiter, left)
        finally:
            del slot

    def _accept_again(self, slot: Slot, waiter: Waiter, left: float) -> bool:
        while slot.state is SlotState.PINGING:  # it fell into doubt during its ping
            if self._accept_once(slot, waiter, left):
                return True
        return False

    def _accept_once(self, slot: Slot, waiter: Waiter, left: float) -> bool:
        try:
            if slot.state is SlotState.PINGING:
                outdated, slot.outdated = (
                    slot.outdated,
                    False,
                )  # first: it may be met again meanwhile
                alive = self._make_sure(
                    slot.link, left, reset_pending=slot.reset_pending, outdated=outdated
                )
                slot.reset_pending = False
                self._pinged(slot, waiter, left, alive=alive)
                if not alive:
                    return False
            if slot.epoch != self._machine.epoch:
                self._reconsider(slot, waiter, left)
            return slot.state is SlotState.IN_USE
        finally:
            del slot

    def _reconsider(self, slot: Slot, waiter: Waiter, left: float) -> None:
        lock = self._take_lock(left)
        try:
            orders = self._machine.reconsider(slot, waiter, clock())
        finally:
            lock.release()
        self._carry_out(orders)

    def _make_sure(
        self, link: Any, left: float, *, reset_pending: bool, outdated: bool = False
    ) -> bool:
        """Ping a link that is in doubt, or read the answer to its reset; the borrower's own time."""
        seconds = max(LEAST_PING_SECONDS, min(PING_SECONDS, left * PING_SHARE))
        if reset_pending and not link.finish_reset(seconds):
            return False
        if outdated:
            return bool(link.forget(seconds))
        return reset_pending or bool(link.ping(seconds))

    def _pinged(self, slot: Slot, waiter: Waiter, left: float, *, alive: bool) -> None:
        lock = self._take_lock(left)
        try:
            if alive:
                orders = self._machine.pinged(slot, clock())
            else:
                orders = self._machine.ping_failed(slot, waiter, clock())
        finally:
            lock.release()
        self._carry_out(orders)

    # -- a borrow with options --------------------------------------------------------------------

    def _borrow_carefully(
        self,
        timeout: float | None,
        autocommit: bool | None,
        settings: Mapping[str, Any] | None,
    ) -> Slot:
        if settings and (self._config.autocommit if autocommit is None else autocommit):
            raise self._reporter.misuse(
                "settings= was asked for with autocommit: they would end with their own statement",
                "leave autocommit off for this borrow: settings last for its transaction",
            )
        seconds = self._seconds(timeout)
        slot = self._borrow_checked(seconds, clock() + seconds)
        try:
            self._equip(slot.link, autocommit, settings, clock() + seconds)
            return slot
        except Exception as error:
            self._give_back(slot, error)
            raise
        finally:
            del slot  # it goes back, or to the caller, or home: no frame of ours keeps it alive

    def _borrow_checked(self, seconds: float, deadline: float) -> Slot:
        """A slot for which `check` does not raise; a refused one is closed, and another one taken."""
        began = clock()
        left, fresh = seconds, 0
        refusal: Exception | None = None
        while True:
            slot = self._take_or_wait(left, seconds, refusal)
            try:
                refusal = self._check(slot.link, deadline)
                if refusal is None:
                    return slot
                self._refuse(slot)
                # That an old connection is refused says nothing; a new one is like a failed connect.
                fresh += slot.opened_at >= began
            finally:
                del slot  # as above
            left = max(0.0, deadline - clock())
            if fresh:
                _pause(fresh, clock() - began, left)

    def _take_or_wait(self, left: float, seconds: float, refusal: Exception | None) -> Slot:
        slot = self._machine.take(clock(), threading.get_ident()) if fork.page[0] else None
        if slot is None:
            try:
                slot = self._borrow_slowly(left)
            except PenstockError as error:
                explain_by(error, refusal, seconds)
                raise
        try:
            return slot
        finally:
            del slot

    def _check(self, link: Any, deadline: float) -> Exception | None:
        """Lend it, or tell why not: somebody has the object, it hung up, the user's `check` raised."""
        if self._config.guard and not link.renew():
            return self._too_late(STILL_HELD)
        link.lend()
        if not watch.available() and link.hung_up():
            return self._too_late("the server ended the session")
        check = self._config.check
        if check is None:
            return None
        refusal = self._call(check, link, deadline - clock(), "check=")
        if refusal is None and link.activity() is not Activity.IDLE:
            return self._end_check(link, max(LEAST_PING_SECONDS, deadline - clock()))
        return refusal

    def _end_check(self, link: Any, seconds: float) -> Exception | None:
        """Roll back what `check` began: a borrower in its transaction could not set autocommit."""
        clean = link.park() or link.tidy(seconds)
        link.lend()
        return None if clean else self._too_late("what check= began could not be rolled back")

    def _refuse(self, slot: Slot) -> None:
        """What did not pass is closed."""
        slot.link.park()
        broken = slot.link.activity() is Activity.BROKEN
        self._return(slot, Verdict.BROKEN if broken else Verdict.UNCLEAN)

    def _equip(
        self,
        link: Any,
        autocommit: bool | None,
        settings: Mapping[str, Any] | None,
        deadline: float,
    ) -> None:
        if autocommit is not None:
            link.set_autocommit(autocommit)
        on_borrow = self._config.on_borrow
        if on_borrow is None and not settings:
            return
        with Alarm(link, max(LEAST_PING_SECONDS, deadline - clock())) as alarm:
            if on_borrow is not None:
                on_borrow(link.conn)
            if settings:
                link.apply_settings(settings)
        if alarm.rang:
            raise self._too_late("on_borrow= took longer than the borrower's timeout")

    def _call(
        self, call: Callable[[Any], object], link: Any, seconds: float, what: str
    ) -> Exception | None:
        """Run the user's code on a connection, within a time; give what it raised."""
        try:
            with Alarm(link, max(LEAST_PING_SECONDS, seconds)) as alarm:
                call(link.conn)
        except Exception as error:  # noqa: BLE001  raising is how it says no
            return error.with_traceback(None)
        return self._too_late(f"{what} took longer than its time") if alarm.rang else None

    def _too_late(self, text: str) -> Exception:
        error: Exception = self._driver.operational_error(text)
        return error

    # -- giving back what is not simply clean -----------------------------------------------------

    def _give_back(self, slot: Slot, error: BaseException | None) -> None:
        """End the transaction and bring the slot back to the machine, whatever state it is in.

        `error` is what leaves the block; None commits. Raises what the commit raises, after the
        slot has gone back.
        """
        notice_fork()
        if not self._machine.has(slot):
            return  # lent before a fork: what it began is the parent's to end
        failure: Exception | None = None
        try:
            if error is None:
                failure = self._commit(slot.link)
                if failure is None and self._plain and self._put(slot):
                    slot = None  # type: ignore[assignment]  # somebody else's by now
                    return
            # By a Timeout of gevent's, an interrupt: nobody forgot anything.
            cut_short = error is not None and not isinstance(error, Exception)
            self._see_what_is_outdated(slot, error or failure)
            verdict = self._verdict(slot.link, cut_short=cut_short)
            suspect = self._is_suspect(error or failure)
            if verdict is Verdict.CLEAN and self._config.reset == "session":
                self._reset(slot, suspect=suspect)
            else:
                self._return(slot, verdict, suspect=suspect)
        except BaseException:
            slot = None  # type: ignore[assignment]  # drop it: it comes home by itself
            raise
        slot = None  # type: ignore[assignment]  # what is raised below holds this frame
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it holds this frame, and this frame held it

    def _put(self, slot: Slot) -> bool:
        """The usual end: it is committed and clean, and goes back without a word more, or not at all."""
        try:
            if not slot.link.park():
                return False
            answer = self._machine.put(slot)
        finally:
            del slot  # perhaps somebody else's by now
        if answer == LOOK_AGAIN:
            self._look_again()
        return answer != SLOWLY

    def _see_what_is_outdated(self, slot: Slot, error: BaseException | None) -> None:
        """If a migration has made what is remembered for this session outdated, it has for others, too."""
        ask = getattr(slot.link, "outdated", None)
        found = None if ask is None else ask(error)
        try:
            if found is Outdated.SESSION:
                slot.condemn(Reason.DRAINED)
            elif found is not None:
                ends = found is Outdated.TYPES
                self._move(partial(self._machine.outdated, slot, ends=ends))
        finally:
            del slot

    def _give_back_unfinished(self, slot: Slot) -> None:
        """putconn() of a connection that is not simply clean: roll back, and say so."""
        activity = slot.link.activity()
        if activity in {Activity.IN_TRANSACTION, Activity.IN_FAILED_TRANSACTION}:
            _log.warning(
                "pool %r: a connection was given back %s: rolled back. Commit, or use "
                "`with pool.connection()`.%s",
                self.name,
                activity.value,
                called_at(),
            )
        try:
            self._give_back(slot, GivenBack())
        finally:
            del slot

    def _commit(self, link: Any) -> Exception | None:
        activity = link.activity()
        if activity is Activity.IDLE or activity is Activity.ACTIVE:  # a set would hash them
            return None
        link.lend()  # the lease has parked it
        try:
            link.commit()
        except Exception as error:  # noqa: BLE001  raised by the caller once the slot is back
            return error.with_traceback(None)
        return None

    def _verdict(self, link: Any, *, cut_short: bool) -> Verdict:
        # A lock of the driver's that nobody may ever release: park() is on the hot path and does not look.
        clean = link.park() and not getattr(link, "held", False)
        activity = link.activity()
        if activity is Activity.BROKEN:
            return Verdict.BROKEN
        reset = self._config.reset
        if not clean:
            clean = reset is not None and link.tidy(within(TIDY_SECONDS, self._config))
            activity = link.activity()
        if not clean and not cut_short and reset is not None and activity is not Activity.BROKEN:
            _log.warning(
                "pool %r: a connection was given back %s: closed%s",
                self.name,
                left_in(activity),
                called_at(),
            )
        if clean and callable(reset):
            clean = self._call_reset(reset, link)
        return Verdict.CLEAN if clean else Verdict.UNCLEAN

    def _reset(self, slot: Slot, *, suspect: bool) -> None:
        """Send the session reset, and bring the slot back before it is answered.

        Where the driver can only wait for the answer, a worker does, and the slot is nobody's
        meanwhile: whoever gave it back waits for nothing.
        """
        if not getattr(slot.link, "reset_waits", False):
            slot.reset_pending = bool(slot.link.start_reset())
            verdict = Verdict.CLEAN if slot.reset_pending else Verdict.UNCLEAN
            self._return(slot, verdict, suspect=suspect)
            return
        slot.holder = 0
        keeper.current().submit(partial(self._reset_aside, [slot], suspect=suspect))

    def _reset_aside(self, place: list[Slot], *, suspect: bool) -> None:
        """In a worker: reset the slot in this place, and bring it back."""
        slot = place.pop()
        if not self._machine.has(slot):
            return  # the parent's, and this a forked child
        try:
            clean = slot.link.start_reset()
            self._return(slot, Verdict.CLEAN if clean else Verdict.UNCLEAN, suspect=suspect)
        finally:
            del slot

    def _call_reset(self, reset: Callable[[Any], object], link: Any) -> bool:
        link.lend()
        refusal = self._call(reset, link, TIDY_SECONDS, "reset=")
        if refusal is not None:
            _log.error(
                "pool %r: reset= raised; the connection is closed", self.name, exc_info=refusal
            )
        return bool(link.park()) and refusal is None

    def _is_suspect(self, error: BaseException | None) -> bool:
        """Whether `error` says that other sessions are not to be trusted either."""
        return error is not None and bool(
            self._driver.ends_session(error, read_write=self._config.read_write)
        )

    def _return(self, slot: Slot, verdict: Verdict, *, suspect: bool = False) -> None:
        if suspect and verdict is Verdict.CLEAN:
            verdict = Verdict.BROKEN  # a session that is read-only after a failover still answers
        try:
            lock = self._take_lock(RETURN_LOCK_SECONDS)
        except PoolTimeout as error:
            # A block that has committed gets no error: the slot falls, and comes home by itself. The
            # text alone is logged: a kept error would keep this frame, and this frame the slot.
            _log.warning("pool %r: a connection is closed at its return: %s", self.name, str(error))
            return
        try:
            orders = self._machine.returned(slot, clock(), verdict, suspect=suspect)
        finally:
            lock.release()
        self._carry_out(orders)

    # -- waiting for the pool as a whole ----------------------------------------------------------

    def _open(self, seconds: float) -> None:
        if self._machine.phase is Phase.OPEN:
            return
        self._reporter.opened_at = clock()
        self._reporter.closed_at = None
        self._move(self._machine.open, seconds=seconds)

    def _wait_until_empty(self, seconds: float) -> None:
        mine = threading.get_ident()

        def empty() -> bool:
            return all(
                slot.state is SlotState.OPENING
                or (slot.state is SlotState.IN_USE and slot.holder == mine and not slot.loose)
                for slot in self._machine.slots()
            )

        if not self._wait_until(empty, clock() + seconds):
            lent = self._reporter.counts().in_use
            _log.warning(
                "pool %r: closed with %d connections still lent; each is closed when it is given "
                "back: %s",
                self.name,
                lent,
                "; ".join(map(str, self._reporter.holders())),
            )

    def _wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Look at `condition` after each connection that was opened, closed or given up."""
        gate = runtime.gate()
        tell = partial(gate.put, None)
        self._onlookers.append(tell)
        try:
            return _wait_for(condition, gate, deadline)
        finally:
            self._onlookers.remove(tell)

    def _alive(self) -> int:
        counts = self._reporter.counts()
        return counts.idle + counts.in_use + counts.pinging

    # -- small things -----------------------------------------------------------------------------

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self._timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise ConfigError(
                "timeout", repr(timeout), "a number of seconds or None", pool=self.name
            )
        return max(0.0, timeout)


def _blocked_loop(seconds: float) -> str:
    """Whose event loop stands still while the calling thread waits so long; "": none.

    Where waits are gevent's, other greenlets of the thread go on.
    """
    return (
        ""
        if seconds <= 0 or runtime.has_green_waits() or runtime.is_green()
        else stacks.event_loop()
    )


def _sleep_at(gate: runtime.Gate, seconds: float) -> None:
    # At most LONGEST_SLEEP, since a lock takes no more; whoever sleeps looks again.
    runtime.rest(gate, min(seconds, LONGEST_SLEEP))


def _pause(refused: int, seconds: float, left: float) -> None:
    """Between new connections that the user's check refuses, as between failed connects."""
    delay = retry_delay(refused, seconds, waited_for=True, sqlstate=None, random=random.random())
    time.sleep(min(delay, left))


def _wait_for(condition: Callable[[], bool], gate: runtime.Gate, deadline: float) -> bool:
    while not condition():
        left = deadline - clock()
        if left <= 0:
            return False
        _sleep_at(gate, left)
    return True
