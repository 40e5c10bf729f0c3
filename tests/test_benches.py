"""The benches run, and what they count is what it should be. Times are for people to look at.

Counts of instructions and calls depend on the interpreter alone, so they can be asserted where
nanoseconds cannot: they keep the hot path short.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock import ConnectionPool

if TYPE_CHECKING:
    from types import FrameType

BENCH = Path(__file__).parents[1] / "bench"


def run(name: str, tmp_path: Path, *arguments: str) -> tuple[Any, str]:
    """The figures as JSON, and what was printed."""
    where = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / name), "--json", str(where), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(where.read_text(encoding="utf-8"))["figures"], done.stdout


def test_a_plain_borrow_and_return_execute_two_fifths_of_psycopg_pools_instructions(tmp_path):
    figures, printed = run("hot_path.py", tmp_path, "--rounds", "1")
    ours = figures["penstock, with connection()"]
    theirs = figures["psycopg_pool, with connection()"]
    assert ours["python_calls"] == 3  # connection(), __enter__, __exit__
    assert 0 < ours["instructions"] <= theirs["instructions"] * 0.4
    assert printed.count("\nPASS  ") + printed.count("\nmiss  ") == 4


def test_a_borrow_costs_the_round_trips_that_the_readme_names(tmp_path):
    figures, _ = run("round_trips.py", tmp_path)
    assert figures["penstock"] == {
        "nothing": 0,
        "one_statement": 3,
        "two_statements": 4,
        "execute": 1,
    }


def test_contention_is_measured_for_both_pools_in_every_case(tmp_path):
    figures, _ = run("contention.py", tmp_path, "--seconds", "0.05")
    assert [one["pool"] for one in figures] == ["penstock", "psycopg_pool"] * 4
    assert all(one["per_second"] > 0 for one in figures)


def test_a_borrow_and_return_on_asyncio_suspends_nowhere_and_stays_short(tmp_path):
    figures, printed = run("async_hot_path.py", tmp_path, "--rounds", "1")
    for driver in ("psycopg", "asyncpg"):
        # -1 would say that it had to wait for something.
        assert 0 < figures[f"penstock, {driver}"]["instructions"] <= 260
    assert printed.count("\nPASS  ") + printed.count("\nmiss  ") == 2


def test_each_guard_of_the_hot_path_is_found_and_can_be_taken_out_of_it(tmp_path):
    figures, _ = run("guards.py", tmp_path, "--rounds", "1")
    assert list(figures) == ["psycopg 3", "psycopg2", "psycopg 3, asyncio", "asyncpg"]
    for driver in figures.values():
        whole = driver["the whole"]["instructions"]
        guards = {name: one for name, one in driver.items() if "low" in one}
        assert len(guards) >= 13
        for name, one in guards.items():
            # Some are saved, so it is out; and never the greater part, so the rest still does its work.
            least = 0 if name.startswith("interrupts") else 2  # a `try` costs none on 3.13
            assert least <= one["instructions"] < whole / 4


def test_what_people_do_is_measured_beside_peers_and_the_bare_driver(tmp_path):
    figures, printed = run("usual.py", tmp_path, "--rounds", "1")
    assert all("penstock" in each and len(each) >= 3 for each in figures.values())
    assert printed.count("\nPASS  ") + printed.count("\nmiss  ") == 14


def test_a_return_that_commits_is_nearly_as_short_as_an_empty_one(server):
    """Functions of penstock's that are entered after the block, the commit's own among them."""
    with ConnectionPool(server.conninfo(), name="bench") as pool:
        for _ in range(2):
            entered: list[str] = []

            def seen(frame: FrameType, event: str, _arg: object, entered=entered) -> None:
                if event == "call" and "penstock" in frame.f_code.co_filename:
                    entered.append(frame.f_code.co_qualname)

            lease = pool.connection()
            conn = lease.__enter__()
            conn.execute("select 1")
            sys.setprofile(seen)
            try:
                lease.__exit__(None, None, None)
            finally:
                sys.setprofile(None)
    assert entered[-1] == "Machine.put"
    assert len(entered) <= 15, entered
