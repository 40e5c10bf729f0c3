"""What stacks show: where holders stand, what a borrower's own stack keeps, whether a loop runs beneath it.

One job: read frames, for errors and for a borrower that has to wait while it holds a connection; never
on the hot path. Of its own stack it finds the connections in the variables of the frames that are
running, and says which of them cannot be given back before these frames go on.

It must not know: pools, slots, drivers. It knows connections by their `id`.

No lock. What cannot be read (no source, another interpreter's frames) is not seen: the borrower then
waits, and is not refused.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import CodeType, FrameType

# -- the user's frames ------------------------------------------------------------------------


# Frames of these packages say how a thread waits, not what it is doing.
_PLUMBING = frozenset(
    (
        *("penstock", "threading", "contextlib", "selectors", "queue", "asyncio", "concurrent"),
        *("psycopg", "psycopg_binary", "psycopg_c", "psycopg_pool", "psycopg2", "asyncpg"),
        *("socket", "ssl", "gevent", "greenlet"),
    )
)


def called_at() -> str:
    """Where the user's code is that has called penstock: " (at app/report.py:42)"; "" if nobody has.

    For the warnings about what was left behind; it walks up the stack.
    """
    place = place_of_caller()
    return "" if place is None else f" (at {_short(place[0])}:{place[1]})"


def is_plumbing(frame: FrameType) -> bool:
    """Whether this frame is penstock's, a driver's or a runtime's, and not the user's."""
    module = frame.f_globals.get("__name__")
    return str(module).partition(".")[0] in _PLUMBING


def first_of_user(top: FrameType | None) -> FrameType | None:
    """The innermost frame of a stack that is the user's code."""
    frame = top
    while frame is not None:
        if not is_plumbing(frame):
            return frame
        frame = frame.f_back
    return top  # plumbing all the way down: better than nothing


def place_of_caller() -> tuple[str, int] | None:
    """The user's code that has called penstock: file and line."""
    # Asked for in each request of Flask's: `is_plumbing` is written out.
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  the documented way
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _PLUMBING:
            return frame.f_code.co_filename, frame.f_lineno or 0
        frame = frame.f_back
    return None


def event_loop() -> str:
    """Whose event loop runs in the calling thread, and stands still while it waits; "": nobody's."""
    running = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
    if running is not None and running() is not None:
        return "asyncio"
    in_trio_run = getattr(getattr(sys.modules.get("trio"), "lowlevel", None), "in_trio_run", None)
    return "trio" if in_trio_run is not None and in_trio_run() else ""


# -- what a borrower's own stack keeps --------------------------------------------------------------


class Sight(NamedTuple):
    """Where a connection was seen.

    Attributes:
        file: path of the source file.
        line: the line of the `with` that has bound it; else where that frame is now.
        function: the qualified name of the function whose variable it is.
        bound: a `with` that has not ended has bound it: it was borrowed at this line.
        kept: it cannot be given back before this frame goes on. A `with` has bound it that has not
            ended, or a call was given it that has not returned. A plain variable is no proof: it keeps
            naming a connection that somebody else gives back, and a module's are everybody's.
    """

    file: str
    line: int
    function: str
    bound: bool
    kept: bool


def seen(ids: Collection[int], top: FrameType | None) -> dict[int, Sight]:
    """Where the objects with these ids stand in variables of this stack; what is kept counts first."""
    found: dict[int, Sight] = {}
    for frame in _outwards(top):
        for name, number in _named(frame, ids):
            if number not in found or not found[number].kept:
                sight = _sight(frame, name)
                if sight.kept or number not in found:
                    found[number] = sight
    return found


def _outwards(top: FrameType | None) -> Iterator[FrameType]:
    frame = top
    while frame is not None:
        yield frame
        frame = frame.f_back


def _named(frame: FrameType, ids: Collection[int]) -> list[tuple[str, int]]:
    """The variables of a frame that name one of the objects."""
    try:
        # Copied: a module's variables are the module's own.
        named = list(frame.f_locals.items())
        return [(name, id(value)) for name, value in named if id(value) in ids]
    except Exception:  # noqa: BLE001  a class body may have any mapping: not known is not seen
        return []


def _sight(frame: FrameType, name: str) -> Sight:
    code, line = frame.f_code, frame.f_lineno or 0
    bound_at = _bound_at(frame, name, line)
    return Sight(
        file=code.co_filename,
        line=bound_at or line,
        function=code.co_qualname,
        bound=bool(bound_at),
        kept=bool(bound_at) or name in _parameters(code),
    )


def _parameters(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


# -- which `with` has bound a variable --------------------------------------------------------------


class _With(NamedTuple):
    first: int
    last: int
    bound_at: dict[str, int]  # line by name


def _bound_at(frame: FrameType, name: str, line: int) -> int:
    """The line of the `with ... as name` whose body this frame is in; 0: there is none."""
    if name in frame.f_code.co_freevars:
        return 0  # the variable of a function outside, which may have ended
    around = [
        each for each in _withs(frame) if each.first <= line <= each.last and name in each.bound_at
    ]
    return around[-1].bound_at[name] if around else 0


def _withs(frame: FrameType) -> tuple[_With, ...]:
    try:
        # By its lines and not by the interpreter's tables, which are different in each version.
        return _read("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except Exception:  # noqa: BLE001  not known is not seen
        return ()


@functools.lru_cache(maxsize=32)
def _read(source: str) -> tuple[_With, ...]:
    return tuple(
        _With(node.lineno, node.end_lineno or node.lineno, dict(_bound_by(node)))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.With | ast.AsyncWith)
    )


def _bound_by(node: ast.With | ast.AsyncWith) -> Iterator[tuple[str, int]]:
    for item in node.items:
        for target in () if item.optional_vars is None else ast.walk(item.optional_vars):
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                yield target.id, item.context_expr.lineno


def _short(path: str) -> str:
    """The last two parts: enough to find the file, and the same on every machine."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])
