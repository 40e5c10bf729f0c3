"""A connect that is not answered does not keep the pool from asking again: how often, how many, what counts."""

from __future__ import annotations

import pytest

from penstock._machine.silence import PATIENCE, PROBES
from tests.machine.mute import BRIEF, LONG, Mute


@pytest.mark.parametrize("heals", [0.5, 1.5, 3.0, 7.0, 25.0, 61.0])
@pytest.mark.parametrize(("size", "borrowers"), [(8, 8), (8, 1), (10, 30), (5, 20), (50, 50)])
def test_who_waits_is_served_a_second_after_a_silent_server_answers_new_connects(
    heals, size, borrowers
):
    mute = Mute(heals, max_size=size)
    mute.come(borrowers)
    mute.run(heals + 10.0)
    # A pool of five has one right beside the first wave, so that it asks every third second at first.
    bound = PATIENCE + 0.1 if size > 6 or borrowers == 1 else BRIEF + 0.5
    assert mute.served[0] - heals <= bound
    assert len(mute.served) == min(size, borrowers)
    if heals + bound < LONG:
        assert mute.served[0] < LONG, "before the first connect has come to its end"


@pytest.mark.parametrize("heals", [3.0, 6.0, 9.0])
@pytest.mark.parametrize("borrowers", [1, 8])
def test_an_outage_that_turns_into_silence_is_probed_on(heals, borrowers):
    mute = Mute(heals, falls=1.0, max_size=8)
    mute.come(borrowers)
    mute.run(heals + PATIENCE + 0.1)
    assert len(mute.served) >= borrowers - 4, "those that are silent still have their rights"
    assert mute.machine.outage is None
    mute.run(60.0)
    assert len(mute.served) == borrowers


@pytest.mark.parametrize("borrowers", [1, 8, 500])
def test_a_silent_server_is_asked_once_a_second_and_few_times_at_once(borrowers):
    mute = Mute(1e9, falls=0.1, max_size=100)
    mute.come(borrowers)
    mute.run(10.0)
    before = len(mute.begun)
    mute.run(110.0)
    assert len(mute.begun) - before <= 150
    assert mute.most_silent <= 4 + PROBES
    assert mute.ticks < 600


def test_probes_that_end_late_are_few_all_the_same():
    mute = Mute(1e9, falls=0.1, max_size=100, long=1e6)  # the user's own connect_timeout
    mute.brief = 1e6
    mute.come(50)
    mute.run(1000.0)
    assert mute.most_silent <= 4 + PROBES


def test_nobody_waiting_is_no_reason_to_ask_beside_a_silent_connect():
    mute = Mute(1e9, min_size=3, max_size=8)
    mute.run(2.0)
    mute.tick()
    mute.run(9.0)
    assert len(mute.begun) == 1


def test_a_server_that_takes_longer_than_a_brief_try_is_reached_all_the_same():
    mute = Mute(12.0, takes=5.0, max_size=8)
    mute.come()
    mute.run(30.0)
    assert len(mute.served) == 1


def test_a_connect_that_times_out_after_another_succeeded_is_no_outage():
    mute = Mute(2.5, max_size=8)
    mute.come()
    mute.run(4.0)
    assert len(mute.served) == 1
    failures = mute.machine.tally.open_failures
    mute.run(11.0)
    assert mute.machine.tally.open_failures > failures, "it is counted"
    assert mute.machine.outage is None, "and says nothing of the server as it is now"


def test_a_refusal_that_follows_a_success_at_once_is_an_outage():
    mute = Mute(0.0, max_size=8)
    mute.come(2)
    first, second = (event[3][0] for event in sorted(mute.events) if event[2] == mute.ends)
    mute.events.clear()
    mute.carry_out(mute.machine.opened(first, object(), 0.02))
    mute.carry_out(mute.machine.open_failed(second, "full", 0.02, heals=True, sqlstate="53300"))
    assert mute.machine.outage is not None


def test_a_connect_that_is_answered_late_is_one_more_connection():
    mute = Mute(1.5, max_size=8)
    mute.come()
    ((_, _, _, (slot, *_)),) = [event for event in mute.events if event[2] == mute.ends]
    mute.events = [event for event in mute.events if event[2] != mute.ends]
    mute.run(4.0)
    assert len(mute.served) == 1
    mute.carry_out(mute.machine.opened(slot, object(), 4.0))
    assert slot in mute.machine.idle


def test_one_straggler_beside_a_server_that_answers_holds_nobody_back():
    mute = Mute(0.5, takes=0.2, max_size=20)
    mute.come()
    mute.run(2.0)
    assert len(mute.served) == 1
    begun = len(mute.begun)
    mute.come(8)
    mute.run(2.5)
    assert len(mute.served) == 9, "at once, not one after the other"
    assert len(mute.begun) - begun <= 8
