"""What to do next: the last lines of errors' texts, by what is known of the cause.

Its one job: those phrases, which name the next step and hold no secret. It must not know: errors,
pools. No lock: nothing is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.errors.figures import Counts, Holder


def step_when_full(counts: Counts, holders: Sequence[Holder]) -> str:
    """Where the borrower waited in vain, and no outage is known."""
    if counts.in_use < counts.max_size:
        if counts.opening:
            return (
                "opening takes longer than this borrower waits: look at the network and the "
                "server's load, raise timeout, or open ahead with a larger min_size"
            )
        return "the server answers slowly: look at its load and at the network, or raise timeout"
    if any((holder.activity or "").startswith("idle in") for holder in holders):
        return (
            "end transactions before slow work that needs no database (the places are above); "
            "else raise max_size or timeout"
        )
    return "give connections back sooner (the longest first), or raise max_size or timeout"


def step_when_locked(holder: Holder) -> str:
    """Where the pool's own lock was not free in time."""
    if holder.file is None:
        return "restart this process: the thread that has the lock was ended by force"
    return (
        "let no signal handler, __del__ or debugger wait there: it runs in the middle of a move of the "
        "pool, which waits for it; set a flag instead"
    )


#: Where a borrower holds what it waits for.
STEP_OWN = "use the connection that it has, or give it back first, or raise max_size"


def step_on_a_loop(loop: str) -> str:
    """Where a pool that blocks is used on an event loop."""
    if loop == "asyncio":
        return "use AsyncConnectionPool in `async def`, or call this pool by asyncio.to_thread()"
    return f"call this pool in a thread: {loop}.to_thread.run_sync()"


# Next steps by SQLSTATE, https://www.postgresql.org/docs/current/errcodes-appendix.html
_STEPS = {
    "28P01": "check user and password: conninfo, PGPASSWORD, ~/.pgpass; a token may have expired",
    "28000": "check that the role exists and may log in, and that pg_hba.conf lets this host in",
    "3D000": "check dbname: the server has no such database (createdb makes one)",
    "42501": "GRANT CONNECT on the database to this user",
    "53300": (
        "the server is at max_connections (or the role or database at its CONNECTION LIMIT): "
        "lower max_size times the number of workers, or raise the limit"
    ),
    "57P01": "the server is being shut down or restarted: the pool comes back by itself",
    "57P02": "the server crashed and is recovering: the pool comes back by itself; read its log",
    "57P03": "the server is starting or stopping: the pool comes back by itself",
    "57P05": "idle_session_timeout ended the session while it was opened: raise it",
    "0A000": "server or pooler refused a start-up option: look at options= in conninfo",
    "22023": "the server refused a parameter's value: look at options= in conninfo",
    "42704": "the server knows no such parameter: look at options= in conninfo",
}
_STEP_UNREACHABLE = (
    "check that the server runs and that host and port are right and reachable from here; the "
    "pool goes on trying"
)

STEP_SILENT = (
    "look from here, by psql: if it hangs, too, that host or its server process is frozen or stopped, or "
    "a firewall drops packets; if not, raise connect_timeout or timeout; the pool goes on trying"
)

STEP_HANGS = "give what that callable waits for a timeout of its own (3 s); the pool calls it again"


def step_when_down(sqlstate: str | None) -> str:
    """Where no connection could be opened, by the server's code."""
    if sqlstate is None or sqlstate.startswith("08"):
        return _STEP_UNREACHABLE
    if sqlstate.startswith("28"):
        return _STEPS.get(sqlstate, _STEPS["28000"])
    return _STEPS.get(sqlstate, "look this SQLSTATE up in the server's log")
