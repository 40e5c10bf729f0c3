"""An opening whose worker does not come back: its right, what it brings later, and how often another one is begun."""

from __future__ import annotations

import pytest

from penstock._machine.orders import Close, Open, TakeBack, TickAt
from penstock._machine.progress import BRIEF_SECONDS, CONNECT_SECONDS, GRACE
from penstock._machine.slot import Reason
from tests.machine.mute import Mute

NEVER = float("inf")


class Token(Mute):
    """A token service that says nothing until `heals`: each call before that never ends."""

    def __init__(self, heals, **limits):
        self.out: list = []  # the slots of workers that have not come back
        self.closed: list = []
        super().__init__(heals, **limits)

    def carry_out(self, orders):
        for order in orders:
            if isinstance(order, TakeBack):
                super().carry_out(self.machine.take_back(order.slot, "hangs", self.now))
            elif isinstance(order, Close):
                self.closed.append((order.reason, order.discard))
                super().carry_out(self.machine.closed(order.slot, order.reason, self.now))
        super().carry_out([each for each in orders if isinstance(each, Open | TickAt)])

    def begin(self, slot):
        if self.now >= self.heals:
            super().begin(slot)
            return
        self.begun.append(self.now)
        self.out.append(slot)

    def comes_late(self, slot):
        self.out.remove(slot)
        self.carry_out(self.machine.opened(slot, object(), self.now))


@pytest.mark.parametrize("max_size", [1, 2, 4, 10])
@pytest.mark.parametrize("borrowers", [1, 6])
@pytest.mark.parametrize("heals", [2.0, 20.0, 60.0])
def test_a_pool_serves_again_soon_after_what_hung_answers_new_calls(max_size, borrowers, heals):
    token = Token(heals, max_size=max_size)
    token.come(borrowers)
    token.run(heals + 30.0)
    assert len(token.served) == min(max_size, borrowers)
    longest = CONNECT_SECONDS if max_size == 1 else BRIEF_SECONDS
    assert token.served[0] - heals <= longest + GRACE + heals / 7 + 1.0


def test_an_opening_has_its_right_for_as_long_as_a_connect_may_take():
    token = Token(NEVER, min_size=1, max_size=8)
    token.run(CONNECT_SECONDS + GRACE - 0.01)
    assert len(token.machine.refs) == 1
    token.run(CONNECT_SECONDS + GRACE + 0.04)
    assert token.machine.refs == {}
    assert token.machine.outage is not None
    assert token.machine.outage.error == "hangs"
    assert token.machine.tally.open_failures == 1


def test_a_worker_that_comes_to_its_next_part_has_the_time_of_that():
    token = Token(NEVER, min_size=1, max_size=8)
    token.run(9.0)
    token.out[0].progress.comes_to("configure=f", 9.0, 5.0)
    token.run(13.0)
    assert len(token.machine.refs) == 1
    token.run(9.0 + 5.0 + GRACE + 0.1)
    assert token.machine.outage is not None


def test_what_comes_after_its_right_was_taken_back_is_closed_politely_and_never_lent():
    token = Token(NEVER, min_size=0, max_size=4)
    token.come()
    token.run(CONNECT_SECONDS + 2.0)
    assert token.machine.outage is not None
    first = token.out[0]
    assert first.progress.taken_back
    token.comes_late(first)
    assert token.closed == [(Reason.LATE, False)]
    assert token.served == []
    assert token.machine.tally.opened == 0


def test_calls_that_hang_are_begun_ever_more_rarely():
    token = Token(NEVER, max_size=10)
    token.come(30)
    hang = []
    for until in (20.0, 60.0, 600.0, 3600.0):
        token.run(until)
        hang.append(len(token.begun))
    assert hang[0] <= 20
    assert hang[1] <= 30
    assert hang[2] <= 70
    assert hang[3] <= 150
    assert hang[3] - hang[2] > 40, "it never gives up"


def test_a_call_that_hangs_for_good_slows_nobody_down_once_others_succeed():
    token = Token(1.0, max_size=8)
    token.come()
    token.run(30.0)
    assert len(token.served) == 1
    assert len(token.machine.hanging) >= 1
    begun = len(token.begun)
    token.come(4)
    token.run(30.1)
    assert len(token.served) == 5
    assert len(token.begun) - begun == 4


def test_calls_that_fail_again_are_tried_as_in_any_outage_whatever_hung_before():
    token = Token(30.0, max_size=4)
    token.come(2)
    token.falls = 60.0  # then it refuses
    token.run(45.0)
    begun = len(token.begun)
    token.run(55.0)
    assert 15 <= len(token.begun) - begun <= 25, "two a second, as while anybody waits"


def test_a_worker_that_comes_back_brings_the_next_attempt_forward():
    token = Token(NEVER, max_size=4)
    token.come(2)
    token.run(300.0)
    slow = token.machine.hanging.next_at() - token.machine.hanging.begun_at
    assert slow > 5.0
    for slot in [each for each in token.out if each.progress.taken_back]:
        token.out.remove(slot)
        token.carry_out(token.machine.failed_late(slot, token.now))
    assert len(token.machine.hanging) == 0
    assert token.machine.hanging.next_at() < token.now


def test_a_closed_or_drained_pool_has_its_rights_back_too():
    for verb in ("close", "drain"):
        token = Token(NEVER, min_size=1, max_size=2)
        token.run(1.0)
        token.carry_out(getattr(token.machine, verb)(token.now))
        token.run(1.0 + CONNECT_SECONDS + 1.0)
        assert not token.out[0].ref or token.out[0].ref.serial not in token.machine.refs
        assert token.out[0].progress.taken_back


def test_a_lost_order_to_take_a_right_back_is_given_again():
    token = Token(NEVER, min_size=1, max_size=2)
    token.run(CONNECT_SECONDS)
    token.now = CONNECT_SECONDS + GRACE
    orders = token.machine.tick(token.now)
    assert any(isinstance(order, TakeBack) for order in orders)
    when = min(order.when for order in orders if isinstance(order, TickAt))
    again = token.machine.tick(when)
    assert any(isinstance(order, TakeBack) for order in again)


@pytest.mark.parametrize("max_size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("heals", [0.5, 1.0, 1.5, 2.5])
def test_a_small_pool_that_met_a_silent_server_at_boot_is_served_three_seconds_after(
    max_size, heals
):
    mute = Mute(heals, max_size=max_size)
    mute.come(8)
    mute.run(heals + BRIEF_SECONDS + 0.2)
    assert mute.served


@pytest.mark.parametrize("max_size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("heals", [7.0, 25.0, 61.0])
def test_nor_later_does_it_take_longer(max_size, heals):
    mute = Mute(heals, max_size=max_size)
    mute.come(8)
    mute.run(heals + BRIEF_SECONDS + 0.2)
    assert mute.served


@pytest.mark.parametrize("max_size", [1, 2, 4])
def test_a_small_pool_reaches_a_server_that_takes_five_seconds_all_the_same(max_size):
    mute = Mute(0.0, takes=5.0, max_size=max_size)
    mute.come(2)
    mute.run(30.0)
    assert mute.served
