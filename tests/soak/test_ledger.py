"""The ledger's comparison notices each thing that may not be; the rows here are planted."""

from __future__ import annotations

import pytest

from tests.soak.ledger import ALONE, BOTH, DONE, NEVER, UNKNOWN, Entry, Journal, compare


def whole(key, parts):
    return [(key, part) for part in parts]


def test_what_was_told_and_is_there_once_agrees():
    entries = {
        "a": Entry(ALONE, DONE),
        "b": Entry(BOTH, DONE),
        "c": Entry(BOTH, NEVER),
        "d": Entry(ALONE, UNKNOWN),
        "e": Entry(BOTH, UNKNOWN),
    }
    found = compare(entries, [*whole("a", ALONE), *whole("b", BOTH), *whole("e", BOTH)])
    assert not found, found
    assert str(found) == "all agrees"


@pytest.mark.parametrize(
    ("entry", "rows", "kind"),
    [
        (Entry(ALONE, DONE), [], "lost"),
        (Entry(BOTH, DONE), [("k", "debit")], "lost"),
        (Entry(BOTH, DONE), [("k", "debit")], "torn"),
        (Entry(BOTH, UNKNOWN), [("k", "credit")], "torn"),
        (Entry(ALONE, DONE), 2 * whole("k", ALONE), "twice"),
        (Entry(ALONE, UNKNOWN), 2 * whole("k", ALONE), "twice"),
        (Entry(BOTH, DONE), [*whole("k", BOTH), ("k", "debit")], "twice"),
        (Entry(BOTH, NEVER), whole("k", BOTH), "undead"),
    ],
)
def test_a_planted_row_too_many_or_too_few_is_noticed(entry, rows, kind):
    found = compare({"k": entry}, rows)
    assert getattr(found, kind) == ["k"], found
    assert kind in str(found)


def test_a_row_that_nobody_asked_for_is_noticed():
    assert compare({}, [("stranger", "alone")]).unasked == ["stranger"]


def test_accounts_that_do_not_add_up_are_noticed():
    assert "off by -3" in str(compare({}, [], imbalance=-3))


def test_work_is_unknown_until_something_is_noted():
    journal = Journal("who")
    keys = [journal.ask(BOTH) for _ in range(3)]
    assert len(set(keys)) == 3
    journal.note(keys[0], DONE)
    journal.heard_of(["child"], NEVER)
    assert [journal.count(each) for each in (DONE, NEVER, UNKNOWN)] == [1, 1, 2]
