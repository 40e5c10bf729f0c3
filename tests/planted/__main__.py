"""`python -m tests.planted`: plant one fault at a time, and see whether the tests named for it notice.

Its one job: go through the list (tests/planted/*.toml), say for each fault noticed, NOT noticed or does
not apply, and write the table of docs/planted-faults.md. First all tests that are named run on a copy
without any fault: a test that fails anyhow notices nothing. Exit status 1 unless every fault was noticed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.planted import page
from tests.planted.copy import Copy, Outcome
from tests.planted.fault import PATIENCE, Fault, does_not_apply, load, parts


def main() -> None:
    asked = arguments()
    faults = load()
    chosen = [fault for fault in faults if wanted(fault, asked)]
    if not chosen:
        sys.exit("no fault has that in its name")
    rows: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-planted-") as folder:
        copy = Copy(Path(folder))
        anyhow = fail_anyhow(copy, chosen)
        good = [report(copy, fault, anyhow, rows) for fault in chosen]
    if not asked.dry:
        page.write(faults, rows)
    print(f"{good.count(True)} of {len(good)} noticed")
    sys.exit(0 if all(good) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="which test notices which planted fault")
    parser.add_argument("words", nargs="*", help="only faults with one of these in their names")
    parser.add_argument("--part", action="append", choices=parts(), help="only of these lists")
    parser.add_argument("--dry", action="store_true", help="leave docs/planted-faults.md alone")
    return parser.parse_args()


def wanted(fault: Fault, asked: argparse.Namespace) -> bool:
    if asked.part and fault.part not in asked.part:
        return False
    return not asked.words or any(word in fault.name for word in asked.words)


def fail_anyhow(copy: Copy, faults: list[Fault]) -> dict[str, str]:
    """The tests that fail, or do not run, where nothing is planted; and how."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    files = {test.partition("::")[0] for test in tests}
    names = copy.names([file for file in sorted(files) if (copy.root / file).is_file()])
    there = [test for test in tests if any(is_case_of(name, test) for name in names)]
    outcome = copy.run(there, PATIENCE + 10 * len(there))
    if outcome.ended:
        sys.exit(f"without any fault: {outcome.ended}")
    anyhow = {test: why for test in there if (why := fails(test, outcome))}
    for test in tests:
        if not any(is_case_of(ran, test) for ran in outcome.ran):
            anyhow.setdefault(test, "it does not run here" if test in there else "no such test")
    for test, why in anyhow.items():
        print(f"without any fault: {test}: {why}", flush=True)
    return anyhow


def fails(test: str, outcome: Outcome) -> str:
    """How this test failed; nothing if it did not."""
    return next((why for name, why in outcome.failed.items() if is_case_of(name, test)), "")


def is_case_of(name: str, test: str) -> bool:
    return name == test or name.startswith(f"{test}[")


def report(copy: Copy, fault: Fault, anyhow: dict[str, str], rows: dict[str, str]) -> bool:
    """Plant one fault, print what came of it, keep its row; whether it was noticed by every test named."""
    began = time.monotonic()
    verdict, by, how = judge(copy, fault, anyhow)
    rows[fault.name] = page.row(fault, by, how)
    seconds = time.monotonic() - began
    print(f"{verdict:14} {seconds:5.1f} s  {fault.name}\n{'':23} {how}", flush=True)
    return verdict == "noticed"


def judge(copy: Copy, fault: Fault, anyhow: dict[str, str]) -> tuple[str, list[str], str]:
    """The verdict, the tests that noticed, and the last line of what they said."""
    why_not = does_not_apply(fault, copy.root)
    if why_not:
        return "does not apply", [], why_not
    red = {test: anyhow[test] for test in fault.tests if test in anyhow}
    if red:
        return "NOT noticed", [], f"without the fault: {red}"
    with copy.planted(fault):
        # Of one test, the first case that fails will do; else each is to be seen.
        outcome = copy.run(fault.tests, PATIENCE, until_one_fails=len(fault.tests) == 1)
    by = [test for test in fault.tests if fails(test, outcome)]
    if outcome.ended:
        return "NOT noticed", by, outcome.ended
    silent = [test for test in fault.tests if test not in by]
    if silent:
        return "NOT noticed", by, f"these passed: {', '.join(silent)}"
    return "noticed", by, fails(by[0], outcome)


if __name__ == "__main__":
    main()
