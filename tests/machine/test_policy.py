"""The arithmetic: how often a server that is down is asked, and what the figures in Stats say."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from penstock._machine.machine import Machine, Waiter
from penstock._machine.orders import Open, TickAt
from penstock._machine.policy import (
    FIRST_DELAYS,
    LONGEST_DELAY,
    TOO_MANY_CONNECTIONS,
    Limits,
    retire_at,
    retry_delay,
)
from penstock._machine.stats import snapshot, wait_quantile
from penstock._machine.tally import WAIT_EDGES, Tally

if TYPE_CHECKING:
    from penstock._machine.slot import SlotRef


def delays(count, *, waited_for, chance=0.5):
    """The delays of an outage in which every attempt fails at once."""
    down_for, found = 0.0, []
    for failures in range(1, count + 1):
        delay = retry_delay(failures, down_for, waited_for=waited_for, sqlstate=None, random=chance)
        down_for += delay
        found.append(delay)
    return found


# -- backoff


@pytest.mark.parametrize("waited_for", [True, False])
def test_the_first_attempts_come_fast_whoever_waits(waited_for):
    first = delays(12, waited_for=waited_for)
    assert first == [*FIRST_DELAYS, *[0.2] * 10]
    assert 2.0 < sum(first) < 2.2, "a second down and then the recovery"
    assert delays(13, waited_for=waited_for)[12] > 0.4


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 0.45), (0.5, 0.465), (1.0, 0.48)])
def test_while_somebody_waits_the_delay_stays_short_with_jitter(chance, expected):
    assert delays(200, waited_for=True, chance=chance)[12:] == pytest.approx([expected] * 188)


def test_while_nobody_waits_the_delay_doubles_up_to_half_a_minute():
    later = delays(40, waited_for=False, chance=1.0)[12:]
    assert later[:5] == pytest.approx([0.8, 1.6, 3.2, 6.4, 12.8])
    assert later[-1] == LONGEST_DELAY
    assert max(later) == LONGEST_DELAY


def test_a_full_server_is_asked_at_most_once_a_second():
    for failures in (1, 2, 50):
        for chance in (0.0, 1.0):
            delay = retry_delay(
                failures, 0.0, waited_for=True, sqlstate=TOO_MANY_CONNECTIONS, random=chance
            )
            assert 1.0 <= delay <= 1.1


def test_a_lifetime_is_shortened_by_up_to_a_tenth_so_that_not_all_retire_at_once():
    assert retire_at(100.0, 3600.0, 0.0) == 3700.0
    assert retire_at(100.0, 3600.0, 1.0) == 3340.0
    assert retire_at(100.0, float("inf"), 0.5) == float("inf")


# -- a whole outage


class Outage:
    """A machine whose server is down until `back`; connects fail and succeed at once."""

    def __init__(self, back, *, waiters, seed=0, **limits):
        orphans: list[SlotRef] = []
        self.machine = Machine(
            Limits(**limits), orphans=orphans.append, random=random.Random(seed).random
        )
        self.back = back
        self.connects: list[float] = []
        self.waiters = [Waiter(0, list) for _ in range(waiters)]
        self.alarm = float("inf")
        self.carry_out(self.machine.open(0.0), 0.0)
        for waiter in self.waiters:
            self.carry_out(self.machine.queue_up(waiter, 0.0), 0.0)

    def carry_out(self, orders, now):
        for order in orders:
            if isinstance(order, TickAt):
                self.alarm = min(self.alarm, order.when)
            elif isinstance(order, Open):
                self.connects.append(now)
                self.carry_out(self.answer(order.slot, now), now)

    def answer(self, slot, now):
        if now < self.back:
            return self.machine.open_failed(slot, "refused", now, heals=True, sqlstate=None)
        return self.machine.opened(slot, object(), now)

    def run(self, until):
        while self.alarm <= until:
            now, self.alarm = self.alarm, float("inf")
            self.carry_out(self.machine.tick(now), now)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("waiters", [1, 20, 500])
def test_an_outage_of_20_s_costs_the_server_three_connects_a_second_however_many_wait(
    seed, waiters
):
    outage = Outage(1e9, waiters=waiters, seed=seed)
    outage.run(20.0)
    assert 40 <= len(outage.connects) <= 2.8 * 20 - 5, "room for those that diagnose"


@pytest.mark.parametrize("back", [0.01, 0.3, 1.0, 2.5, 17.0, 60.0, 600.0, 3600.0])
def test_once_the_server_is_back_somebody_who_waits_has_a_connection_within_half_a_second(back):
    for seed in range(5):
        outage = Outage(back, waiters=20, seed=seed, max_size=3)
        outage.run(back + 0.5)
        served = [waiter for waiter in outage.waiters if waiter.slot is not None]
        assert len(served) == 3, "as many as there can be, not only the one that was probed with"
        assert outage.connects[-1] - back < 0.5


def test_who_comes_late_in_an_outage_does_not_pay_for_the_long_delay_of_an_idle_pool():
    outage = Outage(1000.0, waiters=0, min_size=1)
    outage.run(1000.0)
    waiter = Waiter(0, list)
    outage.carry_out(outage.machine.queue_up(waiter, 1000.0), 1000.0)
    outage.run(1000.5)
    assert waiter.slot is not None


def test_nobody_waiting_costs_the_server_two_connects_a_minute():
    outage = Outage(1e9, waiters=0, min_size=1)
    outage.run(60.0)
    before = len(outage.connects)
    outage.run(660.0)
    assert len(outage.connects) - before <= 10 * 60 / (0.9 * LONGEST_DELAY) + 1


def test_a_pool_without_min_size_asks_a_server_that_is_down_nothing_while_nobody_waits():
    outage = Outage(1e9, waiters=1, min_size=0)
    outage.machine.give_up(outage.waiters[0], 0.01, timed_out=True)
    before = len(outage.connects)
    outage.run(3600.0)
    assert len(outage.connects) == before


# -- figures


def test_a_quantile_of_waits_counts_those_who_did_not_wait():
    tally = Tally()
    for _ in range(10):
        tally.wait_ended(0.9, served=True)
    assert wait_quantile(0.50, 1000, tally.waits) == 0.0
    assert wait_quantile(0.98, 1000, tally.waits) == 0.0
    assert wait_quantile(0.995, 1000, tally.waits) == 1.0
    assert wait_quantile(0.50, 10, tally.waits) == 1.0


def test_a_quantile_is_at_most_a_factor_of_two_too_high_and_never_too_low():
    chance = random.Random(7)
    waits = sorted(chance.expovariate(10.0) for _ in range(1000))
    tally = Tally()
    for seconds in waits:
        tally.wait_ended(seconds, served=True)
    for share in (0.5, 0.9, 0.99):
        true = waits[int(share * 1000) - 1]
        assert true <= wait_quantile(share, 1000, tally.waits) <= 2 * true
    assert tally.longest_wait == waits[-1]
    assert tally.waited_seconds == pytest.approx(sum(waits))


def test_waits_off_both_ends_of_the_histogram_are_counted():
    tally = Tally()
    assert wait_quantile(0.99, 0, tally.waits) == 0.0
    tally.wait_ended(0.0, served=True)
    assert wait_quantile(0.99, 1, tally.waits) == WAIT_EDGES[0]
    tally.wait_ended(1e6, served=True)
    assert wait_quantile(0.99, 2, tally.waits) == float("inf")


def test_stats_tell_what_happened():
    outage = Outage(1.0, waiters=3, max_size=2, min_size=0)
    outage.run(3.0)
    stats = snapshot(outage.machine, "shop", 3.0)
    assert (stats.name, stats.state, stats.min_size, stats.max_size) == ("shop", "open", 0, 2)
    assert (stats.in_use, stats.size, stats.waiting) == (2, 2, 1)
    assert stats.longest_waiting == 3.0
    assert stats.open_failures == len(outage.connects) - 2
    assert (stats.opened, stats.queued, stats.borrows) == (2, 2, 0)
    assert 1.0 <= outage.machine.tally.longest_wait <= 1.5
    assert stats.longest_wait == 3.0  # of the one that still waits
    outage.machine.give_up(outage.waiters[2], 3.0, timed_out=True)
    first, outage.waiters[0].slot = outage.waiters[0].slot, None
    assert first is not None
    outage.machine.put(first)
    del first
    stats = snapshot(outage.machine, "shop", 3.0)
    assert (stats.timeouts, stats.borrows, stats.idle, stats.in_use) == (1, 1, 1, 1)
    assert (stats.queued, stats.longest_wait) == (3, 3.0)  # it waited, though in vain
    outage.carry_out(outage.machine.drain(4.0), 4.0)
    assert snapshot(outage.machine, "shop", 4.0).generation == 1
