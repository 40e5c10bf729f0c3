"""PostgreSQL connection pools for Python web workers.

>>> from penstock import ConnectionPool
>>> pool = ConnectionPool("postgresql://app@db/shop", min_size=1, max_size=10)
>>> with pool.connection() as conn:
...     conn.execute("update ...")
"""

from typing import TYPE_CHECKING

from penstock._drivers import DriverNotFoundError
from penstock._machine.tally import Stats
from penstock.config import PoolConfig
from penstock.errors import (
    ConfigError,
    Counts,
    Holder,
    MisuseError,
    PenstockError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    TooManyRequests,
)
from penstock.lease import Lease
from penstock.pools import Pools
from penstock.reports import Health
from penstock.result import Result
from penstock.threads import ConnectionPool

if TYPE_CHECKING:
    from penstock.aio import AsyncConnectionPool
    from penstock.async_lease import AsyncLease

__all__ = [
    "AsyncConnectionPool",
    "AsyncLease",
    "ConfigError",
    "ConnectionPool",
    "Counts",
    "DriverNotFoundError",
    "Health",
    "Holder",
    "Lease",
    "MisuseError",
    "PenstockError",
    "PoolClosed",
    "PoolConfig",
    "PoolTimeout",
    "Pools",
    "Result",
    "ServerUnavailable",
    "Stats",
    "TooManyRequests",
]


def __getattr__(name: str) -> object:
    # asyncio is imported by those who use it: it takes 30 ms, and loads what gevent would rather
    # patch first.
    if name == "AsyncConnectionPool":
        from penstock.aio import AsyncConnectionPool  # noqa: PLC0415

        return AsyncConnectionPool
    if name == "AsyncLease":
        from penstock.async_lease import AsyncLease  # noqa: PLC0415

        return AsyncLease
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
