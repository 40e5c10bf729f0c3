"""Errors without the frames that they came through.

One job: an error's traceback holds frames, those hold what was in their names (a pool, a password, the
error itself), and on the way up from them all who called. Where an error is kept, or raised again in
other words, they must go. It must not know: what the error means.

Locks: none.
"""

from __future__ import annotations

from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


def without_frames(error: ErrorT) -> ErrorT:
    """The error itself, of whose whole chain of causes no frame is kept."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            found.__traceback__ = None
            pending += [found.__cause__, found.__context__]
    return error
