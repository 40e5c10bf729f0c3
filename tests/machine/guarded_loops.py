"""Finds loops that stand directly inside a `with` or a `try`, in source text and in bytecode.

Why that matters: 3.12 and 3.13 leave gaps in the exception table of a protected region whose body
holds a loop. A KeyboardInterrupt that strikes there skips `__exit__`, `except` and `finally`: the
lock stays held for ever. The cure is a function that has the loop; its call is covered.

`in_source` is strict and the same on every version. `in_bytecode` asks the interpreter at hand
where its gaps really are. A loop that has to stay is marked `# loop-in-try: <reason>`.
"""

from __future__ import annotations

import ast
import dis
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

MARK = re.compile(r"#\s*loop-in-try:\s*\S")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)
JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)


def in_source(text: str) -> list[int]:
    """The lines of loops in the body of a `try:` or of a `with` for a lock, but for marked ones."""
    tree, marked = ast.parse(text), _marked(text)
    lines = {
        node.lineno
        for region in ast.walk(tree)
        for body in _protected(region)
        for node in _loops(body)
    }
    return sorted(line for line in lines if line not in marked)


def _protected(node: ast.AST) -> Iterator[list[ast.stmt]]:
    is_lock = isinstance(node, ast.With) and any("lock" in _text(item) for item in node.items)
    if isinstance(node, ast.Try | ast.TryStar | ast.With) and (
        is_lock or not isinstance(node, ast.With)
    ):
        yield node.body


def _text(item: ast.withitem) -> str:
    return ast.unparse(item.context_expr).lower()


def _loops(body: list[ast.stmt]) -> Iterator[ast.stmt | ast.expr]:
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, FUNCTIONS):
            continue
        waits = any(isinstance(part, ast.Await) for part in ast.walk(node))
        kinds = (*LOOPS, *COMPREHENSIONS) if waits else LOOPS
        if isinstance(node, kinds):
            yield node
        todo.extend(ast.iter_child_nodes(node))


def _marked(text: str) -> set[int]:
    """The lines of loops that are marked, on their first line or just above."""
    return {
        line
        for number, content in enumerate(text.splitlines(), 1)
        if MARK.search(content)
        for line in (number, number + 1)
    }


def in_bytecode(text: str, filename: str = "<text>") -> list[int]:
    """The lines of loops whose jump back stands in a gap of a protected region."""
    marked = _marked(text)
    within = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, LOOPS) and node.lineno in marked
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    found = {line for code in _codes(compile(text, filename, "exec")) for line in _in_gaps(code)}
    return sorted(found - within)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _codes(constant)


def _in_gaps(code: CodeType) -> Iterator[int]:
    ranges, regions = _regions(code)
    before, line = 0, code.co_firstlineno
    came_before: dict[int, int] = {}
    for instruction in dis.get_instructions(code):
        came_before[instruction.offset] = before
        before = instruction.offset
        if instruction.positions is not None and instruction.positions.lineno is not None:
            line = instruction.positions.lineno
        target = instruction.argval
        if instruction.opcode not in JUMPS or "NO_INTERRUPT" in instruction.opname:
            continue
        if not isinstance(target, int) or target > instruction.offset:
            continue
        # 3.12 jumps first, and looks the handler up at the instruction before the target.
        points = (instruction.offset, came_before[target])
        inside = any(start < target < end for start, end in regions)
        if inside and not all(_covered(point, ranges) for point in points):
            yield line


def _regions(code: CodeType) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What the exception table covers, and for each handler all from its first to its last byte.

    Only handlers that somebody wrote count (with, except, finally: they begin with PUSH_EXC_INFO);
    comprehensions and generators have some of their own, which only tidy up the frame.
    """
    written = {i.offset for i in dis.get_instructions(code) if i.opname == "PUSH_EXC_INFO"}
    ranges: list[tuple[int, int]] = []
    hulls: dict[int, tuple[int, int]] = {}
    for entry in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined]  # not in typeshed
        ranges.append((entry.start, entry.end))
        if entry.target in written:
            start, end = hulls.get(entry.target, (entry.start, entry.end))
            hulls[entry.target] = min(start, entry.start), max(end, entry.end)
    return ranges, list(hulls.values())


def _covered(offset: int, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= offset < end for start, end in ranges)
