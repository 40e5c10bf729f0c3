# ruff: noqa: INP001  a script, no part of a package
"""Draws the diagram of a slot's states into design.md, from the machine's own table of moves.

One job: `python docs/draw_moves.py` writes what stands between the two markers. A test says when it
has to be run (tests/machine/test_moves.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from penstock._machine.slot import LEGAL_MOVES, SlotState

PAGE: Final = Path(__file__).with_name("design.md")
BEGIN: Final = "<!-- drawn by docs/draw_moves.py: begin -->"
END: Final = "<!-- drawn by docs/draw_moves.py: end -->"


def _name(state: SlotState) -> str:
    return "[*]" if state is SlotState.GONE else state.name.lower()


def mermaid() -> str:
    """The diagram: an arrow for each pair of states, with every move between them."""
    arrows: dict[tuple[SlotState, SlotState], list[str]] = {}
    for (state, move), target in LEGAL_MOVES.items():
        arrows.setdefault((state, target), []).append(move.value)
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{s.value}" as {_name(s)}' for s in SlotState if s is not SlotState.GONE]
    lines.append(f"    [*] --> {_name(SlotState.OPENING)}")
    for (state, target), moves in arrows.items():
        lines.append(f"    {_name(state)} --> {_name(target)}: {', '.join(moves)}")
    return "\n".join(["```mermaid", *lines, "```"])


def drawn(page: str) -> str:
    """The page with the diagram as it must be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{mermaid()}\n{END}{after}"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{PAGE} has no markers")
    PAGE.write_text(drawn(text), encoding="utf-8")
