"""README and docs as data: their fenced blocks, links, and headings.

It must not know: pytest, pools, what a block does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "bench/README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("README.md"),
    ]
)

_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        line: the line of the page on which its text begins.
        follows: nothing but empty lines stands between it and the block before it.
    """

    language: str
    text: str
    line: int
    follows: bool


def name_of(page: Path) -> str:
    """How a page is called in reports."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    content = page.read_text(encoding="utf-8")
    found, end = [], -1
    for match in _FENCE.finditer(content):
        line = content.count("\n", 0, match.start("text")) + 1
        follows = end >= 0 and not content[end : match.start()].strip()
        found.append(Block(match["language"].strip(), match["text"], line, follows))
        end = match.end()
    return found


def links(page: Path) -> list[str]:
    """Where the page's links lead to, outside of fenced blocks."""
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def headings(page: Path) -> set[str]:
    """The page's headings as links name them: lower case, words joined by hyphens."""
    content = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"^#+ (.+)$", content, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}
