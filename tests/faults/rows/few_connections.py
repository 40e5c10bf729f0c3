"""Fifty borrowers on five connections: everybody waits about as long as everybody else.

*Overtaken* is who is served after somebody that asked later: later by more than a hold, on both ends, since
neither the moment in which a thread joins the queue nor the one in which it wakes can be seen from here.
"""

from __future__ import annotations

from statistics import median

TITLE = "50 borrowers on 5 connections"
BORROWERS, SIZE, HOLD = 50, 5, 0.02


async def play(w):
    pool = w.pool(w.server().conninfo(), min_size=SIZE, max_size=SIZE, timeout=30, name="few")
    await pool.open(wait=True)
    rounds = 25 if w.long else 6

    async def body(_number):
        return [await w.borrow(pool, hold=HOLD) for _ in range(rounds)]

    tries = await w.crowd(BORROWERS, body).tries()
    assert all(each.good for each in tries), [each.error for each in tries if not each.good][:3]
    # All ask at once in the first round, and in the last ones the queue runs dry.
    settled = tries[2 * BORROWERS : -BORROWERS]
    waits = [each.lent - each.asked for each in settled]
    ratio = max(waits) / median(waits)
    w.figure(
        "longest wait, of the median",
        f"{ratio:.3f}",
        goal="<= 1.1",
        met=ratio <= 1.1,
        holds=ratio < 20,
    )
    w.count("overtaken", overtaken(tries), exactly=0)


def overtaken(tries):
    """How many were served well after one that had asked well after them."""
    found = 0
    for each in tries:
        later = (other for other in tries if other.asked > each.asked + HOLD)
        found += any(other.lent < each.lent - HOLD for other in later)
    return found
