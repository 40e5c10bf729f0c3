"""The list of planted faults does not rot: each can still be planted, and the tests named for it are there.

That they notice is seen by `make planted`, which takes minutes.
"""

import pytest

from tests.planted import page
from tests.planted.fault import does_not_apply, load

FAULTS = load()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_this_fault_can_be_planted_and_has_a_test(fault):
    assert not does_not_apply(fault)


def test_each_fault_has_a_sentence_of_its_own():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))
    assert len(names) > 45


def test_the_page_has_a_row_for_each_fault_and_for_no_other():
    text = page.PAGE.read_text(encoding="utf-8")
    table = text.split(page.BEGIN)[1].split(page.END)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        fault.name.replace("|", "\\|") for fault in FAULTS
    ]
    assert "**nobody**" not in table
