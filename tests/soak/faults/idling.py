"""Faults that strike while nobody borrows: whoever borrows afterwards does not notice."""

from __future__ import annotations

from tests.soak.work import ask
from tests.soak.world import ROLE

QUIET = True


async def idle(w, b):
    """Long enough for `max_idle` and `max_lifetime` of some eras."""
    w.tell("nobody borrows for a while")
    await w.pause(b.rng.uniform(0.3, 1.0))
    await no_error_follows(w, b)


async def restarted_while_idle(w, b):
    w.tell("restart, while all is idle")
    await struck_idle(w, b, lambda: w.aside(w.server.restart))


async def terminated_while_idle(w, b):
    w.tell("all sessions are terminated, while all is idle")
    # It waits until they have ended: who borrows one of them before gets its error, which nobody can help.
    query = (
        f"select pg_terminate_backend(pid, 10000) from pg_stat_activity where usename = '{ROLE}'"
    )
    await struck_idle(w, b, lambda: w.execute(query))


async def cut_while_idle(w, b):
    how = b.rng.choice(("rst", "fin"))
    w.tell(f"all connections are cut with {how.upper()}, while all is idle")
    await struck_idle(w, b, lambda: w.aside(lambda: w.proxy.cut(how)))


async def struck_idle(w, b, strike):
    """Once the pool has heard of the end of all that it had, nobody gets an error."""
    await no_error_follows(w, b)
    if why := await w.all_at_rest():
        w.find(why)
    opened = w.pool.stats().opened
    await strike()
    await w.stage.until(
        lambda: sum(w.pool.stats().closed.values()) >= opened, "all ends are heard of"
    )
    await no_error_follows(w, b)


async def no_error_follows(w, b):
    for _ in range(20):
        try:
            await ask(w, b)
        except Exception as error:
            w.find(f"an error that nobody may get, since the pool was idle: {error!r}")
            return


ALL = (idle, restarted_while_idle, terminated_while_idle, cut_while_idle)
