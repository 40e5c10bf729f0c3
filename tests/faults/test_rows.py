"""The fault table's rows, shortened, with threads and psycopg 3: what is counted is as promised.

`make faults` plays them at full length, with every runtime and driver, and prints what was seen.
"""

from __future__ import annotations

import pytest
from tests.conftest import SEED
from tests.faults.rows import ROWS, TESTED, load
from tests.faults.stage import ROOT, Stage
from tests.faults.table import as_markdown, lines


@pytest.mark.parametrize("row", TESTED)
def test_when_this_happens_the_figures_hold(row, server):
    stage = Stage("threads-psycopg", seed=f"{SEED} {row}", shared=lambda: server)
    stage.play(load()[row].play)
    for figure in stage.figures:
        print(figure)
    assert stage.figures
    assert not [figure for figure in stage.figures if not figure.holds]


def test_a_table_shows_goals_misses_failures_and_what_was_not_measured():
    def figure(value, *, met, holds):
        return {"name": "errors", "value": value, "goal": "0", "met": met, "holds": holds}

    found = {
        ROWS[0]: {
            "a": [figure("0", met=True, holds=True)],
            "b": [figure("1", met=False, holds=True)],
            "c": [figure("2", met=False, holds=False)],
        }
    }
    assert lines(found[ROWS[0]]) == [("errors", "0")]
    table = as_markdown(found, ["a", "b", "c", "d"]).splitlines()
    assert table[2] == f"| {load()[ROWS[0]].TITLE} | errors | 0 | 0 | miss 1 | FAIL 2 | - |"


def test_the_docs_show_every_row():
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    assert set(TESTED) < set(ROWS)
    assert [row for row, module in load().items() if f"| {module.TITLE} |" not in page] == []
