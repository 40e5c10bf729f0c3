"""The server's host says nothing any more: it acknowledges, or not even that.

Nothing breaks, so only a deadline can find it. What was not lent for `ping_after`, or belongs to a pool that has
become suspect, is pinged before it is lent; what is left of the borrower's time goes into a new connection. So
everybody has an answer within his timeout: a good connection where new ones work, an error where none do.
"""

from __future__ import annotations

from tests.faults.stage import now

from penstock import PenstockError, ServerUnavailable, StatementTimeout

TITLE = "frozen host, 16 borrowers with 16 idle connections"
SIZE = 16
PING_AFTER = 0.3
SLACK = 0.25  # seconds for a thread to be woken and to raise


async def play(w):
    timeout = 3.0 if w.long else 1.0
    await frozen(w, "not acknowledging, new ones work", timeout, new=False, silent=True)
    await frozen(w, "not acknowledging, new ones neither", timeout, new=True, silent=True)
    if not w.long:
        return
    await frozen(w, "acknowledging, new ones work", timeout, new=False)
    await frozen(w, "acknowledging, new ones neither", timeout, new=True)
    await frozen(w, "SIGSTOP", timeout, new=True, stops=True)
    await frozen(w, "suspect pool, new ones work", timeout, new=False, suspect=True)
    await frozen(w, "suspect pool, SIGSTOP", timeout, new=True, stops=True, suspect=True)
    await just_used(w)


async def frozen(w, what, timeout, *, new, silent=False, stops=False, suspect=False):
    server = w.fresh_server() if stops else w.server()
    proxy = w.proxy(server.port)
    ping_after = 30.0 if suspect else PING_AFTER
    pool = w.pool(
        server.conninfo(port=proxy.port),
        max_size=SIZE,
        timeout=timeout,
        ping_after=ping_after,
        name="frozen",
    )
    await all_open(w, pool)
    if suspect:
        # One that is opened afterwards would be above suspicion: there is none, it is above min_size.
        await w.borrow(pool, "select pg_terminate_backend(pg_backend_pid())")
        await w.until(lambda: pool.stats().size == SIZE - 1, "one is gone")
    else:
        await w.pause(2 * PING_AFTER)
    if stops:
        server.pause()
    elif silent:
        proxy.silence(new=new)
    else:
        proxy.hold(new=new)
    try:
        tries = await w.crowd(SIZE, lambda _number: w.borrow(pool, "select 1")).all()
    finally:
        if stops:
            server.resume()
        proxy.release()
    in_time = sum(each.took <= timeout + SLACK for each in tries)
    longest = max(each.took for each in tries)
    w.figure(
        f"{what}: answered within {timeout:g} s",
        f"{in_time} of {SIZE} ({longest:.2f} s)",
        goal=f"{SIZE} of {SIZE}",
        met=in_time == SIZE,
        holds=longest < timeout + 10,
    )
    told = sum(isinstance(each.error, PenstockError) for each in tries)
    served = sum(each.good for each in tries)
    if new:
        w.count(f"{what}: errors of the pool's", told, exactly=SIZE)
        says = sum(names(each.error, proxy.port) for each in tries)
        w.figure(
            f"{what}: say that the server is silent",
            f"{says} of {SIZE}",
            goal=f"{SIZE} of {SIZE}",
            met=says == SIZE,
        )
    else:
        w.figure(
            f"{what}: served",
            f"{served} of {SIZE}",
            goal=f"{SIZE} of {SIZE}",
            met=served == SIZE,
            holds=served + told == SIZE,  # where the machine is slow the time may not be enough
        )
    for each in tries:
        if each.error and not isinstance(each.error, PenstockError):
            print(f"{what}: {each.error!r}")
    await pool.close(timeout=1)


def names(error, port):
    """Whether it says that this server does not answer, and that it may again."""
    return isinstance(error, ServerUnavailable) and error.heals and f"port {port}" in str(error)


async def all_open(w, pool):
    """Sixteen idle connections, of which all but one are above min_size."""
    inside = []
    may_end = w.runtime.event()

    async def hold(number):
        async with pool.connection():
            inside.append(number)
            if len(inside) == SIZE:
                may_end.set()
            await w.runtime.wait_for(may_end)

    await w.crowd(SIZE, hold).all()
    await w.until(lambda: pool.stats().idle == SIZE, "all are idle")


async def just_used(w):
    """Lent a moment ago: no ping, and the first statement ends only where the user bounds it."""
    what = "used a moment ago, statement_timeout_client=1"
    for frozen_by in ("not acknowledging", "acknowledging", "SIGSTOP"):
        stops = frozen_by == "SIGSTOP"
        server = w.fresh_server() if stops else w.server()
        proxy = w.proxy(server.port)
        pool = w.pool(
            server.conninfo(port=proxy.port),
            max_size=SIZE,
            timeout=3.0,
            name="used",
            statement_timeout_client=1.0,
        )
        await all_open(w, pool)
        if stops:
            server.pause()
        elif frozen_by == "acknowledging":
            proxy.hold(new=False)
        else:
            proxy.silence(new=False)
        began = now()
        first = await w.borrow(pool, "select 1")
        w.seconds(f"{what}, {frozen_by}: the statement ends after", now() - began, at_most=1.25)
        says = isinstance(first.error, StatementTimeout)
        w.count(f"{what}, {frozen_by}: says so", int(says), exactly=1)
        tries = await w.crowd(SIZE, lambda _number, pool=pool: w.borrow(pool, "select 1")).all()
        good = sum(
            each.took <= 3.0 + SLACK
            and (isinstance(each.error, ServerUnavailable) if stops else each.good)
            for each in tries
        )
        w.figure(
            f"{what}, {frozen_by}: the pool is suspect, {SIZE} next "
            f"{'told' if stops else 'served'} within 3 s",
            f"{good} of {SIZE} ({max(each.took for each in tries):.2f} s)",
            goal=f"{SIZE} of {SIZE}",
            met=good == SIZE,
            holds=all(each.good or isinstance(each.error, PenstockError) for each in tries),
        )
        if stops:
            server.resume()
        proxy.release()
        await pool.close(timeout=1)
