"""Every move of a slot, and that the machine makes no other."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest

from penstock._machine import machine as machine_module
from penstock._machine.machine import Machine, Refusal, Verdict, Waiter
from penstock._machine.orders import Close, Open, TickAt
from penstock._machine.policy import Limits
from penstock._machine.slot import LEGAL_MOVES, Move, Reason, Slot, SlotRef, SlotState
from tests.machine.walker import walk

DOCS = Path(__file__).parents[2] / "docs"
PAIRS = list(itertools.product(SlotState, Move))
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL_MOVES]


def slot_that_is(state):
    slot = Slot(generation=0, epoch=0, now=0.0)
    slot.state = state
    return slot


def content(slot):
    return {name: getattr(slot, name) for name in Slot.__slots__ if name != "__weakref__"}


def named(pair):
    return f"{pair[0].value}-{pair[1].value}"


# -- the table


@pytest.mark.parametrize("pair", LEGAL_MOVES, ids=named)
def test_a_legal_move_leads_where_the_table_says(pair):
    slot = slot_that_is(pair[0])
    slot.move(pair[1])
    assert slot.state is LEGAL_MOVES[pair]


@pytest.mark.parametrize("pair", ILLEGAL, ids=named)
def test_any_other_move_raises_and_changes_nothing(pair):
    slot = slot_that_is(pair[0])
    before = content(slot)
    with pytest.raises(AssertionError, match=f"{pair[0].value} cannot {pair[1].value}"):
        slot.move(pair[1])
    assert content(slot) == before


def test_every_state_is_reached_and_every_move_is_made():
    assert {SlotState.OPENING, *LEGAL_MOVES.values()} == set(SlotState)
    assert {move for _, move in LEGAL_MOVES} == set(Move)


def test_from_every_state_there_is_a_way_to_the_end():
    ways = {SlotState.GONE}
    for _ in SlotState:
        ways |= {state for (state, _), target in LEGAL_MOVES.items() if target in ways}
    assert ways == set(SlotState)


def test_nothing_leads_out_of_the_end():
    assert all(state is not SlotState.GONE for state, _ in LEGAL_MOVES)


# -- the machine moves along it

STEPS = {(state, target) for (state, _), target in LEGAL_MOVES.items()}


class Recording(Slot):
    """A slot that notes how its state changes, also where the hot moves store it directly."""

    __slots__ = ()
    seen: set[tuple[SlotState, SlotState]] = set()  # noqa: RUF012  shared on purpose

    def __setattr__(self, name, value):
        if name == "state" and hasattr(self, "state"):
            Recording.seen.add((self.state, value))
        super().__setattr__(name, value)


def test_the_machine_moves_slots_along_the_table_only_and_along_all_of_it(monkeypatch):
    monkeypatch.setattr(machine_module, "Slot", Recording)
    Recording.seen.clear()
    for seed in range(300):
        walk(seed)
    # A slot made only to end a link, which nobody holds or wants any more, begins with its end.
    born_closing = {(SlotState.OPENING, SlotState.CLOSING)}
    assert Recording.seen - STEPS - born_closing == set()
    assert STEPS - Recording.seen - {(SlotState.IN_USE, SlotState.IN_USE)} == set()


# -- reasons


def machine_with(**limits):
    orphans: list[SlotRef] = []
    machine = Machine(Limits(**limits), orphans=orphans.append, random=lambda: 0.0)
    machine.open(0.0)
    return machine, orphans


def borrow_new(machine, owner=1):
    waiter = Waiter(owner, list)
    (order,) = [o for o in machine.queue_up(waiter, 0.0) if isinstance(o, Open)]
    machine.opened(order.slot, object(), 0.0)
    slot, waiter.slot = waiter.slot, None
    return slot


def reasons(orders):
    return [(order.reason, order.discard) for order in orders if isinstance(order, Close)]


def test_a_connection_given_back_broken_is_discarded_and_one_not_clean_as_well():
    machine, _ = machine_with(min_size=0)
    assert reasons(machine.returned(borrow_new(machine), 1.0, Verdict.BROKEN)) == [
        (Reason.BROKEN, True)
    ]
    assert reasons(machine.returned(borrow_new(machine), 1.0, Verdict.UNCLEAN)) == [
        (Reason.UNCLEAN, True)
    ]


def test_time_retires_and_shrinks_with_a_farewell():
    machine, _ = machine_with(min_size=0, max_lifetime=100.0, max_idle=30.0)
    machine.put(borrow_new(machine))
    assert reasons(machine.tick(29.0)) == []
    assert reasons(machine.tick(30.0)) == [(Reason.SHRUNK, False)]
    machine, _ = machine_with(min_size=0, max_lifetime=100.0)
    machine.put(borrow_new(machine))
    assert reasons(machine.tick(100.0)) == [(Reason.RETIRED, False)]


def test_drain_close_and_a_smaller_size_say_so():
    for said, reason in [
        (lambda machine: machine.drain(1.0), Reason.DRAINED),
        (lambda machine: machine.close(1.0), Reason.POOL_CLOSED),
        (lambda machine: machine.resize(0, 1, 1.0), Reason.SURPLUS),
    ]:
        machine, _ = machine_with(min_size=0, max_size=2)
        idle, in_use = borrow_new(machine), borrow_new(machine)
        machine.put(idle)
        assert reasons(said(machine)) == [(reason, False)]
        later = reasons(machine.returned(in_use, 2.0, Verdict.CLEAN))
        assert later == ([] if reason is Reason.SURPLUS else [(reason, False)])


def test_of_too_many_in_use_the_condemned_ones_end_when_they_come_back():
    machine, _ = machine_with(min_size=0, max_size=2)
    slots = [borrow_new(machine), borrow_new(machine)]
    assert reasons(machine.resize(0, 1, 1.0)) == []
    (condemned,) = [slot for slot in slots if slot.condemned]
    assert reasons(machine.returned(condemned, 2.0, Verdict.CLEAN)) == [(Reason.SURPLUS, False)]


def test_what_the_watcher_condemned_ends_at_once_when_idle_and_else_when_it_comes_back():
    machine, _ = machine_with(min_size=0, max_size=2)
    idle, in_use = borrow_new(machine), borrow_new(machine)
    machine.put(idle)
    for slot in (idle, in_use):
        slot.condemn(Reason.HUNG_UP)
    assert reasons(machine.hung_up(idle, 1.0)) == [(Reason.HUNG_UP, True)]
    assert reasons(machine.hung_up(in_use, 1.0)) == []
    assert reasons(machine.returned(in_use, 2.0, Verdict.CLEAN)) == [(Reason.HUNG_UP, True)]


def test_an_unanswered_ping_ends_a_connection_and_an_orphan_is_discarded():
    machine, orphans = machine_with(min_size=0, max_size=1, ping_after=10.0)
    machine.put(borrow_new(machine))
    assert machine.take(11.0, 1) is None
    waiter = Waiter(1, list)
    machine.queue_up(waiter, 11.0)
    assert waiter.slot is not None
    assert waiter.slot.state is SlotState.PINGING
    orders = machine.ping_failed(waiter.slot, waiter, 12.0)
    assert reasons(orders) == [(Reason.UNANSWERED, True)]

    machine, orphans = machine_with(min_size=0)
    slot = borrow_new(machine)
    del slot
    assert reasons(machine.bring_home(orphans[0], 1.0)) == [(Reason.ORPHANED, True)]


# -- refusals


def refusal_of(machine, owner=1, now=0.0, keeps=()):
    waiter = Waiter(owner, list)
    waiter.keeps = keeps
    assert not [o for o in machine.queue_up(waiter, now) if not isinstance(o, Open | TickAt)]
    return waiter.refusal, waiter


def test_a_pool_that_is_not_open_refuses():
    orphans: list[SlotRef] = []
    machine = Machine(Limits(), orphans=orphans.append, random=lambda: 0.0)
    assert refusal_of(machine)[0] is Refusal.CLOSED
    machine.open(0.0)
    refusal, waiter = refusal_of(machine)
    assert refusal is None
    machine.close(1.0)
    assert waiter.refusal is Refusal.CLOSED
    assert refusal_of(machine)[0] is Refusal.CLOSED


def test_more_than_max_waiting_are_refused_and_the_dead_do_not_count():
    machine, _ = machine_with(min_size=0, max_waiting=2)
    first, second = refusal_of(machine)[1], refusal_of(machine)[1]
    assert refusal_of(machine)[0] is Refusal.TOO_MANY
    del second
    assert refusal_of(machine)[0] is None
    assert first.refusal is None


def test_a_borrower_that_would_wait_for_itself_is_refused():
    machine, _ = machine_with(min_size=0, max_size=1)
    slot = borrow_new(machine, owner=7)
    assert refusal_of(machine, owner=8)[0] is None
    assert refusal_of(machine, owner=7, keeps=machine.held_by(7))[0] is Refusal.DEADLOCK
    slot.loose = True
    assert refusal_of(machine, owner=7, keeps=machine.held_by(7))[0] is None


def test_a_borrower_whose_connection_another_thread_may_give_back_waits():
    machine, _ = machine_with(min_size=0, max_size=1)
    slot = borrow_new(machine, owner=7)
    assert refusal_of(machine, owner=7)[0] is None
    assert slot.state is SlotState.IN_USE


def test_where_one_of_those_who_wait_may_be_given_back_for_nobody_is_in_a_deadlock():
    machine, _ = machine_with(min_size=0, max_size=2)
    held = [borrow_new(machine, owner=owner) for owner in (7, 8)]
    first = refusal_of(machine, owner=7)[1]  # an executor's thread: the block ends in another one
    assert refusal_of(machine, owner=8, keeps=machine.held_by(8))[0] is None
    assert first.refusal is None
    assert all(slot.state is SlotState.IN_USE for slot in held)


def test_what_another_borrower_has_got_since_it_was_seen_is_no_deadlock():
    machine, _ = machine_with(min_size=0, max_size=1)
    slot = borrow_new(machine, owner=7)
    seen = machine.held_by(7)
    slot.holder = 9
    assert refusal_of(machine, owner=7, keeps=seen)[0] is None


def test_a_wrong_password_refuses_everybody_for_a_second_and_then_is_tried_again():
    machine, _ = machine_with(min_size=0)
    waiter = Waiter(1, list)
    (order,) = [o for o in machine.queue_up(waiter, 0.0) if isinstance(o, Open)]
    machine.open_failed(order.slot, "no", 0.0, heals=False, sqlstate="28P01")
    assert waiter.refusal is Refusal.UNREACHABLE
    assert refusal_of(machine, now=0.5)[0] is Refusal.UNREACHABLE
    assert refusal_of(machine, now=1.0)[0] is None


# -- the docs


def test_the_diagram_in_the_docs_is_up_to_date():
    spec = importlib.util.spec_from_file_location("draw_moves", DOCS / "draw_moves.py")
    assert spec is not None
    assert spec.loader is not None
    draw_moves = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_moves)
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    assert draw_moves.drawn(page) == page, "run: python docs/draw_moves.py"
