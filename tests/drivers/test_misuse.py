"""docs/misuse.md tells what is seen: each cell of its table is what comes of doing it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.drivers.misuse_columns import COLUMNS, Column
from tests.drivers.misuse_seen import MISUSES, what_is_seen

if TYPE_CHECKING:
    from pytest_penstock.postgres import Server

PAGE = Path(__file__).parents[2] / "docs" / "misuse.md"


def told() -> list[list[str]]:
    """The page's first table: its head, and its rows."""
    text = PAGE.read_text(encoding="utf-8").partition("\n| misuse")[2].partition("\n\n")[0]
    lines = ("| misuse" + text).splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line
    ]


# psycopg complains of a server-side cursor that was not closed, and it is one of the misuses not to.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.title)
def test_the_page_tells_what_comes_of_each_misuse(column: Column, server: Server) -> None:
    head, *rows = told()
    place = head.index(column.title)
    page = {(row[0], row[1]): row[place] for row in rows}
    logging.getLogger("penstock").addHandler(logging.NullHandler())
    conninfo = server.conninfo(over="unix")
    seen = {title: what_is_seen(column, conninfo, scene) for title, scene in MISUSES.items()}
    assert page == seen


def test_with_guard_all_of_psycopgs_and_asyncpgs_misuse_of_returned_connections_is_noticed() -> (
    None
):
    head, *rows = told()
    for row in rows:
        for title in ("psycopg 3", "psycopg 3, asyncio", "asyncpg"):
            cell = row[head.index(title)]
            assert not cell.endswith("**not noticed**"), row[:2]
