"""What a person, or an error tracker, sees of an error: its texts, and the locals of each frame of ours.

It must not know: configuration.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import penstock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

OURS = str(Path(penstock.__file__).parent)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and everything that hangs on it, also what ``from None`` merely hides."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            pending += [found.__cause__, found.__context__]


def shown(error: BaseException) -> str:
    """Everything of it: as tracebacks with locals, pytest's showlocals and Sentry show it."""
    parts = []
    for each in chain(error):
        parts += [str(each), repr(each), repr(each.args), repr(vars(each))]
        for frame, line in traceback.walk_tb(each.__traceback__):
            code = frame.f_code
            # the frames of whoever called us have their own locals: they are the user's
            if code.co_filename.startswith(OURS) or "site-packages" not in code.co_filename:
                if "tests" in Path(code.co_filename).parts:
                    continue
                parts.append(f"{code.co_filename}:{line}")
                parts += [f"{name} = {walked(value)}" for name, value in frame.f_locals.items()]
    return "\n".join(parts)


def walked(value: Any, depth: int = 4) -> str:
    """A repr as trackers make it: they walk through containers, whatever those say of themselves."""
    if depth and isinstance(value, dict):
        return f"{safe(value)} " + walked_pairs(value, depth)
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return f"{safe(value)} " + " ".join(walked(each, depth - 1) for each in value)
    if isinstance(value, str) and len(value) > 5:
        return safe(value) + safe(value[:80])  # cut, as rich and Sentry do
    return safe(value)


def walked_pairs(value: Mapping[Any, Any], depth: int) -> str:
    return " ".join(f"{walked(k, depth - 1)}: {walked(v, depth - 1)}" for k, v in value.items())


def safe(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(error).__name__}>"
