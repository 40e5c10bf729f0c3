"""What a process may not have more and more of: descriptors, threads, objects, memory.

Its one job: read them, and say of a row of readings whether it grows. Counts are compared with the most that was there
while the process warmed up, since each step ends at rest; memory, which is noisy, with the same but by the least
of the last readings.

It must not know: pools, steps. No lock.
"""

from __future__ import annotations

import _socket
import gc
import os
import re
import stat
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Readings until a process is warm: imports that are made late, workers, caches.
WARM: Final = 6
#: How many more than ever while it warmed up are a leak; fewer may be a worker that is on its way out.
SLACK: Final = 4
#: Readings of memory that must all be above, and what they are above, before it counts as growth. glibc keeps an
#: arena per thread, and CPython one of 256 kB to 1 MB.
IN_A_ROW: Final = 6
MEGABYTES: Final = 24
OBJECTS: Final = 20_000

#: Whose objects are counted by class.
OURS: Final = ("penstock", "psycopg", "psycopg2", "psycopg_binary", "asyncpg")


def descriptors(port: int) -> Counter[str]:
    """Open descriptors by kind, after a collection; sockets whose other end is `port` are "connections"."""
    gc.collect()  # what an exception's frames hold is closed when they go
    found: Counter[str] = Counter()
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them, or one that was closed just now
            found[_kind(int(each.name), port)] += 1
    return found


def _kind(number: int, port: int) -> str:
    target = str(Path(f"/proc/self/fd/{number}").readlink())
    if stat.S_ISSOCK(os.stat(number).st_mode):
        return "connections" if _peer(number) == port else "sockets"
    return re.sub(r"[:\d]+|\[.*?\]$", "", target) if target.startswith(("pipe", "anon")) else target


def _peer(number: int) -> Any:
    copy = _socket.socket(fileno=os.dup(number))  # gevent's would make it non-blocking
    try:
        with suppress(OSError):
            address = copy.getpeername()
            return address[1] if isinstance(address, tuple) else None
    finally:
        copy.close()
    return None


def threads() -> Counter[str]:
    """Live threads (greenlets, where patched) by name without numbers, and the kernel's count."""
    found = Counter(re.sub(r"[-_ ]?\d+.*$", "", each.name) for each in threading.enumerate())
    found["in the kernel"] = sum(1 for _ in Path("/proc/self/task").iterdir())
    return found


def census() -> Counter[str]:
    """Objects of penstock's and the drivers' classes, by class, after a collection; "all" of any class."""
    gc.collect()
    found: Counter[str] = Counter()
    everything = gc.get_objects()
    for each in everything:
        kind = type(each)
        module = getattr(kind, "__module__", None)
        if isinstance(module, str) and module.partition(".")[0] in OURS:
            found[f"{module.partition('.')[0]}:{kind.__name__}"] += 1
    found["all"] = len(everything)
    return found


def resident() -> float:
    """Megabytes of memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Level:
    """Counts by kind that must come back to where they were while the process warmed up."""

    def __init__(self, what: str, slack: int = SLACK) -> None:
        self.what = what
        self.slack = slack
        self.readings = 0
        self.most: Counter[str] = Counter()

    def excess(self, counts: Counter[str]) -> dict[str, str]:
        """What is beyond the level; the reading does not count yet."""
        if self.readings < WARM:
            return {}
        return {
            kind: f"{number}, and at most {self.most[kind]} while it warmed up"
            for kind, number in counts.items()
            if number > self.most[kind] + self.slack
        }

    def read(self, counts: Counter[str]) -> str:
        """Take a reading; why it is a failure, or nothing."""
        found = self.excess(counts)
        if self.readings < WARM:
            self.most |= counts
        self.readings += 1
        return f"{self.what}: {found}" if found else ""


class Growth:
    """One noisy number that must not climb."""

    def __init__(self, what: str, tolerance: float) -> None:
        self.what = what
        self.tolerance = tolerance
        self.values: list[float] = []

    def read(self, value: float) -> str:
        """Take a reading; why it is a failure, or nothing."""
        self.values.append(value)
        first, last = self.values[: 2 * WARM], self.values[-IN_A_ROW:]
        if len(self.values) < 2 * WARM + IN_A_ROW or min(last) <= max(first) + self.tolerance:
            return ""
        return f"{self.what} grows: at first {_shown(first)}; now {_shown(last)}"


def _shown(values: Iterable[float]) -> str:
    return ", ".join(f"{each:,.0f}" for each in values)
