"""The fault table's rows, shortened, with threads and psycopg 3: what is counted is as promised.

`make faults` plays them at full length, with every runtime and driver, and prints what was seen.
"""

from __future__ import annotations

import pytest
from tests.conftest import SEED
from tests.faults.rows import ROWS, TESTED, load
from tests.faults.stage import ROOT, Stage
from tests.faults.table import as_cells, page_of, put_into
from tests.faults.written import BEGIN, END, Table, read, write


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
# Scenes are coroutines, with threads, too: on 3.12 a signal can strike between one's making and its start.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("row", TESTED)
def test_when_this_happens_the_figures_hold(row, server):
    stage = Stage("threads-psycopg", seed=f"{SEED} {row}", shared=lambda: server)
    stage.play(load()[row].play)
    for figure in stage.figures:
        print(figure)
    assert stage.figures
    assert not [figure for figure in stage.figures if not figure.holds]


def figure(value, *, name="errors", met=True, holds=True):
    return {"name": name, "value": value, "goal": "0", "met": met, "holds": holds}


def test_a_table_shows_goals_misses_failures_and_what_was_not_measured():
    table = Table()
    table.tell("down", "a", as_cells([figure("0")]))
    table.tell("down", "b", as_cells([figure("1", met=False)]))
    table.tell(
        "down", "c", as_cells([figure("2", met=False, holds=False), figure("3|4", name="late")])
    )
    lines = table.text({"down": "[down](down.md)"}, ["a", "b", "c", "d"]).splitlines()
    assert lines == [
        "| fault | figure | goal | a | b | c |",
        "| --- | --- | --- | --- | --- | --- |",
        "| [down](down.md) | errors | 0 | 0 | miss 1 | FAIL 2 |",
        "|  | late | 0 | - | - | 3/4 |",
    ]


def test_what_is_measured_anew_replaces_that_cell_and_nothing_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# Before\n\n{BEGIN}{END}\nAfter\n", encoding="utf-8")
    first, other = ROWS[:2]
    about = page_of(first, page)
    about.write_text(f"{BEGIN}{END}", encoding="utf-8")
    put_into(page, first, "threads-psycopg", [figure("0"), figure("1", name="of then")])
    put_into(page, first, "asyncio-asyncpg", [figure("2"), figure("3", name="of one")])
    put_into(page, other, "threads-psycopg", [figure("4")])
    put_into(page, first, "threads-psycopg", [figure("5"), figure("6", name="of now")])

    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Before\n") and text.endswith("\nAfter\n")
    table = read(page)
    both = ["threads-psycopg", "asyncio-asyncpg"]
    assert table.lines(load()[first].TITLE, both) == [
        ["errors", "0", "5", "2"],
        ["of now", "0", "6", "-"],
        ["of one", "0", "-", "3"],
    ]
    assert table.lines(load()[other].TITLE, both) == [["errors", "0", "4", "-"]]
    assert f"| [{load()[first].TITLE}]({about.name}) | errors | 0 | 5 | 2 |\n" in text
    assert "| errors | 0 | 5 |\n| of now | 0 | 6 |\n" in about.read_text(encoding="utf-8")
    write(page, table.text({}, both))
    assert read(page).rows == {}


def test_the_docs_show_every_row_and_have_a_page_for_it():
    """`make faults ARGS="--short --row ROW --markdown docs/faults/README.md"` puts a new one there."""
    page = ROOT / "docs/faults/README.md"
    assert set(TESTED) < set(ROWS)
    shown = read(page).rows
    assert [row for row, module in load().items() if module.TITLE not in shown] == []
    text = page.read_text(encoding="utf-8")
    assert [row for row in ROWS if f"]({page_of(row, page).name})" not in text] == []
