"""What befalls the server, its sessions, and the role that logs in."""

from __future__ import annotations

from tests.soak.world import ROLE


async def stopped(w, b):
    mode = b.rng.choice(("fast", "immediate"))
    w.tell(f"the server is stopped ({mode})")
    await w.aside(lambda: w.server.stop(mode))
    await w.pause(b.rng.uniform(0.0, 1.2))
    await w.aside(w.server.start)
    w.tell("it accepts again")


async def killed(w, b):
    w.tell("kill -9 of every process of the server")
    await w.aside(w.server.kill)
    await w.pause(b.rng.uniform(0.0, 1.2))
    await w.aside(w.server.start)
    w.tell("it accepts again")


async def restarted_at_once(w, b):
    w.tell("restart, immediate")
    await w.aside(lambda: w.server.restart("immediate"))
    w.tell("it accepts again")


async def suspended(w, b):
    w.tell("SIGSTOP of the server")
    w.server.pause()
    await w.pause(b.rng.uniform(0.1, 1.2))
    w.server.resume()
    w.tell("SIGCONT")


async def sessions_terminated(w, b):
    for _ in range(b.rng.randint(1, 4)):
        share = b.rng.choice((0.3, 1.0))
        await on_sessions(w, "pg_terminate_backend", share)
        await w.pause(b.rng.uniform(0.0, 0.3))


async def statements_cancelled(w, b):
    for _ in range(b.rng.randint(2, 6)):
        await on_sessions(w, "pg_cancel_backend", 0.7)
        await w.pause(b.rng.uniform(0.0, 0.1))


async def on_sessions(w, function, share):
    found = await w.execute(
        f"select {function}(pid) from pg_stat_activity"
        f" where usename = '{ROLE}' and random() < {share}"
    )
    w.tell(f"{function} of {len(found)} sessions")


async def connection_limit(w, b):
    limit = b.rng.randint(1, w.options["max_size"])
    w.tell(f"the role may have {limit} connections, and its sessions are ended")
    await w.execute(f"alter role {ROLE} connection limit {limit}")
    await on_sessions(w, "pg_terminate_backend", 1.0)
    await w.pause(b.rng.uniform(0.2, 1.2))
    await w.execute(f"alter role {ROLE} connection limit -1")


async def password_changed(w, b):
    """Some of the sessions end before the pool is told the new one."""
    new = f"word-{b.rng.randrange(10**9)}"
    w.tell("the password changes, and sessions are ended")
    await w.execute(f"alter role {ROLE} password '{new}'")
    await on_sessions(w, "pg_terminate_backend", b.rng.choice((0.5, 1.0)))
    await w.pause(b.rng.choice((0.0, 0.3)))
    w.password = new
    w.tell("the pool has the new one")


ALL = (
    stopped,
    killed,
    restarted_at_once,
    suspended,
    sessions_terminated,
    statements_cancelled,
    connection_limit,
    password_changed,
)
