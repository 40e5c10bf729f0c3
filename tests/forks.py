"""Run something in a forked child, hear what it found, and never hang.

Its one job: fork, run a callable, send its answer (JSON) through a pipe, `os._exit`. A child that does
not answer in time is asked for its stacks (faulthandler), killed, and fails the test.

It must not know: pools, servers. It takes no lock.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import select
import signal
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

_SHOWN = ("State", "voluntary", "nonvoluntary")

PATIENCE = 60.0  # seconds until a test gives up; never a pass mark


def libc_fork() -> int:
    """Fork as uWSGI does by default: no at-fork hook of Python's runs."""
    return int(ctypes.PyDLL(None).fork())


def quiet_libc_fork() -> int:
    """`libc_fork` at a moment when no other thread runs or wants to.

    One that waits for the GIL at that moment breaks it for the child, as it would any program's.
    Nor may a connect be under way: that is a thread inside penstock.
    """
    until(_is_quiet, "no other thread runs")
    return libc_fork()


def _is_quiet() -> bool:
    if any(thread.name == "penstock-connect" for thread in threading.enumerate()):
        return False
    before = _others()
    time.sleep(0.003)  # the GIL is free: who waits for it gets it, and is seen to have run
    after = _others()
    return before == after and all("(sleeping)" in lines[0] for lines in after.values())


def _others() -> dict[str, list[str]]:
    """State and numbers of context switches of all other threads."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            lines = (task / "status").read_text().splitlines()
            found[task.name] = [each for each in lines if each.startswith(_SHOWN)]
    found.pop(str(threading.get_native_id()), None)
    return found


def until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE) -> Any:
    """Wait until `condition` is true and give what it said; fails when that never happens."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not come true: {what or condition}"
        time.sleep(0.005)
    return found


class Bell:
    """A pipe through which one process tells another that it may go on; nobody waits for ever."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def ring(self) -> None:
        os.write(self._writer, b"!")

    def wait(self, seconds: float = PATIENCE) -> None:
        assert select.select([self._reader], [], [], seconds)[0], "nobody rang"
        os.read(self._reader, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._reader)
        os.close(self._writer)


class Child:
    """A forked child that runs `work` and answers with what it returned.

    Args:
        work: what to run; its result must be JSON.
        fork: how to fork.
        leave: how the child ends when it has answered; the default runs nothing at exit.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        *,
        fork: Callable[[], int] = os.fork,
        leave: Callable[[], object] = lambda: os._exit(0),
    ) -> None:
        self._reader, writer = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            _run(work, writer, leave)
        os.close(writer)

    def answer(self, seconds: float = PATIENCE) -> Any:
        """What `work` returned, once the child has ended."""
        said = self._heard(time.monotonic() + seconds)
        if said is None:
            os.kill(self.pid, signal.SIGUSR1)
            stacks = self._heard(time.monotonic() + 5, whatever=True)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError(f"child {self.pid} hung:\n{stacks}")
        os.close(self._reader)
        self._wait_gone()
        head, _, body = said.partition("\n")
        assert head == "answer", f"child {self.pid} failed:\n{said}"
        return json.loads(body)

    def kill(self) -> None:
        """End it with no chance to do anything, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._reader)
        os.waitpid(self.pid, 0)

    def _wait_gone(self) -> None:
        until(lambda: os.waitpid(self.pid, os.WNOHANG)[0], f"the end of child {self.pid}")

    def _heard(self, deadline: float, *, whatever: bool = False) -> str | None:
        """All it says, up to the line that ends it; None if that did not come in time."""
        said = b""
        readable = select.poll()  # whatever the descriptor's number: select() takes 1023 at most
        readable.register(self._reader, select.POLLIN)
        while not said.endswith(b"\x00"):
            left = deadline - time.monotonic()
            if left <= 0 or not readable.poll(left * 1000):
                return said.decode(errors="replace") if whatever else None
            piece = os.read(self._reader, 1 << 16)
            if not piece:
                return said.decode(errors="replace")
            said += piece
        return said[:-1].decode(errors="replace")


def _run(work: Callable[[], Any], writer: int, leave: Callable[[], object]) -> None:
    try:
        faulthandler.register(signal.SIGUSR1, file=writer, all_threads=True)
        try:
            said = "answer\n" + json.dumps(work())
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode() + b"\x00")
        leave()
    finally:
        os._exit(1)
