"""An outage while nobody waits and somebody asks for the pool's health: how often it is probed, and how soon it ends."""

from __future__ import annotations

import random

import pytest

from penstock._machine.asked import LATELY
from tests.machine.mute import Mute


def asks(mute, when):
    """As a runtime does: at once where the machine says so, else nothing."""
    mute.at(when, ask, mute)


def ask(mute):
    if mute.machine.ask(mute.now):
        mute.tick()


def down(until, **limits):
    """A pool whose server refuses until then; nobody ever borrows from it."""
    mute = Mute(0.0, falls=until, **limits)
    chance = random.Random(7)
    mute.machine.random = chance.random
    return mute


@pytest.mark.parametrize("outage", [3.0, 20.0, 60.0, 3600.0])
@pytest.mark.parametrize("period", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("min_size", [0, 1, 2])
def test_a_pool_whose_health_is_asked_for_is_ready_two_seconds_after_its_server(
    outage, period, min_size
):
    mute = down(outage, min_size=min_size, max_size=4)
    if not min_size:
        mute.come()  # else nothing is tried, and nothing is known
        mute.run(1.0)
        mute.machine.give_up(mute.waiters.pop(), mute.now, timed_out=True)
    for n in range(int((outage + 30.0) / period)):
        asks(mute, 1.0 + n * period)
    mute.run(outage + 2.0)
    assert mute.machine.outage is None
    assert mute.machine.idle


def test_it_is_probed_about_once_a_second_however_often_it_is_asked():
    mute = down(1e9, min_size=2, max_size=4)
    for n in range(100_000):
        asks(mute, n * 0.002)
    mute.run(100.0)
    before, ticks = len(mute.begun), mute.ticks
    mute.run(200.0)
    assert 80 <= len(mute.begun) - before <= 140
    assert mute.ticks - ticks <= 320, "each question woke the keeper"


def test_a_question_brings_a_probe_forward_that_is_half_a_minute_away():
    mute = down(1e9, min_size=1)
    mute.run(600.0)
    begun = len(mute.begun)
    assert mute.alarm - mute.now > 5.0
    asks(mute, mute.now + 0.01)
    mute.run(mute.now + 0.02)
    assert len(mute.begun) == begun + 1


def test_once_nobody_asks_any_more_it_is_probed_rarely():
    mute = down(1e9, min_size=1)
    asks(mute, 300.0)
    mute.run(300.0 + LATELY + 31.0)
    begun = len(mute.begun)
    mute.run(mute.now + 300.0)
    assert len(mute.begun) - begun <= 12


def test_replicas_that_fell_together_do_not_come_together():
    at = []
    for seed in range(20):
        mute = down(30.0, min_size=1)
        mute.machine.random = random.Random(seed).random
        for n in range(60):
            asks(mute, float(n))
        mute.run(40.0)
        at.append(mute.begun[-1])
    assert max(at) - min(at) > 0.4


def test_what_cannot_heal_is_tried_once_a_second_at_most():
    mute = down(1e9, min_size=1)
    mute.heals_said = False
    for n in range(120):
        asks(mute, float(n))
    mute.run(100.0)
    assert 50 <= len(mute.begun) <= 101


def test_a_silent_server_is_probed_for_who_asks_as_for_who_waits():
    mute = Mute(40.0, min_size=1, max_size=4)
    for n in range(60):
        asks(mute, float(n))
    mute.run(43.5)
    assert mute.machine.idle
    assert len(mute.begun) <= 60


def test_a_question_while_all_is_well_wakes_nobody_and_opens_nothing():
    mute = Mute(0.0, min_size=0, max_size=4)
    ticks = mute.ticks
    for n in range(100):
        asks(mute, float(n))
    mute.run(100.0)
    assert mute.begun == []
    assert mute.ticks == ticks


def test_a_closed_pool_is_not_opened_by_a_question():
    mute = down(1e9, min_size=1)
    mute.run(50.0)
    mute.carry_out(mute.machine.close(mute.now))
    begun = len(mute.begun)
    asks(mute, 51.0)
    mute.run(100.0)
    assert len(mute.begun) == begun
