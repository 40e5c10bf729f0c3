"""A process whose clocks jump: `python -m tests.faults.clocks COMBINATION ROW worker`.

Its one job: be `tests.faults.run` in a process in which Python reads clocks that can be set. The machine's own may
not be (others read it), and a namespace has no wall clock; so what jumps is what Python is told. Drivers' C
code goes on reading the machine's: nothing of it measures time for penstock.

It must not know: pools, rows.
"""

from __future__ import annotations

import time
from typing import Any

#: Seconds that are added to each clock; change them to jump.
AHEAD = {"wall": 0.0, "boot": 0.0}


def patch() -> None:
    """Before anything else is imported: penstock takes its clock when it is."""
    real: Any = {name: getattr(time, name) for name in ("time", "time_ns", "clock_gettime")}
    of = {time.CLOCK_REALTIME: "wall", time.CLOCK_BOOTTIME: "boot"}

    def clock_gettime(clock: int) -> float:
        return float(real["clock_gettime"](clock)) + AHEAD.get(of.get(clock, ""), 0.0)

    time.time = lambda: float(real["time"]()) + AHEAD["wall"]
    time.time_ns = lambda: int(real["time_ns"]()) + int(AHEAD["wall"] * 1e9)
    time.clock_gettime = clock_gettime


if __name__ == "__main__":
    from tests.faults import clocks  # this file again, by the name under which rows import it

    clocks.patch()
    from tests.faults import run

    run.main()
