"""Pools: many named pools from one configuration.

One job: make a `ConnectionPool` of each `PoolConfig`, and do to all of them what is done to one:
open, close, report.

It must not know: how a pool works, what configuration looks like.

No lock: the pools are chosen when this is made and never change; each has its own lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from penstock._pool.named_pools import NamedPools
from penstock._pool.sync.pool import ConnectionPool
from penstock._process import fork
from penstock._process.clock import clock

if TYPE_CHECKING:
    from types import TracebackType

    from penstock.config.pool_config import PoolConfig


class Pools(NamedPools[ConnectionPool[Any]]):
    """Named pools. Making them opens nothing: each opens at its first borrow, or by `open`.

    Args:
        configs: the pools' names and options. A pool without a name of its own gets this one.

    Raises:
        DriverNotFoundError: a driver's library is not installed.
    """

    @staticmethod
    def _made_of(config: PoolConfig) -> ConnectionPool[Any]:
        return ConnectionPool.from_config(config)

    # -- their life -------------------------------------------------------------------------------

    def open(self, wait: bool = False, timeout: float | None = None) -> None:
        """Open all pools. If one cannot be opened, those that this call opened are closed again.

        Args:
            wait: return only when each has its `min_size` connections, as `ConnectionPool.open`.
            timeout: seconds to wait at most, for all together; None: each as long as its own.

        Raises:
            ServerUnavailable: with `wait`, a pool could not open a connection.
            PoolTimeout: with `wait`, not all connections could be opened in time.
        """
        deadline = None if timeout is None else clock() + timeout
        opened: list[ConnectionPool[Any]] = []
        try:
            self._open_each(opened, wait, deadline)
        except BaseException:
            _close_each(opened, clock())
            raise

    def _open_each(
        self, opened: list[ConnectionPool[Any]], wait: bool, deadline: float | None
    ) -> None:
        for pool in self._pools.values():
            if not pool.opened:
                opened.append(pool)
            left = None if deadline is None else max(0.0, deadline - clock())
            pool.open(wait, left)

    def close(self, timeout: float | None = 5.0) -> None:
        """Close all pools, also when one of them raises.

        Args:
            timeout: seconds to wait for lent connections, for all pools together; None: as long
                as it takes.
        """
        failures = _close_each(self._pools.values(), None if timeout is None else clock() + timeout)
        if failures:
            raise failures[0]

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def close_all(timeout: float | None = 5.0) -> None:
    """Close every open `ConnectionPool` of this process, wherever it was made, before it ends.

    asyncio's pools are closed by their own loop only, so they are left alone; the end of the
    process ends their sessions.

    Args:
        timeout: seconds to wait for lent connections, for all pools together; None: as long as it
            takes.

    Raises:
        Exception: what a pool's close has raised; the others were closed all the same.
    """
    if not fork.page[0]:
        fork.noticed()  # else it would end the parent's sessions
    pools = [one for one in fork.registered() if isinstance(one, ConnectionPool) and one.opened]
    failures = _close_each(pools, None if timeout is None else clock() + timeout)
    if failures:
        raise failures[0]


def _close_each(pools: Any, deadline: float | None) -> list[BaseException]:
    """Close them one after the other; gives what was raised."""
    failures: list[BaseException] = []
    for pool in pools:
        try:
            pool.close(None if deadline is None else max(0.0, deadline - clock()))
        except BaseException as error:  # noqa: BLE001  the others are closed all the same
            failures.append(error)
    return failures
