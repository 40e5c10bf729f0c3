"""A machine and a server that refuses, says nothing, or answers: what is begun, when, and who is served.

One job: play the machine's orders against such a server on a made-up clock, and count.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from penstock._machine.machine import DONE, LOOK_AGAIN, Machine, Verdict, Waiter
from penstock._machine.orders import Open, TickAt
from penstock._machine.policy import Limits

if TYPE_CHECKING:
    from penstock._machine.slot import SlotRef

#: What the runtimes give a connect, and one that is asked for beside silent ones.
LONG, BRIEF = 10.0, 3.0


class Mute:
    """A machine and a server that takes connects and says nothing until `heals`, then answers new ones.

    Before `falls` it refuses. Borrowers who are served keep what they have.
    """

    def __init__(self, heals, *, falls=0.0, takes=0.005, long=LONG, **limits):
        self.orphans: deque[SlotRef] = deque()
        self.machine = Machine(
            Limits(**{"min_size": 0, **limits}), orphans=self.orphans.append, random=lambda: 0.5
        )
        self.heals, self.falls, self.takes, self.long = heals, falls, takes, long
        self.brief = BRIEF
        self.heals_said = True
        self.now = 0.0
        self.number = 0
        self.events: list = []
        self.alarm = float("inf")
        self.begun: list[float] = []
        self.served: list[float] = []
        self.silent = self.most_silent = self.most = self.ticks = 0
        self.waiters: list[Waiter] = []
        self.lent: list = []
        self.carry_out(self.machine.open(0.0))

    def at(self, when, what, *given):
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what, given))

    def carry_out(self, orders):
        for order in orders:
            if isinstance(order, Open):
                self.begin(order.slot)
            elif isinstance(order, TickAt):
                self.alarm = min(self.alarm, max(self.now, order.when))  # as the keeper does
        self.most = max(self.most, len(self.machine.refs))
        assert len(self.machine.refs) <= self.machine.limits.max_size

    def begin(self, slot):
        self.begun.append(self.now)
        if self.now < self.falls:
            self.at(self.now + 0.001, self.ends, slot, "refused", False)
        elif self.now < self.heals or (slot.brief and self.takes > self.brief):
            self.silent += 1
            self.most_silent = max(self.most_silent, self.silent)
            seconds = self.brief if slot.brief else self.long
            self.at(self.now + seconds, self.ends, slot, "timed out", True)
        else:
            self.at(self.now + self.takes, self.ends, slot, None, False)

    def ends(self, slot, error, silent):
        self.silent -= silent
        if error is None:
            self.carry_out(self.machine.opened(slot, object(), self.now))
        else:
            self.carry_out(
                self.machine.open_failed(
                    slot, error, self.now, heals=self.heals_said, sqlstate=None
                )
            )

    def tick(self):
        self.ticks += 1
        self.alarm = float("inf")
        self.carry_out(self.machine.tick(self.now))

    def come(self, count=1):
        for _ in range(count):
            self.come_one()

    def come_one(self):
        waiter = Waiter(0, lambda: self.at(self.now, self.woken, waiter))
        self.waiters.append(waiter)  # the queue itself holds nobody
        self.carry_out(self.machine.queue_up(waiter, self.now))

    def woken(self, waiter):
        slot, waiter.slot = waiter.slot, None
        if slot is not None:
            self.served.append(self.now)
            self.lent.append(slot)

    def give_back(self):
        slot = self.lent.pop()
        answer = self.machine.put(slot)
        if answer == LOOK_AGAIN:
            self.carry_out(self.machine.look_again(self.now))
        elif answer != DONE:
            self.carry_out(self.machine.returned(slot, self.now, Verdict.CLEAN))

    def run(self, until):
        while (due := min([self.alarm, *(event[0] for event in self.events[:1])])) <= until:
            self.now = due
            if due == self.alarm:
                self.tick()
            else:
                _, _, what, given = heapq.heappop(self.events)
                what(*given)
        self.now = until
