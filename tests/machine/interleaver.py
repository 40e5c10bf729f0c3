"""Runs real code in real threads, one opcode at a time, in an order that a seed decides.

One job: make races repeatable. Each thread stops before every opcode of the watched files and hands
the one baton back; the next thread is drawn by a seeded generator. Locks and gates are made of the
same stuff, so "everybody waits" is a deadlock or a lost wake-up, and is reported at once.

It must not know what the watched code does. It models an interpreter with a global lock: one opcode
at a time, all threads seeing the same order.
"""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


class Deadlock(AssertionError):
    """Every thread waits for another."""


@dataclass
class _Thread:
    name: str
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    blocked_on: Callable[[], bool] | None = None
    done: bool = False


class Interleaver:
    """One schedule. `spawn` what shall run, then `run`."""

    def __init__(self, seed: int, *watched: str) -> None:
        self.random = random.Random(seed)
        self.watched = frozenset(watched)
        # How likely a thread goes on with its next opcode. Even chances alone hardly ever let one
        # thread run twenty opcodes while another stands still, which is what many races need.
        self.stickiness = self.random.choice([0.0, 0.5, 0.9, 0.98])
        self.steps = 0
        self._threads: list[_Thread] = []
        self._mine = threading.local()
        self._finished = threading.Semaphore(0)
        self._error: BaseException | None = None

    def spawn(self, work: Callable[[], object], name: str) -> None:
        """Have `work` run as one of the threads, from its first opcode under our control."""
        thread = _Thread(name)
        self._threads.append(thread)
        threading.Thread(target=self._body, args=(thread, work), name=name, daemon=True).start()

    def run(self) -> None:
        """Let them run until all are done; raises what a thread raised, or `Deadlock`."""
        self._pass_on(None)
        self._finished.acquire()
        if self._error is not None:
            raise self._error

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Block the calling thread; what simulated locks and gates are made of."""
        thread = self._mine.thread
        while not condition():
            thread.blocked_on = condition
            self._switch()

    def pause(self) -> None:
        """A point at which another thread may run, in code that is not watched."""
        self._switch()

    # -- inside the threads -----------------------------------------------------------------------

    def _body(self, thread: _Thread, work: Callable[[], object]) -> None:
        self._mine.thread = thread
        thread.baton.acquire()
        sys.settrace(self._enter)
        try:
            work()
        except BaseException as error:
            self._error = error
        finally:
            sys.settrace(None)
            thread.done = True
            self._pass_on(None)

    def _switch(self) -> None:
        thread = self._mine.thread
        if self._pass_on(thread):
            thread.baton.acquire()

    def _pass_on(self, me: _Thread | None) -> bool:
        """Draw who is next and give him the baton; False if that is the caller himself.

        Only the thread that has the baton is ever in here.
        """
        if self._error is not None:
            self._finished.release()
            return True  # the others stay where they are, for ever: they are daemons
        remaining = [thread for thread in self._threads if not thread.done]
        able = [t for t in remaining if t.blocked_on is None or t.blocked_on()]
        if not able:
            if remaining:
                self._error = Deadlock("everybody waits: " + ", ".join(t.name for t in remaining))
            self._finished.release()
            return True
        if me in able and self.random.random() < self.stickiness:
            chosen = me
        else:
            chosen = self.random.choice(able)
        assert chosen is not None
        chosen.blocked_on = None
        self.steps += 1
        if chosen is me:
            return False
        chosen.baton.release()
        return True

    def _enter(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename not in self.watched:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._opcode

    def _opcode(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "opcode":
            self._switch()
        return self._opcode


class SimLock:
    """A lock that one thread can take again, as the runtime's is."""

    def __init__(self, interleaver: Interleaver) -> None:
        self._interleaver = interleaver
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            self._interleaver.wait_until(lambda: self._owner is None)
            self._owner = me
        self._depth += 1

    def __exit__(self, *_exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None


class SimGate:
    """Where a waiter sleeps: opened once by somebody else, or given up when the seed says so."""

    def __init__(self, interleaver: Interleaver) -> None:
        self._interleaver = interleaver
        self._open = False

    def wake(self) -> None:
        self._open = True

    def wait(self, *, may_time_out: bool) -> bool:
        """True when woken, False when the time was up."""
        patience = self._interleaver.random.randrange(400) if may_time_out else None

        def ready() -> bool:
            nonlocal patience
            if patience is not None and patience > 0:
                patience -= 1
            return self._open or patience == 0

        self._interleaver.wait_until(ready)
        return self._open
