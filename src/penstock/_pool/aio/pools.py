"""AsyncPools: many named asyncio pools from one configuration.

One job: `Pools`' (`pools.py`), with awaits where there is something to wait for.

It must not know: how a pool works, what configuration looks like. No lock: the pools are chosen when
this is made and never change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from penstock._pool.aio.pool import AsyncConnectionPool
from penstock._pool.named_pools import NamedPools
from penstock._process.clock import clock

if TYPE_CHECKING:
    from types import TracebackType

    from penstock.config.pool_config import PoolConfig


class AsyncPools(NamedPools[AsyncConnectionPool[Any]]):
    """Named asyncio pools. Making them opens nothing: each opens at its first borrow, or by `open`.

    Args:
        configs: the pools' names and options. A pool without a name of its own gets this one.

    Raises:
        DriverNotFoundError: a driver's library is not installed.
    """

    @staticmethod
    def _made_of(config: PoolConfig) -> AsyncConnectionPool[Any]:
        return AsyncConnectionPool.from_config(config)

    async def open(self, wait: bool = False, timeout: float | None = None) -> None:
        """Open all pools. If one cannot be opened, those that this call opened are closed again.

        Args:
            wait: return only when each has its `min_size` connections.
            timeout: seconds to wait at most, for all together; None: each as long as its own.

        Raises:
            ServerUnavailable: with `wait`, a pool could not open a connection.
            PoolTimeout: with `wait`, not all connections could be opened in time.
            MisuseError: a pool belongs to another event loop.
        """
        deadline = None if timeout is None else clock() + timeout
        opened: list[AsyncConnectionPool[Any]] = []
        try:
            for pool in self._pools.values():
                if not pool.opened:
                    opened.append(pool)
                await pool.open(wait, _left(deadline))
        except BaseException:
            for pool in opened:
                await pool.close(0)
            raise

    async def close(self, timeout: float | None = 5.0) -> None:
        """Close all pools, also when one of them raises.

        Args:
            timeout: seconds to wait for lent connections, for all pools together; None: as long
                as it takes.
        """
        deadline = None if timeout is None else clock() + timeout
        failures: list[Exception] = []
        for pool in self._pools.values():
            try:
                await pool.close(_left(deadline))
            except Exception as error:  # noqa: BLE001  the others are closed all the same
                failures.append(error)
        if failures:
            raise failures[0]

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - clock())
