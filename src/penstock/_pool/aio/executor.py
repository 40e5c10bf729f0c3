"""The half of an asyncio pool that works in the background: it carries out orders.

One job: open and close connections as the machine orders, have the loop look after them, tick,
bring orphaned slots home, and say in the log what people should know. `_pool/sync/executor.py`'s sister: where
that one has the keeper's thread and its workers, this one has tasks and timers of the loop.

It must not know: who waits for what, how a connection is given back, what the user called.

No lock: state moves are plain calls on the loop's thread, so that a cancellation can only arrive
between them. What may arrive from elsewhere (the end of a slot, in the garbage collector) goes into
`_orphans`, whose `append` is one call of C, and the loop is woken.

Tasks. What has to be awaited runs in tasks of the pool's own, with an empty context. When the loop
ends they are cancelled like all others: a slot that such a task holds comes home by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import deque
from functools import partial
from threading import get_ident
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Final

from penstock._machine.orders import Close, Open, Order, Overdue, ReportOutage, TakeBack, TickAt
from penstock._machine.progress import BRIEF_SECONDS, CONNECT_SECONDS
from penstock._machine.slot import Reason, Slot, SlotRef
from penstock._pool.aio import loop as loops
from penstock._pool.aio.opener import called
from penstock._pool.opener import (
    DIAGNOSE_SECONDS,
    DRIVER_GRACE,
    Failure,
    SameAgain,
    explain_hanging,
    go_on,
)
from penstock._pool.procedures import LONGEST_SLEEP
from penstock._process import watch
from penstock._process.clock import clock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine
    from weakref import ref

    from penstock._machine.machine import Machine
    from penstock._machine.progress import Progress
    from penstock._pool.aio.opener import AsyncOpener
    from penstock._pool.reporter import Reporter
    from penstock.config.pool_config import PoolConfig
    from penstock.errors import PenstockError

#: Connections being opened at the same time, per pool; as the keeper's (`_process/keeper.py`) per process.
CONNECT_CONCURRENCY: Final = 20

#: While a connection is being opened, somebody looks so often, in seconds, whether its slot is still there.
LOOK_AGAIN_SECONDS: Final = 1.0

_log = logging.getLogger("penstock")


class AsyncUpkeep:
    """What goes on in the background of a pool."""

    name: str
    _config: PoolConfig
    _machine: Machine
    _opener: AsyncOpener
    _reporter: Reporter
    _getconns: dict[int, Slot]
    _dedicated: dict[int, Any]
    _home: ref[Any]  # to itself: what waits for time to pass must not keep the pool alive

    def _begin_upkeep(self) -> None:
        """Nothing under way yet: when the pool is made, and in a forked child."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0  # the loop's; read on the hot path
        self._tasks: set[asyncio.Task[None]] = set()
        self._connects: set[asyncio.Task[None]] = set()  # those of them that open a connection
        self._timer: asyncio.TimerHandle | None = None
        self._ticks_at = 0.0  # by our clock, while there is a timer
        self._end: AsyncGenerator[None, None] | None = None
        self._ending = False
        self._orphans: deque[SlotRef] = deque()
        self._onlookers: list[Callable[[], object]] = []
        self._connecting = asyncio.Semaphore(CONNECT_CONCURRENCY)
        self._turns: set[Progress | None] = set()  # of those that it has let in

    # -- its loop ---------------------------------------------------------------------------------

    def _join_loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, which the pool belongs to from the first call on.

        Raises:
            MisuseError: it belongs to another one, or to one that has ended.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._thread = get_ident()
            self._connecting = asyncio.Semaphore(CONNECT_CONCURRENCY)
            self._turns = set()
            self._end = loops.at_end(partial(_loop_ends, self._home))
        elif self._loop is not loop:
            raise self._of_another_loop(self._loop)
        return loop

    def _of_another_loop(self, loop: asyncio.AbstractEventLoop) -> PenstockError:
        if self._ending or loop.is_closed():
            return self._reporter.misuse(
                "the event loop that this pool belongs to has ended, and the pool was not closed",
                "`await pool.close()` before its loop ends, or use `async with pool:`; then it can "
                "be opened again on another loop",
            )
        return self._reporter.misuse(
            "this pool belongs to another event loop than the one that runs here",
            "make one pool per event loop, or close it there before it is used here",
        )

    def _refuse_other_loops(self) -> None:
        """Raise MisuseError on a loop that is not the pool's, while the pool's is there."""
        if self._loop is not None and not self._is_forsaken():
            self._join_loop()

    def _is_forsaken(self) -> bool:
        """Whether its loop has ended, or is about to."""
        return self._ending or (self._loop is not None and self._loop.is_closed())

    async def _leave_loop(self) -> None:
        """The pool belongs to no loop any more; another may have it."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        end, self._end = self._end, None
        self._loop, self._thread, self._ending = None, 0, False
        if end is not None:
            await end.aclose()

    def _is_elsewhere(self) -> bool:
        """Whether the pool's loop runs, but not this: the garbage collector, in another thread.

        It destroys a coroutine that nobody awaits any more wherever it happens to run. A slot that is
        in such hands is to be dropped: its end is told to the loop. No move may be made here.
        """
        loop = self._loop
        return loop is not None and loop.is_running() and not _runs_here(loop)

    def _loop_is_ending(self) -> set[asyncio.Task[None]]:
        """The loop is being shut down and the pool was not closed: end what is idle, now.

        What is lent ends when it is given back, or dropped. Gives the pool's tasks, cancelled: a lease
        that dies while the loop cancels all tasks may have had a new connection opened.
        """
        if self._end is None:
            return set()
        self._ending = True
        self._move(self._machine.close)
        # Nobody can be using them any more, and uvloop's close() waits for sockets that are open where
        # warnings are errors.
        for link in list(self._dedicated.values()):
            _discard(link)
        for task in self._tasks:
            task.cancel()
        return set(self._tasks)

    # -- moves of the pool as a whole -------------------------------------------------------------

    def _move(self, decide: Callable[[float], list[Order]]) -> None:
        self._carry_out(decide(clock()))

    def _doubt(self) -> None:
        """A statement was given up: idle connections are pinged before they are lent."""
        self._move(self._machine.doubt)

    def _ask(self) -> None:
        """Somebody, in whichever thread, decides by the pool's state whether it gets work."""
        loop = self._loop
        if loop is None or not self._machine.ask(clock()):
            return
        if _runs_here(loop):
            self._call_at(clock())
            return
        with contextlib.suppress(RuntimeError):  # its loop has ended: the pool serves nobody
            loop.call_soon_threadsafe(_tick_if_alive, self._home)

    def _look_again(self) -> None:
        self._carry_out(self._machine.look_again(clock()))

    def _tick(self) -> None:
        try:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()
            self._bring_orphans_home()
            self._carry_out(self._machine.tick(clock()))
            if self._machine.opening:
                self._call_at(clock() + LOOK_AGAIN_SECONDS)
        except BaseException:  # a signal's: the next one repeats what is left
            self._call_at(clock())
            raise

    # -- orders -----------------------------------------------------------------------------------

    def _carry_out(self, orders: list[Order]) -> None:
        """Carry out and forget: a caller's list must not hold a slot that others borrow by now."""
        orders.reverse()
        while orders:
            self._carry_out_one(orders.pop())

    def _carry_out_one(self, order: Order) -> None:
        match order:
            case Open(slot, if_changed):
                self._begin_to_open(slot, if_changed=if_changed)
            case TakeBack(slot):
                self._take_back(slot)
            case Close():
                self._close(order)
            case TickAt(when):
                self._call_at(when)
            case Overdue(slot, seconds):
                self._warn_overdue(slot, seconds)
            case ReportOutage(seconds):
                self._spawn(self._say_outage(seconds))

    def _spawn(
        self, work: Coroutine[Any, Any, None], undone: Callable[[], object] | None = None
    ) -> asyncio.Task[None] | None:
        """Run `work` in a task of its own; None, and it is dropped, but on the pool's own loop.

        On another one, and when the pool was closed and has left its loop, nobody would see to the
        task when that loop ends.

        `undone` is called when the task has ended: one that is cancelled before its first step has
        done nothing, not even its `finally`, and what it was given would be the garbage collector's.
        """
        loop = self._loop
        if loop is None or self._ending or not _runs_here(loop):
            work.close()
            return None
        # An empty context: what a request keeps in context variables is not the pool's.
        task = contextvars.Context().run(loop.create_task, work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        if undone is not None:
            task.add_done_callback(lambda _task: undone())
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """One of the pool's own tasks has ended; one that a signal's exception struck left a move half done."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        # Its frames, which the error keeps, may have a slot that is nobody's any more: it is to come home.
        seen: BaseException | None = error
        while seen is not None:
            clear_frames(seen.__traceback__)
            seen = seen.__context__
        self._call_at(clock())
        if isinstance(error, Exception) and self._loop is not None:  # others have ended the loop
            told = f"a task of pool {self.name!r} failed"
            self._loop.call_exception_handler({"message": told, "exception": error, "task": task})

    def _call_at(self, when: float) -> None:
        """Tick at `when`, by a timer; each prefix of this leaves one that comes, or is seen not to come."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        now = clock()
        timer = self._timer
        # uvloop's handles do not all know when. One whose time has passed may have been lost to an interrupt.
        ticks_at = self._ticks_at
        if timer is not None and now < ticks_at <= when:
            return
        seconds = min(max(0.0, when - now), LONGEST_SLEEP)
        self._timer = loop.call_later(seconds, _tick_if_alive, self._home)
        self._ticks_at = when
        if timer is not None and now < ticks_at:  # one that is due may be just about to come
            timer.cancel()

    # -- opening ----------------------------------------------------------------------------------

    def _begin_to_open(self, slot: Slot, *, if_changed: bool) -> None:
        task = self._spawn(self._open_slot([slot], if_changed=if_changed))
        if task is not None:
            self._connects.add(task)
            task.add_done_callback(self._connects.discard)
            self._call_at(clock() + LOOK_AGAIN_SECONDS)

    async def _end_connects(self) -> None:
        """The pool is closed: nobody wants what is being opened."""
        connects = set(self._connects)
        for task in connects:
            task.cancel()
        if connects:
            await asyncio.wait(connects, timeout=loops.CANCELLED_SECONDS)

    async def _open_slot(self, place: list[Slot], *, if_changed: bool) -> None:
        """In a task: open a connection for the slot in this place.

        Neither the task nor this frame holds the slot once the machine has it: else one that was
        lent and dropped would not come home.
        """
        await asyncio.sleep(0)  # a loop may run a new task at once, in the middle of our caller
        link = None
        slot_ref = place[0].ref
        brief = place[0].brief
        progress = place[0].progress
        seconds = min(BRIEF_SECONDS, CONNECT_SECONDS) if brief else CONNECT_SECONDS
        try:
            await self._turn(progress)
            try:  # no `async with`: its end is a coroutine, which an interrupt can keep from beginning
                link = await self._opener.open(seconds, if_changed=if_changed, progress=progress)
            finally:
                self._end_turn(progress)
            self._watch(link, slot_ref)
            outage = self._machine.outage
            orders = self._machine.opened(place.pop(), link, clock())
        except SameAgain:
            self._carry_out(self._machine.unchanged(place.pop(), clock()))
            self._tell_onlookers()
            return
        except BaseException as error:  # also a SystemExit of a user's callable
            if link is not None and (slot_ref is None or slot_ref.link is not link):
                _discard(link)  # it belongs to no slot yet, with which it would come home
            if not place:
                raise  # a signal's, in the middle of the move
            await self._open_failed(place, error, may_change=not if_changed)
            if not isinstance(error, Exception):
                raise  # cancelled; or a KeyboardInterrupt, which ends the loop as from any other task
            return
        self._carry_out(orders)
        self._tell_onlookers()
        if outage is not None:
            _log.warning("pool %r: connections can be opened again", self.name)

    async def _turn(self, progress: Progress | None) -> None:
        await self._connecting.acquire()
        self._turns.add(progress)

    def _end_turn(self, progress: Progress | None) -> None:
        """Let another one connect; repeatable, since one that hangs has its turn ended for it."""
        if progress in self._turns:
            self._turns.discard(progress)
            self._connecting.release()

    def _take_back(self, slot: Slot) -> None:
        """This opening has had all its time; a coroutine that goes on after a cancellation, say."""
        progress = slot.progress
        if progress is None:
            return  # it was opened just now
        failure = explain_hanging(progress)
        before = self._machine.outage
        orders = self._machine.take_back(slot, failure, clock())
        if self._machine.has(slot):
            return  # it has come to its next part just now
        self._end_turn(progress)
        self._carry_out(orders)
        self._tell_onlookers()
        if before is None or before.error.text != failure.text:
            _log.warning("pool %r: cannot open a connection: %s", self.name, failure.text)

    async def _open_failed(
        self, place: list[Slot], error: BaseException, *, may_change: bool
    ) -> None:
        progress = place[0].progress
        if not self._machine.has(place[0]):  # its right was taken back
            self._carry_out(self._machine.failed_late(place.pop(), clock()))
            return
        if progress is not None:
            progress.found = self._opener.explain_at_once(error)
            go_on(progress, None, DIAGNOSE_SECONDS + DRIVER_GRACE)
        try:
            failure = await self._explain(error)
        except BaseException:
            failure = self._opener.explain_at_once(error)
            self._note_failure(place.pop(), failure, may_change=False)
            raise
        may_change = may_change and self._opener.may_change()
        self._note_failure(place.pop(), failure, may_change=may_change)

    async def _explain(self, error: BaseException) -> Failure:
        if isinstance(error, asyncio.CancelledError):
            return self._opener.explain_at_once(_Cancelled())
        if not isinstance(error, Exception):
            return self._opener.explain_at_once(_Struck(type(error).__name__))
        return await self._opener.explain(error)

    def _note_failure(self, slot: Slot, failure: Failure, *, may_change: bool) -> None:
        before = self._machine.outage
        orders = self._machine.open_failed(
            slot,
            failure,
            clock(),
            heals=failure.heals,
            sqlstate=failure.sqlstate,
            may_change=may_change,
        )
        self._carry_out(orders)
        self._tell_onlookers()
        if isinstance(failure.error, (_Cancelled, _Struck)):
            return  # nobody's fault, and mostly the program's end
        if before is None or before.error.text != failure.text:
            code = f" (SQLSTATE {failure.sqlstate})" if failure.sqlstate else ""
            _log.warning("pool %r: cannot open a connection: %s%s", self.name, failure.text, code)

    # -- closing ----------------------------------------------------------------------------------

    def _close(self, order: Close) -> None:
        place = [order]
        undone = partial(self._close_undone, place)
        if order.discard or not self._spawn(self._close_slot(place), undone):
            undone()

    async def _close_slot(self, place: list[Close]) -> None:
        """In a task: end this slot's connection politely."""
        await asyncio.sleep(0)
        order = place[0]
        link = order.slot.link
        if link is not None:
            _unwatch(link, order.slot.ref)
            await _closed(link)
            order.slot.link = None
        self._ended(place.pop())

    def _close_undone(self, place: list[Close]) -> None:
        """No task, or one that was cancelled."""
        if place:
            self._close_at_once(place.pop())

    def _close_at_once(self, order: Close) -> None:
        slot = order.slot
        link = slot.link
        if link is not None:
            _unwatch(link, slot.ref)
            if order.reason is Reason.ORPHANED:
                link.park()  # somebody may still hold the connection: its next use raises
            if order.discard or not _closed_without_waiting(link):
                _discard(link)
            slot.link = None
        # Not at once: this may be a long list of orders, each of which may bring another.
        if self._loop is None or self._loop.is_closed():
            self._ended(order)
        else:
            self._loop.call_soon(self._ended, order)

    def _ended(self, order: Close) -> None:
        self._carry_out(self._machine.closed(order.slot, order.reason, clock()))
        self._tell_onlookers()

    # -- watching ---------------------------------------------------------------------------------

    def _watch(self, link: Any, slot_ref: SlotRef | None) -> None:
        """Have the end of this session noticed; before it can be lent, so that none goes unnoticed."""
        loop = self._loop
        if slot_ref is None or loop is None:
            return
        if link.on_end(partial(_told_of_end, slot_ref)):
            return
        if link.fd < 0 or not watch.available():
            return
        try:
            slot_ref.watched = loops.watch_for(loop, link.fd, slot_ref, _told_by_watch)
        except BaseException:
            link.discard()
            raise

    def _hung_up(self, slot: Slot) -> None:
        self._carry_out(self._machine.hung_up(slot, clock()))

    # -- orphans ----------------------------------------------------------------------------------

    def _bring_orphans_home(self) -> None:
        while self._orphans:
            self._bring_home(self._orphans.popleft())
        # What an interrupt kept out of the list is found by its dead reference.
        for slot_ref in list(self._machine.refs.values()):
            if slot_ref() is None:
                self._bring_home(slot_ref)

    def _bring_home(self, slot_ref: SlotRef) -> None:
        orders = self._machine.bring_home(slot_ref, clock())
        if orders and slot_ref.link is not None:
            self._getconns.pop(id(slot_ref.link.conn), None)
        self._carry_out(orders)

    # -- what people should know ------------------------------------------------------------------

    def _warn_overdue(self, slot: Slot, seconds: float) -> None:
        _log.warning(
            "pool %r: a connection has been lent for %.0f s (overdue_after=%s): %s",
            self.name,
            seconds,
            self._config.overdue_after,
            self._reporter.holder_of(slot) or "its holder is not known",
        )

    async def _say_outage(self, seconds: float) -> None:
        _log.error("pool %r: no connection could be opened for %.0f s", self.name, seconds)
        failed = self._config.reconnect_failed
        if failed is not None:
            await called(failed, self)

    def _tell_onlookers(self) -> None:
        for tell in list(self._onlookers):
            tell()


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    return asyncio._get_running_loop() is loop


class _Cancelled(Exception):  # noqa: N818  it is what happened
    """A connect was cancelled: whoever did that cancelled all tasks of the loop."""

    def __str__(self) -> str:
        return "connecting was cancelled: all tasks of the loop were, or it is ending"


class _Struck(Exception):  # noqa: N818  it is what happened
    """A connect was cut off by what ends a program, a signal handler's; of the server that says nothing."""

    def __str__(self) -> str:
        return f"connecting was cut off by {super().__str__()}"


def _unwatch(link: Any, slot_ref: SlotRef | None) -> None:
    # Before the close, since numbers are reused; and by the serial, since libpq closes a broken
    # connection's socket by itself: the number may be another connection's already.
    if slot_ref is not None and slot_ref.watched:
        loops.unwatch(link.fd, slot_ref.watched)
        slot_ref.watched = 0


async def _closed(link: Any) -> None:
    try:
        await link.close()
    except Exception:  # noqa: BLE001  drivers promise not to; one that does must not keep the right
        _log.exception("a driver could not end a connection; it is dropped")
    except BaseException:
        _discard(link)
        raise


def _closed_without_waiting(link: Any) -> bool:
    """End the session politely if that takes no waiting: where no task can run any more."""
    closing = link.close()
    try:
        closing.send(None)
    except StopIteration:
        return True
    except Exception:  # noqa: BLE001  as above
        return False
    closing.close()
    return False


def _discard(link: Any) -> None:
    try:
        link.discard()
    except Exception:  # noqa: BLE001  as above
        _log.exception("a driver could not end a connection; it is dropped")


def _loop_ends(home: ref[Any]) -> set[asyncio.Task[None]]:
    pool = home()
    return set() if pool is None else pool._loop_is_ending()


def _tick_if_alive(home: ref[Any]) -> None:
    pool = home()
    if pool is not None:
        pool._tick()


def _told_by_watch(slot_ref: SlotRef, fd: int) -> None:
    slot = slot_ref()
    if slot is not None and (slot.link is None or slot.link.fd == fd):
        _told_of_end(slot_ref)


def _told_of_end(slot_ref: SlotRef) -> None:
    """On the loop: flag the slot, and see to it."""
    slot = slot_ref()
    if slot is None or slot.ref is not slot_ref:
        return
    slot.condemn(Reason.HUNG_UP)
    pool = slot_ref.home()
    if pool is not None:
        pool._hung_up(slot)


def orphaned(home: ref[Any], slot_ref: SlotRef) -> None:
    """Anywhere, also in the garbage collector: a slot has died that nobody had given back."""
    pool = home()
    if pool is None:
        return
    pool._orphans.append(slot_ref)
    try:
        (pool._loop or asyncio.get_running_loop()).call_soon_threadsafe(pool._tick)
    except RuntimeError:  # its loop has ended: nobody comes to this until the pool is used again
        if slot_ref.link is not None:
            _discard(slot_ref.link)


def let_go_of_all(machine: Machine) -> None:
    """Of a pool that nobody holds any more and nobody closed: end its sessions."""
    for slot_ref in list(machine.refs.values()):
        link, slot_ref.link = slot_ref.link, None
        if link is not None:
            _unwatch(link, slot_ref)
            _discard(link)
