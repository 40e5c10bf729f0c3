"""What a review of the psycopg2 driver found, and must not come back."""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

from penstock._drivers.psycopg2 import deadline
from penstock._process import fork

if TYPE_CHECKING:
    import pytest

SECONDS = 20.0  # a bound for what is expected to work


class Noted:
    """Something that can be shut down."""

    def __init__(self) -> None:
        self.rang = threading.Event()

    def discard(self) -> None:
        self.rang.set()


def bound(link: Noted, seconds: float) -> deadline.Bound:
    return deadline.Bound(link, monotonic() + seconds)


def bell_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "penstock-psycopg2"]


# -- a process that forks must not have more threads than the application started ------------------


def test_the_thread_that_keeps_deadlines_is_parked_around_a_fork_and_forgets_none() -> None:
    before, during = Noted(), Noted()
    with bound(before, 0.3):
        fork._run_before()
        try:
            assert not bell_threads()
            with bound(during, 0.01):
                assert not bell_threads(), "it was started before the fork"
                fork._run_in_parent()
                assert during.rang.wait(SECONDS)
        finally:
            fork._run_in_parent()
        assert before.rang.wait(SECONDS)


def test_a_fork_whose_end_is_not_heard_of_stops_no_deadline_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadline, "PARKED_SECONDS", 0.0)
    with bound(Noted(), 1000):
        fork._run_before()
        try:
            later = Noted()
            with bound(later, 0.01):
                assert later.rang.wait(SECONDS)
        finally:
            fork._run_in_parent()
