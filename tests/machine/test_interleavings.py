"""The real machine in real threads, one opcode at a time: `pytest --seeds=1000` for more."""

from __future__ import annotations

import pytest

from penstock._machine.machine import DONE, LOOK_AGAIN, SLOWLY, Machine
from penstock._machine.slot import Slot, SlotState
from penstock._pool.sync.lease import Lease, PgconnLease
from tests.machine.pond import WATCHED, run_schedule


def test_no_connection_is_lent_twice_and_nobody_is_forgotten_in_any_schedule(seeds):
    served = timed_out = 0
    for seed in seeds:
        try:
            pond = run_schedule(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")
        served += pond.served
        timed_out += pond.timed_out
    print(f"{len(seeds)} schedules from seed {seeds[0]}: {served} served, {timed_out} timed out")
    assert served > len(seeds)
    assert timed_out > 0


@pytest.mark.parametrize("lease", [Lease, PgconnLease])
@pytest.mark.parametrize("crowded", [False, True])
def test_the_leases_that_users_hold_are_right_in_any_schedule(seeds, lease, crowded):
    for seed in seeds:
        run_schedule(seed, lease=lease, crowded=crowded)


def test_where_there_is_no_global_lock_a_kept_lease_serves_one_at_a_time_in_any_schedule(seeds):
    served = refused = 0
    for seed in seeds:
        pond = run_schedule(seed, shares=True)
        served += pond.served
        refused += pond.refused
    assert served > len(seeds)
    assert refused > len(seeds) // 10


def put_with_two_answers(machine: Machine, slot: Slot) -> int:
    """What penstock's `put` must not be: the caller learns what happened by looking at the slot."""
    if machine.waiters or slot.epoch != machine.epoch:
        return SLOWLY
    assert slot.ref is not None
    slot.ref.borrows += 1
    slot.state = SlotState.IDLE
    machine.idle.append(slot)
    if machine.waiters:
        # Not ours any more: it may be in use again, and then this takes it from its borrower.
        return SLOWLY if slot.state is SlotState.IN_USE else LOOK_AGAIN
    return DONE


def put_that_does_not_look_again(machine: Machine, slot: Slot) -> int:
    if machine.waiters or slot.epoch != machine.epoch:
        return SLOWLY
    assert slot.ref is not None
    slot.ref.borrows += 1
    slot.state = SlotState.IDLE
    machine.idle.append(slot)
    return DONE


def first_failure(put, start=0, limit=2000):
    """The first schedule that goes wrong. A later start only saves the time to get there."""
    for seed in range(start, start + limit):
        try:
            run_schedule(seed, put=put, crowded=True, watched=(*WATCHED, __file__))
        except AssertionError as error:
            print(f"found at seed {seed}: {error}")
            return error
    return None


def test_the_interleaver_finds_the_double_lend_when_put_is_weakened():
    assert first_failure(put_with_two_answers, start=800) is not None


def test_the_interleaver_finds_the_forgotten_waiter_when_put_does_not_look_again():
    assert first_failure(put_that_does_not_look_again) is not None


def test_the_same_crowd_is_served_by_the_real_put(seeds):
    for seed in seeds[: len(seeds) // 2]:
        run_schedule(seed, crowded=True)
