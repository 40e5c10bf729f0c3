"""The list of planted faults as a table, between two markers in docs/planted-faults.md.

Its one job: that table. Rows of faults that were not run now stay as they are. It must not know: how
anything is found out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.planted.fault import ROOT

if TYPE_CHECKING:
    from tests.planted.fault import Fault

PAGE = ROOT / "docs" / "planted-faults.md"
BEGIN = "<!-- python -m tests.planted writes from here -->\n"
END = "<!-- to here -->\n"

#: Longer failures are cut: the test's own output has the rest.
_LONGEST = 110


def row(fault: Fault, by: list[str], how: str) -> str:
    """One row: fault, file, noticed by, how."""
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(map(_short, by))) or "**nobody**"
    return f"| {_cell(fault.name)} | `{fault.file}` | {names} | {_code(how)} |"


def write(faults: list[Fault], rows: dict[str, str]) -> None:
    """Put the table into the page; `rows` has what was run, by the fault's name."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    former, after = rest.split(END)
    known = {line.split(" | ")[0].removeprefix("| "): line for line in former.splitlines()}
    lines = ["", "| fault | in | noticed by | how |", "| --- | --- | --- | --- |"]
    for fault in faults:
        line = rows.get(fault.name) or known.get(_cell(fault.name))
        lines += [line] if line else []
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")


def _short(test: str) -> str:
    """A test's file and name; of the contract's scenarios and others with parameters, these too."""
    return test.removeprefix("tests/")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    text = re.sub(r"0x[0-9a-f]{6,}", "0x..", text)
    text = re.sub(r"(?<![\w.])/(?:[\w.-]+/)+", "", text)  # folders of one machine
    text = text.replace("`", "'").replace("|", "\\|")
    return f"`{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}`"
