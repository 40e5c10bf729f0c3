"""`python -m tests.faults.table`: every row with every runtime and driver, as a table.

Its one job: run `tests.faults.run` once per cell, and show what it told. Rows run one at a time, since
they measure. Exit status 1 if a figure does not hold (as tests mean it); a missed goal is shown, and no
failure: it may be the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
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
    names = list(figures)
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    table.add_column("figure")
    table.add_column("goal")
    for name in names:
        table.add_column(name, justify="right")
    for figure, goal in lines(figures):
        cells = [cell(figures[name], figure) for name in names]
        table.add_row(figure, goal, *(f"[{style}]{value}[/]" for value, style in cells))
    return table


def lines(figures):
    """The figures' names and goals, each once, in the order told."""
    goals: dict[str, str] = {}
    for each in (each for own in figures.values() for each in own):
        goals.setdefault(each["name"], each["goal"])
    return list(goals.items())


def cell(own, figure):
    for each in own:
        if each["name"] == figure:
            if not each["holds"]:
                return f"FAIL {each['value']}", "bold red"
            return (each["value"], "green") if each["met"] else (f"miss {each['value']}", "yellow")
    return "-", "dim"


def as_markdown(found, names):
    """The same as one table, for docs/faults.md."""
    head = ["fault", "figure", "goal", *names]
    rows = [head, ["---"] * len(head)]
    for row, figures in found.items():
        title = load()[row].TITLE
        for figure, goal in lines(figures):
            cells = [cell(figures.get(name, []), figure)[0] for name in names]
            rows.append([title, figure, goal, *cells])
            title = ""
    return "".join("| " + " | ".join(each) + " |\n" for each in rows)


def main():
    parser = argparse.ArgumentParser(description="what penstock does when things break")
    parser.add_argument("--with", dest="names", action="append", choices=COMBINATIONS)
    parser.add_argument("--row", dest="rows", action="append", choices=ROWS)
    parser.add_argument("--short", action="store_true", help="a few seconds a row, as in the tests")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write it there")
    asked = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = asked.names or list(COMBINATIONS)
    for name in list(names):
        if absent := missing(name):
            console.print(f"{name}: {', '.join(absent)} is not installed")
            names.remove(name)
    found: dict[str, dict[str, list]] = {}
    for row in asked.rows or ROWS:
        unfit = getattr(load()[row], "UNFIT", {})
        found[row] = {
            name: measure(name, row, long=not asked.short) for name in names if name not in unfit
        }
        console.print(as_rich(load()[row].TITLE, found[row]))
        for name in names:
            if name in unfit:
                console.print(f"  {name}: {unfit[name]}")
        console.print()
        if asked.markdown:
            asked.markdown.write_text(as_markdown(found, names), encoding="utf-8")
    holds = all(each["holds"] for row in found.values() for own in row.values() for each in own)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
