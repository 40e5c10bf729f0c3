"""The pools which the bank can use, each as its own people use it, behind one small face.

It must not know what the bank does with a connection. It adds nothing to a pool: no retry, no check,
no closing; it only looks at the clock, so that all pools are measured with the same ruler.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Per worker. Fewer connections than the worker has threads, so that requests have to wait for one;
# and longer patience than the database needs for a restart, shorter than the client's.
MIN_SIZE = 2
MAX_SIZE = 4
TIMEOUT = 5.0


class Figures(NamedTuple):
    """A pool at this moment."""

    idle: int
    in_use: int
    waiting: int


class Lend(NamedTuple):
    """Which server process a thread was last lent, and when.

    By `time.monotonic`, which is one clock for all processes of a machine.
    """

    backend: int
    at: float


class NoConnectionError(Exception):
    """The pool gave none; the pool's own error is the cause."""


@dataclass(frozen=True, slots=True)
class PoolInUse:
    """One kind of pool as the bank sees it.

    Attributes:
        lend: borrow and give back, committing, as the pool's documentation shows it.
        figures: the pool's own word about itself.
        backend_of: the process id of a connection's server process.
    """

    lend: Callable[[], AbstractContextManager[Any]]
    figures: Callable[[], Figures]
    backend_of: Callable[[Any], int]


class Till:
    """Where the bank gets its connections: lends from the pool and notes how long that took."""

    def __init__(self, pool: PoolInUse) -> None:
        self._pool = pool
        self._waits: deque[float] = deque(maxlen=1000)
        self._last = threading.local()

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Lend a connection for the block."""
        self._last.lend = None
        asked = time.monotonic()
        with ExitStack() as stack:
            try:
                conn = stack.enter_context(self._pool.lend())
            except Exception as error:
                raise NoConnectionError(f"{type(error).__name__}: {error}") from error
            lent = time.monotonic()
            self._last.lend = Lend(self._pool.backend_of(conn), lent)
            self._waits.append(lent - asked)
            yield conn

    def last_lend(self) -> Lend | None:
        """What this thread was last lent."""
        return getattr(self._last, "lend", None)

    def figures(self) -> Figures:
        """The pool's own word about itself."""
        return self._pool.figures()

    def wait_percentiles(self) -> tuple[float, float]:
        """Seconds that half and 99 of 100 of the last thousand borrows took at most."""
        waits = sorted(self._waits)
        if not waits:
            return 0.0, 0.0
        return waits[len(waits) // 2], waits[len(waits) * 99 // 100]


def open_pool(kind: str, conninfo: str) -> Till:
    """Make the pool that `--pool` names, at import time of the service, as people do."""
    return Till(KINDS[kind](conninfo))


def _penstock(conninfo: str) -> PoolInUse:
    from penstock import ConnectionPool  # noqa: PLC0415  (only the pool in question is imported)

    pool: ConnectionPool[Any] = ConnectionPool(
        conninfo, min_size=MIN_SIZE, max_size=MAX_SIZE, timeout=TIMEOUT, name="bank"
    )

    def figures() -> Figures:
        stats = pool.stats()
        return Figures(stats.idle, stats.in_use, stats.waiting)

    return PoolInUse(pool.connection, figures, _backend_of)


def _psycopg_pool(conninfo: str) -> PoolInUse:
    from psycopg_pool import ConnectionPool  # noqa: PLC0415  (as above)

    pool = ConnectionPool(
        conninfo, min_size=MIN_SIZE, max_size=MAX_SIZE, timeout=TIMEOUT, name="bank", open=True
    )

    def figures() -> Figures:
        stats = pool.get_stats()
        idle = stats["pool_available"]
        return Figures(idle, stats["pool_size"] - idle, stats["requests_waiting"])

    return PoolInUse(pool.connection, figures, _backend_of)


def _psycopg2(conninfo: str) -> PoolInUse:
    from psycopg2.pool import ThreadedConnectionPool  # noqa: PLC0415  (as above)

    # (1, 20) is what the well-known answers say.
    pool = ThreadedConnectionPool(1, 20, conninfo)

    @contextmanager
    def lend() -> Iterator[Any]:
        conn = pool.getconn()
        try:
            with conn:
                yield conn
        finally:
            pool.putconn(conn)

    def figures() -> Figures:
        # The pool counts for itself only; and it never waits, it raises.
        return Figures(len(pool._pool), len(pool._used), 0)  # type: ignore[attr-defined]  # noqa: SLF001

    return PoolInUse(lend, figures, _backend_of)


def _backend_of(conn: Any) -> int:
    return int(conn.info.backend_pid)


KINDS: dict[str, Callable[[str], PoolInUse]] = {
    "penstock": _penstock,
    "psycopg_pool": _psycopg_pool,
    "psycopg2": _psycopg2,
}
