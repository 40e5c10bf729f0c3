"""Is a frame inside the body of a `with`? Read from its code, for a borrower that may wait for itself.

One job: that question. CPython only; where its tables cannot be read the answer is no.

It must not know: pools. It is asked when a borrow would be refused, never on the hot path.
"""

from __future__ import annotations

import dis
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType, FrameType


def is_inside_with(frame: FrameType | None) -> bool:
    """Whether the instruction that the frame is at is covered by the exit of a `with`."""
    if frame is None:
        return False
    try:
        return _is_covered(frame.f_code, frame.f_lasti)
    except Exception:  # noqa: BLE001  another interpreter, other tables: not known is not seen
        return False


def _is_covered(code: CodeType, at: int) -> bool:
    # The handler of a `with` begins with PUSH_EXC_INFO, WITH_EXCEPT_START (3.11 to 3.14).
    leave = dis.opmap["WITH_EXCEPT_START"]
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]  # noqa: SLF001
    seen: set[int] = set()
    # The table knows the innermost handler only: that of a `try` in the body is itself in the body.
    while at not in seen:
        seen.add(at)
        target = next((entry.target for entry in entries if entry.start <= at < entry.end), None)
        if target is None:
            return False
        if code.co_code[target + 2] == leave:
            return True
        at = target
    return False
