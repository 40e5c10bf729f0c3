"""The slow half of a borrow on asyncio: waiting for a slot, making sure of it, giving it back unclean.

One job: everything between a borrower and the machine that is not the hot path (`_pool/aio/lease.py`).
`_pool/sync/borrowing.py`'s sister, with awaits.

It must not know: how connections are opened and closed (`_pool/aio/executor.py`), when to grow and whom to
serve (the machine).

No lock: state moves are plain calls. A cancellation arrives at an await, and only there:

* of a borrower who waits: he leaves the queue, and an untouched slot goes to the next in line;
* of one who makes sure of a slot (a ping, a reset's answer, the user's `check`): its answer is still
  to come, so the connection ends and is replaced;
* while something is given back: a task of the pool's own finishes that, and the borrower leaves at
  once. So does one who is cancelled inside his block: he does not wait for a rollback.

Whoever has awaited, with a slot in a local variable, clears it at his end: an error that was caught
below, in the user's code or a driver's, and is kept keeps all frames that were awaiting it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock._machine.machine import LOOK_AGAIN, SLOWLY, Phase, Verdict, Waiter
from penstock._machine.policy import retry_delay
from penstock._machine.slot import Reason, Slot, SlotState
from penstock._pool.aio.executor import AsyncUpkeep
from penstock._pool.aio.opener import called
from penstock._pool.procedures import (
    FOREVER,
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
from penstock._process import fork, watch
from penstock._process.clock import clock
from penstock._process.fork import notice_fork
from penstock._process.stacks import called_at
from penstock.drivers import Activity, Outdated
from penstock.errors import ConfigError, PenstockError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from penstock._pool.two_ends import Entering

_log = logging.getLogger("penstock")


class Gate:
    """Where one task waits until it is let through; opening it twice is as good as once."""

    __slots__ = ("_future", "_loop", "_open")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open = False
        self._future: asyncio.Future[None] | None = None

    def open(self) -> None:
        """Let the task through, now or when it comes."""
        self._open = True
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Wait until it opens, or so long."""
        if not self._open:
            await self._sleep(seconds)
        self._open = False

    async def _sleep(self, seconds: float) -> None:
        self._future = self._loop.create_future()
        timer = self._loop.call_later(min(seconds, LONGEST_SLEEP), self.open)
        try:
            await self._future
        finally:
            timer.cancel()
            self._future = None


class AsyncBorrowing(AsyncUpkeep):
    """What a borrower meets when no fit connection is idle, or when he gives back an unclean one."""

    _driver: Any
    _entering: Entering
    _plain: bool  # no option asks for more than a rollback at the return
    _timeout: float

    # -- a borrow that finds nothing idle ---------------------------------------------------------

    async def _borrow_slowly(self, timeout: float | None = None) -> Slot:
        """A slot that may be used as it is, in use by the running task; or an error."""
        notice_fork()
        seconds = self._seconds(timeout)
        loop = self._loop_to_borrow_on()
        task = asyncio.current_task(loop)
        gate = Gate(loop)
        waiter = Waiter(0 if task is None else id(task), gate.open)
        try:
            waiter.keeps = self._kept(waiter.owner)
            self._queue_up(waiter)
            return await self._wait(waiter, gate, seconds)
        except BaseException:
            self._leave_queue(waiter)
            raise

    def _loop_to_borrow_on(self) -> asyncio.AbstractEventLoop:
        """The running loop, if it is the pool's; the first borrow of all opens the pool on it."""
        if self._loop is not None:
            self._join_loop()  # or says why not: a loop that has ended has closed the pool, too
        phase = self._machine.phase
        if phase is Phase.CLOSED or (phase is Phase.NEW and not self._config.open):
            raise self._reporter.closed()
        loop = self._join_loop()
        self._open()
        return loop

    def _queue_up(self, waiter: Waiter) -> None:
        self._bring_orphans_home()
        self._carry_out(self._machine.queue_up(waiter, clock()))

    def _kept(self, me: int) -> Collection[int]:
        """Serials of the connections that stay lent while the running task waits."""
        held = self._machine.held_by(me) if me else {}
        return kept_on_stack(held, sys._getframe()) if held else ()

    async def _wait(self, waiter: Waiter, gate: Gate, seconds: float) -> Slot:
        began = clock()
        while True:
            slot = await self._receive(waiter, gate, seconds, began)
            try:
                if await self._accept(slot, waiter, began + seconds - clock()):
                    return slot
            finally:
                del slot

    async def _receive(self, waiter: Waiter, gate: Gate, seconds: float, began: float) -> Slot:
        """What was given to the waiter, as soon as something is; raises when nothing is."""
        while waiter.slot is None and waiter.refusal is None:
            left = began + seconds - clock()
            if left <= 0:
                break
            await gate.wait(left)
        slot, waiter.slot = waiter.slot, None
        try:
            if slot is not None:
                return slot
        finally:
            del slot
        if waiter.refusal is None:
            self._carry_out(self._machine.give_up(waiter, clock(), timed_out=True))
        raise self._reporter.error(
            waiter.refusal,
            seconds,
            clock() - began,
            silent_since=waiter.silent_since,
            where=self._opener.where,
            owner=waiter.owner,
            top=sys._getframe(),
        )

    def _leave_queue(self, waiter: Waiter) -> None:
        """An exception passes: leave the queue. What was given and not touched goes to the next."""
        if waiter.ticket and not self._is_elsewhere():
            self._carry_out(self._machine.give_up(waiter, clock(), timed_out=False))

    async def _accept(self, slot: Slot, waiter: Waiter, left: float) -> bool:
        """Whether the slot that was given may be used; if not, the waiter is in the queue again.

        Between being given and being received it may have fallen into doubt: its session ended, the
        pool was drained.
        """
        try:
            while True:
                asked = slot.state is SlotState.PINGING
                if asked and not await self._make_sure(slot, waiter, left):
                    return False
                if slot.epoch != self._machine.epoch:
                    self._carry_out(self._machine.reconsider(slot, waiter, clock()))
                if slot.state is not SlotState.PINGING:  # else it fell into doubt during its ping
                    return slot.state is SlotState.IN_USE
        finally:
            del slot

    async def _make_sure(self, slot: Slot, waiter: Waiter, left: float) -> bool:
        """Tell the machine whether a slot that is in doubt still answers."""
        try:
            alive = await self._answers(slot, left)
            if alive:
                self._carry_out(self._machine.pinged(slot, clock()))
            else:
                self._carry_out(self._machine.ping_failed(slot, waiter, clock()))
            return alive
        finally:
            del slot

    async def _answers(self, slot: Slot, left: float) -> bool:
        """Ping a slot, or read the answer to its reset; the borrower's own time."""
        seconds = max(LEAST_PING_SECONDS, min(PING_SECONDS, left * PING_SHARE))
        try:
            reset_pending, slot.reset_pending = slot.reset_pending, False
            outdated, slot.outdated = slot.outdated, False  # first: it may be met again meanwhile
            if reset_pending and not await slot.link.finish_reset(seconds):
                return False
            if outdated:
                return bool(await slot.link.forget(seconds))
            return reset_pending or bool(await slot.link.ping(seconds))
        except BaseException:
            self._return(slot, Verdict.UNCLEAN)
            raise
        finally:
            del slot

    # -- a borrow with options --------------------------------------------------------------------

    async def _borrow_carefully(
        self,
        timeout: float | None,
        autocommit: bool | None,
        settings: Mapping[str, Any] | None,
        *,
        transaction: bool,
    ) -> Slot:
        in_autocommit = self._config.autocommit if autocommit is None else autocommit
        if in_autocommit and (settings or transaction):
            what = "settings=" if settings else "transaction=True"
            raise self._reporter.misuse(
                f"{what} was asked for with autocommit: there is no transaction to hold it",
                "leave autocommit off for this borrow",
            )
        seconds = self._seconds(timeout)
        deadline = clock() + seconds
        slot = await self._borrow_checked(seconds, deadline)
        try:
            await self._equip(slot.link, autocommit, settings, deadline, transaction=transaction)
        except BaseException as error:
            place = [slot]
            del slot
            await self._give_back(place, error)
            raise
        try:
            return slot
        finally:
            del slot

    async def _borrow_checked(self, seconds: float, deadline: float) -> Slot:
        """A slot for which `check` does not raise; a refused one is closed, and another one taken."""
        began = clock()
        left, fresh = seconds, 0
        refusal: Exception | None = None
        while True:
            slot = await self._take_or_wait(left, seconds, refusal)
            try:
                refusal = await self._check(slot, deadline)
                if refusal is None:
                    return slot
                # That an old connection is refused says nothing; a new one is like a failed connect.
                fresh += slot.opened_at >= began
            finally:
                del slot
            left = max(0.0, deadline - clock())
            if fresh:
                await asyncio.sleep(min(left, _pause(fresh, clock() - began)))

    async def _take_or_wait(self, left: float, seconds: float, refusal: Exception | None) -> Slot:
        slot = None
        if fork.page[0] and asyncio.get_running_loop() is self._loop:
            task = asyncio.current_task(self._loop)
            slot = self._machine.take(clock(), 0 if task is None else id(task))
        if slot is None:
            try:
                slot = await self._borrow_slowly(left)
            except PenstockError as error:
                explain_by(error, refusal, seconds)
                raise
        try:
            return slot
        finally:
            del slot

    async def _check(self, slot: Slot, deadline: float) -> Exception | None:
        """Lend it, or close it and tell why: somebody has the object, it hung up, `check` raised."""
        link = slot.link
        if self._config.guard and not link.renew():
            self._return(slot, Verdict.UNCLEAN)
            return self._too_late(STILL_HELD)
        link.lend()
        if not watch.available() and link.hung_up():
            link.park()
            self._return(slot, Verdict.BROKEN)
            return self._too_late("the server ended the session")
        check = self._config.check
        if check is None:
            return None
        try:
            refusal = await self._call(check, link, deadline - clock(), "check=")
            if refusal is None and link.activity() is not Activity.IDLE:
                refusal = await self._end_check(link, max(LEAST_PING_SECONDS, deadline - clock()))
        except BaseException:
            link.park()
            self._return(slot, Verdict.UNCLEAN)
            del slot
            raise
        if refusal is not None:
            link.park()
            self._return(slot, Verdict.UNCLEAN)
        del slot
        return refusal

    async def _end_check(self, link: Any, seconds: float) -> Exception | None:
        """Roll back what `check` began: a borrower in its transaction could not set autocommit."""
        clean = link.park() or await link.tidy(seconds)
        link.lend()
        return None if clean else self._too_late("what check= began could not be rolled back")

    async def _equip(
        self,
        link: Any,
        autocommit: bool | None,
        settings: Mapping[str, Any] | None,
        deadline: float,
        *,
        transaction: bool,
    ) -> None:
        if autocommit is not None:
            link.set_autocommit(autocommit)
        on_borrow = self._config.on_borrow
        if on_borrow is None and not settings and not transaction:
            return
        limit = asyncio.timeout(max(LEAST_PING_SECONDS, deadline - clock()))
        try:
            async with limit:
                if on_borrow is not None:
                    await called(on_borrow, link.conn)
                if transaction:
                    await link.begin()
                if settings:
                    await link.apply_settings(settings)
        except TimeoutError:
            if not limit.expired():
                raise
            text = "on_borrow=, settings= or transaction= took longer than the borrower's timeout"
            raise self._too_late(text) from None

    async def _call(
        self, call: Callable[[Any], object], link: Any, seconds: float, what: str
    ) -> Exception | None:
        """Run the user's code on a connection, within a time; give what it raised."""
        limit = None
        try:
            async with asyncio.timeout(max(LEAST_PING_SECONDS, seconds)) as limit:
                await called(call, link.conn)
        except Exception as error:  # noqa: BLE001  raising is how it says no
            if limit is not None and limit.expired():
                return self._too_late(f"{what} took longer than its time")
            return error.with_traceback(None)
        return None

    def _too_late(self, text: str) -> Exception:
        error: Exception = self._driver.operational_error(text)
        return error

    # -- giving back what is not simply clean -----------------------------------------------------

    async def _give_back(self, place: list[Slot], error: BaseException | None) -> None:
        """End the transaction and bring the slot in this place back, whatever state it is in.

        `error` is what leaves the block; None commits. Raises what the commit raises, after the
        slot has gone back. Cancelled, or leaving by a cancellation, it goes on in the background.
        """
        notice_fork()
        if not self._machine.has(place[0]):
            return  # lent before a fork: what it began is the parent's to end
        if self._is_elsewhere():
            place.clear()
            return
        failure: Exception | None = None
        if _is_a_signals(error):
            place[0].condemn(Reason.UNCLEAN)
        try:
            if error is None:
                failure = await self._commit(place[0].link)
                if failure is None and self._plain and self._put(place):
                    return
            self._see_what_is_outdated(place[0], error or failure)
            if not _may_wait(error) and not self._is_at_rest(place[0]):
                self._finish_later(place)
                return
            verdict = await self._verdict(place)
        except BaseException:
            self._finish_later(place)
            raise
        self._return(place.pop(), verdict, suspect=self._is_suspect(error or failure))
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it holds this frame, and this frame held it

    def _put(self, place: list[Slot]) -> bool:
        """The usual end: it is committed and clean, and goes back without a word more, or not at all."""
        if not place[0].link.park():
            return False
        slot = place.pop()  # after the put it is perhaps somebody else's
        try:
            answer = self._machine.put(slot)
            if answer == SLOWLY:
                place.append(slot)
        finally:
            del slot
        if answer == LOOK_AGAIN:
            self._look_again()
        return answer != SLOWLY

    def _is_at_rest(self, slot: Slot) -> bool:
        """Whether nothing need be waited for before others may have it."""
        return bool(slot.link.park()) and not callable(self._config.reset)

    def _finish_later(self, place: list[Slot]) -> None:
        """Nobody waits for this any more: bring the slot back in a task of the pool's own."""
        if not place:
            return
        # Nobody's: a task that is made now may get the number of the one that has gone.
        place[0].holder = 0
        undone = partial(self._finish_at_once, place)
        if not self._spawn(self._finish(place), undone):
            undone()

    def _finish_at_once(self, place: list[Slot]) -> None:
        """No task, or one that was cancelled before it had begun."""
        if place:
            self._return(place.pop(), Verdict.UNCLEAN)

    async def _finish(self, place: list[Slot]) -> None:
        await asyncio.sleep(0)  # a loop may run a new task at once, in the middle of our caller
        verdict = Verdict.UNCLEAN
        try:
            self._see_what_is_outdated(place[0], None)
            if place[0].condemned is None:
                verdict = await self._verdict(place, cut_short=True)
        finally:
            self._return(place.pop(), verdict)

    async def _give_back_unfinished(self, place: list[Slot]) -> None:
        """putconn() of a connection that is not simply clean: roll back, and say so."""
        activity = place[0].link.activity()
        if activity in {Activity.IN_TRANSACTION, Activity.IN_FAILED_TRANSACTION}:
            _log.warning(
                "pool %r: a connection was given back %s: rolled back. Commit, or use "
                "`async with pool.connection()`.%s",
                self.name,
                activity.value,
                called_at(),
            )
        elif activity is Activity.ACTIVE:
            _log.warning(
                "pool %r: a connection was given back while a statement was under way: it is "
                "cancelled, or the connection is closed%s",
                self.name,
                called_at(),
            )
        await self._give_back(place, GivenBack())

    async def _commit(self, link: Any) -> Exception | None:
        activity = link.activity()
        if activity is Activity.ACTIVE:
            _log.warning(
                "pool %r: a block ended while a statement of it was under way, or was cut off by a "
                "timeout that the block had caught: what it had not committed is rolled back%s",
                self.name,
                called_at(),
            )
        if activity is Activity.IDLE or activity is Activity.ACTIVE:  # a set would hash them
            return None
        link.park()  # a plain lease has parked it already, a careful one has not
        link.lend()
        try:
            await link.commit()
        except Exception as error:  # noqa: BLE001  raised by the caller once the slot is back
            return error.with_traceback(None)
        if link.activity() in {Activity.IN_TRANSACTION, Activity.IN_FAILED_TRANSACTION}:
            _log.warning(
                "pool %r: a transaction was left open that the pool had not begun: rolled back. "
                "Commit it, or use `pool.connection(transaction=True)`.%s",
                self.name,
                called_at(),
            )
        return None

    def _see_what_is_outdated(self, slot: Slot, error: BaseException | None) -> None:
        """If a migration has made what is remembered for this session outdated, it has for others, too."""
        ask = getattr(slot.link, "outdated", None)
        found = None if ask is None else ask(error)
        if found is Outdated.SESSION:
            slot.condemn(Reason.DRAINED)
        elif found is not None:
            self._carry_out(self._machine.outdated(slot, clock(), ends=found is Outdated.TYPES))

    async def _verdict(self, place: list[Slot], *, cut_short: bool = False) -> Verdict:
        link = place[0].link
        # A lock of the driver's that nobody may ever release: park() is on the hot path and does not look.
        clean = link.park() and not getattr(link, "held", False)
        if link.activity() is Activity.BROKEN:
            return Verdict.BROKEN
        reset = self._config.reset
        if not clean:
            clean = reset is not None and await link.tidy(within(TIDY_SECONDS, self._config))
        unfinished = not clean and reset is not None
        if clean and reset == "session":
            clean = place[0].reset_pending = link.start_reset()
        elif clean and callable(reset):
            try:
                clean = await self._call_reset(reset, link)
            except BaseException:
                place[0].condemn(Reason.UNCLEAN)  # the user's code is not called a second time
                raise
        activity = link.activity() if unfinished else Activity.IDLE
        if (
            unfinished
            and (not cut_short or activity is Activity.ACTIVE)
            and activity is not Activity.BROKEN
        ):
            _log.warning(
                "pool %r: a connection was given back %s: closed%s",
                self.name,
                left_in(activity),
                called_at(),
            )
        return Verdict.CLEAN if clean else Verdict.UNCLEAN

    async def _call_reset(self, reset: Callable[[Any], object], link: Any) -> bool:
        link.lend()
        try:
            refusal = await self._call(reset, link, TIDY_SECONDS, "reset=")
        finally:
            clean = link.park()
        if refusal is not None:
            _log.error(
                "pool %r: reset= raised; the connection is closed", self.name, exc_info=refusal
            )
        return bool(clean) and refusal is None

    def _is_suspect(self, error: BaseException | None) -> bool:
        """Whether `error` says that other sessions are not to be trusted either."""
        return error is not None and bool(
            self._driver.ends_session(error, read_write=self._config.read_write)
        )

    def _return(self, slot: Slot, verdict: Verdict, *, suspect: bool = False) -> None:
        if self._is_elsewhere():
            return
        if suspect and verdict is Verdict.CLEAN:
            verdict = Verdict.BROKEN  # a session that is read-only after a failover still answers
        self._carry_out(self._machine.returned(slot, clock(), verdict, suspect=suspect))

    def _cut_short(self) -> None:
        """In a guard: a move may have been cut in two by a signal; the tick repeats what is left.

        An Exception, and a cancellation, arrive where a move has come to its end.
        """
        if isinstance(sys.exception(), (KeyboardInterrupt, SystemExit)) and self._loop is not None:
            self._call_at(clock())

    # -- waiting for the pool as a whole ----------------------------------------------------------

    def _open(self) -> None:
        if self._machine.phase is Phase.OPEN:
            return
        self._reporter.opened_at = clock()
        self._reporter.closed_at = None
        self._move(self._machine.open)

    async def _wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Look at `condition` after each connection that was opened, closed or given up."""
        gate = Gate(asyncio.get_running_loop())
        self._onlookers.append(gate.open)
        try:
            while not condition():
                left = deadline - clock()
                if left <= 0:
                    return False
                await gate.wait(left)
        finally:
            self._onlookers.remove(gate.open)
        return True

    # -- small things -----------------------------------------------------------------------------

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self._timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise ConfigError(
                "timeout", repr(timeout), "a number of seconds or None", pool=self.name
            )
        return max(0.0, timeout)


def _may_wait(error: BaseException | None) -> bool:
    """Whether whoever leaves by this error may be kept waiting: not one who is cancelled.

    And a coroutine that is being closed (GeneratorExit) must not await at all.
    """
    return error is None or isinstance(error, Exception)


def _is_a_signals(error: BaseException | None) -> bool:
    """Whether this may have struck anywhere in a driver: its connection's lock may be held for ever.

    A cancellation comes where something is awaited, and a driver counts on that.
    """
    return not isinstance(error, (Exception, asyncio.CancelledError, GeneratorExit, type(None)))


def _pause(refused: int, seconds: float) -> float:
    """Between new connections that the user's check refuses, as between failed connects."""
    return retry_delay(refused, seconds, waited_for=True, sqlstate=None, random=random.random())


__all__ = ["FOREVER", "AsyncBorrowing", "Gate"]
