"""The one clock of the pool: seconds that also pass while the machine is suspended.

A connection that was idle for a night of suspend was idle for a night: its peer may be long gone.
CLOCK_MONOTONIC stands still meanwhile, CLOCK_BOOTTIME does not (clock_gettime(2)), and costs the
same: 42 to 47 ns a reading. Deadlines, ages and ticks all use this clock and no other.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)

clock: Callable[[], float] = (
    time.monotonic if _BOOTTIME is None else partial(time.clock_gettime, _BOOTTIME)
)
