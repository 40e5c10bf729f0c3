"""`python -m tests.faults.table`: every row with every runtime and driver, as a table.

Its one job: run `tests.faults.run` once per cell, and show what it told. Cells run one at a time, since
they measure. Exit status 1 if a figure does not hold (as tests mean it); a missed goal is shown, and no
failure: it may be the machine.

`--markdown docs/faults/README.md` puts each cell into that page and the row's own page as soon as it was measured, and
leaves all others as they are (`written.py`); `--from ROW` goes on where a run was ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tests.faults import written
from tests.faults.rows import ROWS, load
from tests.faults.stage import COMBINATIONS, ROOT

#: Seconds for one cell: the price of a failure.
PATIENCE = 400.0


def measure(name, row, *, long):
    """The figures of one cell; an error is a figure that does not hold."""
    command = [sys.executable, "-m", "tests.faults.run", name, row, "play"]
    try:
        done = subprocess.run(
            [*command, *(["--long"] if long else [])],
            input="{}",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [failure(f"no end within {PATIENCE:g} s")]
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        sys.stderr.write(done.stderr)
        return [failure("".join(last))]
    return json.loads(done.stdout.splitlines()[-1])


def failure(why):
    return {"name": "it failed", "value": why, "goal": "-", "met": False, "holds": False}


def missing(name):
    """What is not installed of a combination."""
    return sorted(each for each in COMBINATIONS[name].needs if not importlib.util.find_spec(each))


def as_rich(title, figures):
    """One row of the fault table: its figures below each other, a column per combination."""
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    table.add_column("figure")
    table.add_column("goal")
    for name in figures:
        table.add_column(name, justify="right")
    shown = written.Table()
    for name, own in figures.items():
        shown.tell(title, name, as_cells(own))
    for figure, goal, *values in shown.lines(title, list(figures)):
        table.add_row(figure, goal, *map(coloured, values))
    return table


def as_cells(own):
    """The figures of one cell as (name, goal, what is shown)."""
    for each in own:
        met = "" if each["met"] else "miss "
        yield each["name"], each["goal"], f"{met if each['holds'] else 'FAIL '}{each['value']}"


def coloured(value):
    style = {"FAIL": "bold red", "miss": "yellow", "-": "dim"}.get(value.partition(" ")[0], "green")
    return f"[{style}]{escape(value)}[/]"


def page_of(row, table):
    """The row's own page, beside the one that has the table."""
    return table.parent / f"{row.replace('_', '-')}.md"


def put_into(page, row, name, own):
    """One cell, into the page with the table and the row's own."""
    title = load()[row].TITLE
    table = written.read(page)
    table.tell(title, name, as_cells(own))
    written.write(page, table.text(shown_titles(page), list(COMBINATIONS)))
    about = page_of(row, page)
    if about.exists():
        written.write(about, table.row_text(title, next(iter(COMBINATIONS))))


def shown_titles(page):
    """The rows' titles, each as a link to its page if there is one."""
    titles = {}
    for row, module in load().items():
        about = page_of(row, page)
        titles[module.TITLE] = f"[{module.TITLE}]({about.name})" if about.exists() else module.TITLE
    return titles


def arguments():
    parser = argparse.ArgumentParser(description="what penstock does when things break")
    parser.add_argument("--with", dest="names", action="append", choices=COMBINATIONS)
    parser.add_argument("--row", dest="rows", action="append", choices=ROWS)
    parser.add_argument("--from", dest="first", choices=ROWS, help="skip the rows before this one")
    parser.add_argument("--short", action="store_true", help="a few seconds a row, as in the tests")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="PAGE",
        help="also put it into this page (docs/faults/README.md)",
    )
    return parser.parse_args()


def play(row, names, asked, console):
    """One row, with each combination that it is for."""
    found = {}
    for name in names:
        began = time.monotonic()
        found[name] = measure(name, row, long=not asked.short)
        missed = sum(not each["met"] for each in found[name])
        took = time.monotonic() - began
        console.print(f"  {row}, {name}: {took:.0f} s, {missed} of {len(found[name])} missed")
        if asked.markdown:
            put_into(asked.markdown, row, name, found[name])
    return found


def main():
    asked = arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = asked.names or list(COMBINATIONS)
    for name in list(names):
        if absent := missing(name):
            console.print(f"{name}: {', '.join(absent)} is not installed")
            names.remove(name)
    rows = asked.rows or list(ROWS)
    rows = rows[rows.index(asked.first) if asked.first else 0 :]
    holds = True
    for number, row in enumerate(rows, 1):
        unfit = getattr(load()[row], "UNFIT", {})
        console.print(f"[dim]{number} of {len(rows)}[/]")
        found = play(row, [name for name in names if name not in unfit], asked, console)
        console.print(as_rich(load()[row].TITLE, found))
        for name in names:
            if name in unfit:
                console.print(f"  {name}: {unfit[name]}")
        console.print()
        holds &= all(each["holds"] for own in found.values() for each in own)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
