"""The fault table as it stands in the docs: read, changed cell by cell, and written back.

Its one job: the text between two markers of a page. docs/faults/README.md has the whole table; the page of
a row, beside it, has that row with threads and psycopg 3. What is measured anew replaces what stands there for
that row and that combination, and nothing else; so a run that was cut off has lost nothing, and one row with
one driver can be measured alone.

It must not know: how anything is measured, what a figure means.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

BEGIN, END = "<!-- figures begin: make faults writes them -->\n", "<!-- figures end -->\n"
NOTHING = "-"

_FIGURES = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)
_LINK = re.compile(r"\[(?P<title>.*)\]\([^)]*\)")

#: One row: for each figure its goal, and what was seen by combination.
Lines = dict[str, tuple[str, dict[str, str]]]


class Table:
    """Rows by title, in the order in which they were first told."""

    def __init__(self, text: str = "") -> None:
        self.rows: dict[str, Lines] = {}
        head, *body = [_cells(line) for line in text.splitlines() if line.startswith("|")] or [[]]
        title = ""
        for cells in body[1:]:
            title = _title(cells[0]) or title
            seen = dict(zip(head[3:], cells[3:], strict=True))
            self.rows.setdefault(title, {})[cells[1]] = (cells[2], seen)

    def tell(self, title: str, name: str, told: Iterable[tuple[str, str, str]]) -> None:
        """Replace what is known of a row with one combination by (figure, goal, what was seen)."""
        former = self.rows.get(title, {})
        for _goal, seen in former.values():
            seen.pop(name, None)
        rows: Lines = {}
        for figure, goal, value in told:
            _, seen = former.pop(figure, ("", {}))
            rows[figure] = (goal, {**seen, name: value.replace("|", "/")})
        left = {
            figure: (goal, seen)
            for figure, (goal, seen) in former.items()
            if set(seen.values()) - {NOTHING}
        }
        self.rows[title] = rows | left

    def text(self, titles: Mapping[str, str], names: Sequence[str]) -> str:
        """The whole as Markdown.

        Args:
            titles: the rows' titles in order, each with what is shown for it; others are dropped.
            names: the columns; those of which nothing is known are dropped.
        """
        known = {
            name for lines in self.rows.values() for _, seen in lines.values() for name in seen
        }
        names = [name for name in names if name in known]
        rows = [["fault", "figure", "goal", *names], ["---"] * (3 + len(names))]
        for title, shown in titles.items():
            first = shown
            for figure, goal, *seen in self.lines(title, names):
                rows.append([first, figure, goal, *seen])
                first = ""
        return _markdown(rows)

    def row_text(self, title: str, name: str) -> str:
        """One row with one combination as Markdown."""
        lines = [line for line in self.lines(title, [name]) if line[2] != NOTHING]
        return _markdown([["figure", "goal", name], ["---"] * 3, *lines])

    def lines(self, title: str, names: Sequence[str]) -> list[list[str]]:
        """A row's figures, goals, and what was seen by these combinations."""
        return [
            [figure, goal, *(seen.get(name, NOTHING) for name in names)]
            for figure, (goal, seen) in self.rows.get(title, {}).items()
        ]


def read(page: Path) -> Table:
    """The table between the page's markers."""
    found = _FIGURES.search(page.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{page} has no place for figures: no {BEGIN.strip()}")
    return Table(found[0])


def write(page: Path, table: str) -> None:
    """Put the table between the page's markers, if it has any."""
    text = page.read_text(encoding="utf-8")
    changed = _FIGURES.sub(lambda _found: "\n" + table + "\n", text)
    if changed != text:
        page.write_text(changed, encoding="utf-8")


def _title(cell: str) -> str:
    link = _LINK.fullmatch(cell)
    return link["title"] if link else cell


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
