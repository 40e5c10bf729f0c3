"""The server's own view of its sessions: who is connected, ending them, and seeing that they ended.

It must not know pools or workers; a session is a pid, a name and a state.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

# The demo's own sessions bear this name, and are neither shown nor ended.
OBSERVER = "penstock demo"
INTERVAL = 0.5

GROUPED = """
select coalesce(nullif(application_name, ''), '(no name)'),
       count(*) filter (where state = 'idle'),
       count(*) filter (where state <> 'idle'),
       count(*) filter (where state like 'idle in transaction%%'),
       extract(epoch from clock_timestamp() - min(backend_start))
from pg_stat_activity
where datname = current_database() and application_name <> %s
  and backend_type = 'client backend'
group by 1 order by 1
"""

LISTED = """
select pid, state from pg_stat_activity
where datname = current_database() and application_name <> %s
  and backend_type = 'client backend'
"""


@dataclass(frozen=True, slots=True)
class SessionGroup:
    """All sessions that bear one application_name.

    Attributes:
        idle: how many do nothing.
        busy: how many are not idle.
        in_transaction: how many of those wait for their client to go on.
        oldest: how long the oldest has been there, in seconds.
    """

    name: str
    idle: int
    busy: int
    in_transaction: int
    oldest: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Sessions that were ended.

    Attributes:
        gone: pid of each, and when it was seen to be gone (`time.monotonic`).
        busy: how many were not idle just before.
    """

    gone: dict[int, float]
    busy: int


def _observe(conninfo: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(conninfo, autocommit=True, application_name=OBSERVER, connect_timeout=5)


def list_sessions(conninfo: str) -> dict[int, str]:
    """Pid and state of each session."""
    with _observe(conninfo) as conn:
        rows = conn.execute(LISTED, (OBSERVER,)).fetchall()
    return {int(str(pid)): str(state) for pid, state in rows}


def terminate_all(conninfo: str) -> Ended:
    """End every session by pg_terminate_backend, and see the server processes go."""
    with _observe(conninfo) as conn:
        rows = conn.execute(
            f"select pid, state, pg_terminate_backend(pid) from ({LISTED}) as sessions",  # noqa: S608
            (OBSERVER,),
        ).fetchall()
    pids = [int(str(pid)) for pid, _, _ in rows]
    return Ended(watch_go(pids), sum(state != "idle" for _, state, _ in rows))


def watch_go(pids: Iterable[int]) -> dict[int, float]:
    """When each server process was first seen to be gone; after 5 s, those that were."""
    gone: dict[int, float] = {}
    left = set(pids)
    until = time.monotonic() + 5.0
    while left and time.monotonic() < until:
        for pid in [each for each in left if not _process_exists(each)]:
            gone[pid] = time.monotonic()
            left.remove(pid)
        time.sleep(0.0005)
    return gone


def _process_exists(pid: int) -> bool:
    # The server runs on this machine, so the system can tell: sooner than pg_stat_activity, whose
    # entry is removed before the socket is closed.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _group(name: Any, idle: Any, busy: Any, in_transaction: Any, oldest: Any) -> SessionGroup:
    return SessionGroup(str(name), int(idle), int(busy), int(in_transaction), float(oldest))


class SessionWatch:
    """Looks at pg_stat_activity twice a second, from a thread, while the `with` block runs."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="session watch", daemon=True)
        self.groups: list[SessionGroup] | None = None  # None: the server cannot be reached

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(2.0)

    def _look(self) -> None:
        while not self._end.is_set():
            try:
                self._look_over_one_connection()
            except psycopg.Error:
                self.groups = None
                self._end.wait(INTERVAL)

    def _look_over_one_connection(self) -> None:
        with _observe(self._conninfo) as conn:
            while not self._end.wait(INTERVAL):
                rows = conn.execute(GROUPED, (OBSERVER,)).fetchall()
                self.groups = [_group(*row) for row in rows]
