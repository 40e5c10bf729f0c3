"""Ctrl-C and SIGTERM, turned into something that strikes only where it is awaited.

A KeyboardInterrupt may be raised between the birth of a process and the line that would remember it;
nobody could end that process then. So the first signal only sets a flag, and whoever waits here sees
it within milliseconds. A second Ctrl-C is an ordinary KeyboardInterrupt, for somebody in a hurry.

It must not know what is being interrupted.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType


class InterruptedBySignal(Exception):  # noqa: N818  (a request from outside, not an error)
    """Somebody asked the command to end; `signum` is how."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted; `check` and `wait` raise what was noted."""

    def __init__(self) -> None:
        self._noted: int | None = None
        self._told = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]  # what signal() gave us
        if isinstance(error, Exception) and not isinstance(error, InterruptedBySignal):
            # Ctrl-C reaches the programs that somebody runs in our terminal, too: what fails
            # after it fails because of it.
            self.check()

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        hurry = self._noted is not None and signum == signal.SIGINT
        self._noted = signum
        self._told.set()
        if hurry:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise if a signal came."""
        if self._noted is not None:
            raise InterruptedBySignal(self._noted)

    def wait(self, seconds: float) -> None:
        """Wait, unless and until a signal comes."""
        self._told.wait(seconds)
        self.check()
