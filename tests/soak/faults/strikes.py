"""Borrowers who are struck anywhere between their borrow and their return: signals, kills, cancellations.

Whoever is struck knows nothing of his work's outcome; nothing may be lost of the pool, and nobody else may notice.
"""

from __future__ import annotations

import asyncio
import signal

from tests.soak.work import any_piece

#: Strikes of one step; within so many seconds of the borrow's begin. A piece of work takes about 2 ms.
STRIKES = 40
LATEST = 0.008


class Struck(KeyboardInterrupt):
    """What the signal handler raises."""


async def interrupted_by_signals(w, b):
    """KeyboardInterrupt in the main thread, from a timer's real signal."""
    w.tell(f"{STRIKES} KeyboardInterrupts")
    armed = [False]

    def strike(_signum, _frame):
        if armed[0]:
            armed[0] = False
            raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    times = 0
    try:
        for _ in range(STRIKES):
            times += await strike_one(w, w.borrower(), armed)
    finally:
        armed[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    w.tell(f"{times} struck")


async def strike_one(w, own, armed):
    try:
        armed[0] = True
        signal.setitimer(signal.ITIMER_REAL, own.rng.uniform(0.0001, LATEST))
        await any_piece(w, own)
        armed[0] = False
    except Struck:
        return 1
    return 0


async def cancelled(w, b):
    """Tasks, cancelled once or twice, or by a timeout around them."""
    w.tell(f"{STRIKES} cancellations")

    async def within(own):
        async with asyncio.timeout(own.rng.uniform(0, LATEST)):
            await any_piece(w, own)

    for _ in range(STRIKES // 4):
        flights = []
        for _ in range(4):
            own = w.borrower()
            timed = own.rng.random() < 0.3
            flights.append(w.spawn(within(own) if timed else any_piece(w, own)))
            for _ in range(0 if timed else own.rng.choice((1, 1, 2))):
                loop = asyncio.get_running_loop()
                loop.call_later(own.rng.uniform(0, LATEST), flights[-1].task.cancel)
        await w.stage.until(lambda own=flights: all(each.done for each in own), "cancelled tasks")
        w.are_ends(flights, asyncio.CancelledError, TimeoutError)


async def killed_greenlets(w, b):
    """`kill()` and `gevent.Timeout`."""
    import gevent

    from tests.contract.runtimes import driven

    w.tell(f"{STRIKES} greenlets killed or timed out")

    def within(own):
        with gevent.Timeout(own.rng.uniform(0, LATEST), False):
            driven(any_piece(w, own))

    for _ in range(STRIKES // 4):
        group = []
        for _ in range(4):
            own = w.borrower()
            if own.rng.random() < 0.3:
                group.append(gevent.spawn(within, own))
            else:
                group.append(gevent.spawn(driven, any_piece(w, own)))
                gevent.spawn_later(own.rng.uniform(0, LATEST), group[-1].kill, block=False)
        gevent.joinall(group, timeout=60)
        for each in group:
            if not each.dead:
                w.find("a greenlet that was killed does not end")
            elif each.exception is not None:
                w.find(f"a greenlet ended with {each.exception!r}")


ALL = (interrupted_by_signals, cancelled, killed_greenlets)
ONLY = {interrupted_by_signals: "threads", cancelled: "asyncio", killed_greenlets: "gevent"}
HARMLESS = ALL
