"""No loop stands directly inside a `with lock:` or a guard's `try:` (see guarded_loops.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import penstock
from tests.machine.guarded_loops import in_bytecode, in_source

HOUSE = Path(penstock.__file__).parent
# Not asyncio's: they hold no lock, what they guard is dropped and comes home (_pool/aio/executor.py), and
# an `await` is itself compiled to a jump back.
FILES = [
    *sorted(HOUSE.glob("_machine/*.py")),
    *sorted(HOUSE.glob("_pool/sync/*.py")),
    HOUSE / "_pool/opener.py",
    *(HOUSE / f"_process/{name}.py" for name in ("fork", "keeper", "watch", "watchdog")),
]

LOOP_IN_LOCK = """
def serve(self):
    with self._lock:
        for waiter in self.waiters:
            if waiter.waits:
                self.give(waiter)
"""
COMPREHENSION_IN_LOCK = """
def living(self):
    with self._lock:
        return [waiter for waiter in self.waiters if waiter.waits]
"""
LOOP_IN_TRY = """
def wait(gate):
    try:
        while gate.shut:
            gate.sleep()
    except BaseException:
        gate.leave()
        raise
"""
CURED = """
def serve(self):
    with self._lock:
        self.serve_all()

def serve_all(self):
    for waiter in self.waiters:
        if waiter.gone:
            continue
        with self._lock:
            self.give(waiter)
"""
MARKED = LOOP_IN_TRY.replace("    while", "    # loop-in-try: this is a test\n        while")


def name_of(path):
    return path.relative_to(HOUSE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_loop_stands_directly_in_a_lock_or_a_try(path):
    lines = in_source(path.read_text(encoding="utf-8"))
    assert not lines, f"{path.name}, lines {lines}: put the loop into a function, or give a reason"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_jump_back_stands_in_a_gap_of_the_exception_table(path):
    lines = in_bytecode(path.read_text(encoding="utf-8"), str(path))
    assert not lines, f"{path.name}, lines {lines}: an interrupt there would skip the handler"


@pytest.mark.parametrize("text", [LOOP_IN_LOCK, LOOP_IN_TRY], ids=["lock", "try"])
def test_the_source_check_finds_a_planted_loop(text):
    assert len(in_source(text)) == 1


@pytest.mark.parametrize("text", [CURED, MARKED], ids=["cured", "marked"])
def test_both_checks_let_pass_what_is_cured_or_marked(text):
    assert in_source(text) == []
    assert in_bytecode(text) == []


@pytest.mark.skipif(sys.version_info[:2] not in {(3, 12), (3, 13)}, reason="others have no gaps")
def test_the_bytecode_check_finds_a_planted_loop_where_there_are_gaps():
    assert in_bytecode(LOOP_IN_LOCK), "the case that deadlocked a prototype"
    assert in_bytecode(LOOP_IN_TRY)
    assert in_bytecode(COMPREHENSION_IN_LOCK), "3.12 and 3.13 put it into the function"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="3.11 has no such gaps")
def test_the_bytecode_check_finds_nothing_where_there_are_no_gaps():
    assert in_bytecode(LOOP_IN_LOCK) == []
