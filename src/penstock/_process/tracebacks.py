"""Errors without the frames that they came through.

One job: an error's traceback holds frames, those hold what was in their names (a pool, a password, the
error itself), and on the way up from them all who called. Where an error is kept, or raised again in
other words, they must go. It must not know: what the error means.

Locks: none.
"""

from __future__ import annotations

import traceback
from pathlib import PurePath
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


_RAISED = "raised in "


def place_noted(error: BaseException) -> str:
    """Where an error was raised, which becomes a note of it: for errors that are about to lose their frames."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_RAISED):
            return str(note)
    places = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if not places:
        return ""
    code, line = places[-1]
    path = "/".join(PurePath(code.co_filename).parts[-2:])
    note = f"{_RAISED}{code.co_name}, {path}:{line}"
    error.add_note(note)
    return note
