"""How many connections are opened when many borrowers come at once, or stay."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

import pytest

from penstock._machine.machine import DONE, LOOK_AGAIN, Machine, Verdict, Waiter
from penstock._machine.orders import Open, TickAt
from penstock._machine.pace import AT_ONCE, FIRST_WAVE, WAVE_EVERY
from penstock._machine.policy import Limits

if TYPE_CHECKING:
    from penstock._machine.slot import SlotRef


class Crowd:
    """A machine, borrowers who hold what they get for a time, a server whose connects take a time."""

    def __init__(self, *, connect, hold, fails=False, **limits):
        self.orphans: deque[SlotRef] = deque()
        self.machine = Machine(
            Limits(min_size=0, **limits), orphans=self.orphans.append, random=lambda: 0.5
        )
        self.connect, self.hold, self.fails = connect, hold, fails
        self.events: list = []  # time, number, what
        self.waiters: list[Waiter] = []
        self.number = 0
        self.now = 0.0
        self.connects: list[float] = []
        self.served: list[float] = []
        self.most = 0
        self.stay = float("inf")  # until then borrowers come again
        self.ticks = 0
        self.machine.open(0.0)

    def at(self, seconds, what, *given):
        self.number += 1
        heapq.heappush(self.events, (self.now + seconds, self.number, what, given))

    def carry_out(self, orders):
        for order in orders:
            if isinstance(order, Open):
                self.connects.append(self.now)
                self.at(0.001 if self.fails else self.connect, self.opened, order.slot)
            elif isinstance(order, TickAt):
                self.at(max(0.0, order.when - self.now), self.tick)
        self.most = max(self.most, len(self.machine.opening))

    def tick(self):
        self.ticks += 1
        self.carry_out(self.machine.tick(self.now))

    def opened(self, slot):
        if self.fails:
            self.carry_out(
                self.machine.open_failed(slot, "cut", self.now, heals=True, sqlstate=None)
            )
        else:
            self.carry_out(self.machine.opened(slot, object(), self.now))

    def come(self, hold=None):
        slot = self.machine.take(self.now, 0)
        if slot is not None:
            self.lend(slot, hold)
            return
        waiter = Waiter(0, lambda: self.at(0.0, self.woken, waiter, hold))
        self.waiters.append(waiter)  # the queue itself holds nobody
        self.carry_out(self.machine.queue_up(waiter, self.now))

    def woken(self, waiter, hold):
        slot, waiter.slot = waiter.slot, None
        if slot is not None:
            self.lend(slot, hold)

    def lend(self, slot, hold):
        self.served.append(self.now)
        self.at(self.hold if hold is None else hold, self.give_back, slot, hold)

    def give_back(self, slot, hold):
        answer = self.machine.put(slot)
        if answer == LOOK_AGAIN:
            self.carry_out(self.machine.look_again(self.now))
        elif answer != DONE:
            self.carry_out(self.machine.returned(slot, self.now, Verdict.CLEAN))
        if self.stay != float("inf") and self.now < self.stay:
            self.come(hold)

    def run(self, until):
        while self.events and self.events[0][0] <= until:
            self.now, _, what, given = heapq.heappop(self.events)
            what(*given)
        self.now = until


def stampede(number, **options):
    crowd = Crowd(**options)
    for _ in range(number):
        crowd.come()
    crowd.run(60.0)
    assert len(crowd.served) == number
    return crowd


def test_a_burst_of_short_work_opens_no_more_than_its_first_waves():
    crowd = stampede(200, connect=0.2, hold=0.001, max_size=20)
    assert len(crowd.connects) == AT_ONCE
    assert crowd.served[-1] < 0.2 + 200 * 0.001 / FIRST_WAVE


def test_fast_connects_are_as_many_as_were_of_use():
    crowd = stampede(20, connect=0.003, hold=0.0001, max_size=20)
    assert len(crowd.connects) == FIRST_WAVE


@pytest.mark.parametrize("hold", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("size", [20, 50])
def test_long_work_has_all_connections_soon(hold, size):
    crowd = stampede(200, connect=0.2, hold=hold, max_size=size)
    assert len(crowd.connects) == size
    # 16 of 50 at a time, as the keeper has them: the second third begins a quarter of a connect late.
    assert crowd.connects[size - 1] <= 0.25 + 0.2 * ((size - 1) // AT_ONCE) + 0.05


def test_never_more_are_under_way_than_the_keeper_opens_at_once():
    assert stampede(500, connect=0.2, hold=0.5, max_size=100).most == AT_ONCE


def test_the_waves_of_a_slow_connect_are_all_on_their_way_within_forty_milliseconds():
    crowd = stampede(200, connect=0.2, hold=0.001, max_size=20)
    assert crowd.connects[FIRST_WAVE - 1] == 0.0
    assert crowd.connects[-1] == pytest.approx(3 * WAVE_EVERY)


@pytest.mark.parametrize("connect", [0.003, 0.2])
@pytest.mark.parametrize("hold", [0.0005, 0.005, 0.05])
def test_those_who_come_again_and_again_have_all_connections_soon(connect, hold):
    crowd = Crowd(connect=connect, hold=hold, max_size=20)
    crowd.stay = 4 * connect + 0.1
    for _ in range(100):
        crowd.come()
    crowd.run(crowd.stay)
    assert len(crowd.machine.refs) == 20


@pytest.mark.parametrize("kept", [1, 3, 15])
def test_nobody_waits_for_ever_behind_those_who_keep_what_they_have(kept):
    crowd = Crowd(connect=0.2, hold=0.0001, max_size=50)
    for number in range(40):
        crowd.come(hold=1000.0 if number < kept or number >= 20 else None)
    crowd.run(1.5)
    assert len(crowd.served) == 40, "each has a connection: there is room for all"


def test_a_server_that_cuts_every_connect_hears_of_one_wave_and_not_of_each_who_waits():
    crowd = Crowd(connect=0.2, hold=0.001, fails=True, max_size=50)
    for _ in range(50):
        crowd.come()
    crowd.run(0.04)
    assert len(crowd.connects) == FIRST_WAVE


def test_who_is_alone_has_his_connection_opened_at_once():
    crowd = Crowd(connect=0.2, hold=10.0, max_size=5)
    for number in range(5):
        crowd.run(float(number))
        crowd.come()
        assert crowd.connects[-1] == float(number)


def test_being_held_back_wakes_the_keeper_a_few_times_and_not_at_each_return():
    crowd = stampede(200, connect=0.2, hold=0.001, max_size=20)
    assert crowd.ticks < 20


def test_a_connect_that_was_slow_once_holds_nobody_back_later():
    crowd = Crowd(connect=6.0, hold=4.0, max_size=10)
    crowd.come(hold=0.0)
    crowd.run(12.0)  # those that were tried beside it are there, too
    crowd.connect = 0.005
    for number in range(10):
        crowd.run(12.0 + 0.001 * number)
        crowd.come()
    crowd.run(12.5)
    assert len(crowd.served) == 11, "the server answers quickly again, and there is room for all"
