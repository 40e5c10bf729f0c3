"""What the stack of the calling thread, task or greenlet shows of the connections that it has borrowed.

One job: find those connections in the variables of the frames that are running, and say which of them
cannot be given back before these frames go on. It is asked by a borrower that has to wait and holds a
connection; never on the hot path.

It must not know: pools, slots, drivers. It knows connections by their `id`.

No lock. What cannot be read (no source, another interpreter's frames) is not seen: the borrower then
waits, and is not refused.
"""

from __future__ import annotations

import ast
import functools
import linecache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import CodeType, FrameType


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
