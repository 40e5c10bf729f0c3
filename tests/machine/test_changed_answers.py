"""What was refused may be another thing by now: a callable gives the password, a file was replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock._machine.machine import Machine, Refusal, Waiter
from penstock._machine.orders import Open, TickAt
from penstock._machine.policy import UNHEALABLE_DELAY, Limits

if TYPE_CHECKING:
    from penstock._machine.slot import SlotRef


class Source:
    """A machine whose server takes one word, and a callable that says one."""

    def __init__(self, *, says="old", wants="new", may_change=True, **limits):
        self.orphans: list[SlotRef] = []
        self.machine = Machine(
            Limits(min_size=0, **limits), orphans=self.orphans.append, random=lambda: 0.5
        )
        self.says, self.wants, self.may_change = says, wants, may_change
        self.tried = ""
        self.logins: list[float] = []
        self.questions: list[float] = []
        self.alarm = float("inf")
        self.now = 0.0
        self.machine.open(0.0)

    def carry_out(self, orders):
        for order in orders:
            if isinstance(order, TickAt):
                self.alarm = min(self.alarm, order.when)
            elif isinstance(order, Open):
                self.carry_out(self.answer(order))

    def answer(self, order):
        word = self.says() if callable(self.says) else self.says
        if order.if_changed:
            self.questions.append(self.now)
            if word == self.tried:
                return self.machine.unchanged(order.slot, self.now)
        self.tried = word
        self.logins.append(self.now)
        if word == self.wants:
            return self.machine.opened(order.slot, object(), self.now)
        return self.machine.open_failed(
            order.slot,
            "refused",
            self.now,
            heals=False,
            sqlstate="28P01",
            may_change=self.may_change and not order.if_changed,
        )

    def come(self):
        waiter = Waiter(0, list)
        self.carry_out(self.machine.queue_up(waiter, self.now))
        return waiter

    def run(self, until):
        while self.alarm <= until:
            self.now, self.alarm = max(self.now, self.alarm), float("inf")
            self.carry_out(self.machine.tick(self.now))
        self.now = until


def test_who_comes_after_the_new_password_is_there_is_served_and_not_refused():
    source = Source()
    assert source.come().refusal is Refusal.UNREACHABLE
    source.run(0.01)
    source.says = "new"
    waiter = source.come()
    assert waiter.refusal is None
    source.run(0.3)
    assert waiter.slot is not None
    assert waiter.refusal is None


def test_the_same_answer_again_is_a_refusal_without_a_login():
    source = Source()
    source.come()
    source.run(0.01)
    waiter = source.come()
    source.run(0.3)
    assert waiter.refusal is Refusal.UNREACHABLE
    assert (len(source.logins), len(source.questions)) == (1, 1)


def test_the_callable_is_asked_as_rarely_as_a_server_that_is_down_however_many_come():
    source = Source(max_size=50)
    waiters = []
    for step in range(1000):
        source.run(step / 100)
        waiters.append(source.come())
    assert len(source.logins) <= 10 / UNHEALABLE_DELAY + 1
    assert len(source.questions) <= 10 * 6
    assert all(each.refusal for each in waiters[:-30]), "nobody waits for longer than 0.2 s"


def test_answers_that_are_new_each_time_are_no_news():
    count = iter(range(10_000))
    source = Source(says=lambda: f"token {next(count)}")
    for step in range(1000):
        source.run(step / 100)
        source.come()
    assert len(source.logins) <= 2 * 10 / UNHEALABLE_DELAY + 2


def test_nobody_asking_asks_nothing():
    source = Source()
    source.come()
    source.run(60.0)
    assert (len(source.logins), source.questions) == (1, [])


@pytest.mark.parametrize("may_change", [False, True])
def test_what_cannot_change_is_refused_at_once(may_change):
    source = Source(may_change=may_change)
    source.come()
    source.run(0.01)
    assert (source.come().refusal is Refusal.UNREACHABLE) is not may_change


def test_connections_that_are_left_serve_who_waits_while_it_is_asked():
    source = Source(says="new")
    first = source.come()
    assert first.slot is not None
    source.wants = "newer"
    second = source.come()
    assert second.refusal is None
    source.run(0.5)
    assert len(source.questions) >= 2
    assert second.refusal is None
    source.says = "newer"
    source.run(0.8)
    assert second.slot is not None
