"""PostgreSQL connection pools for Python web workers.

>>> from penstock import ConnectionPool
>>> pool = ConnectionPool("postgresql://app@db/shop", min_size=1, max_size=10)
>>> with pool.connection() as conn:
...     conn.execute("update ...")
"""

import importlib
from typing import TYPE_CHECKING

from penstock._drivers import DriverNotFoundError
from penstock._machine.stats import Stats
from penstock.config.pool_config import PoolConfig
from penstock.errors import (
    ConfigError,
    MisuseError,
    PenstockError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    StatementTimeout,
    TooManyRequests,
)
from penstock.errors.figures import Counts, Holder, OwnHold
from penstock.lease import Lease
from penstock.pools import Pools
from penstock.reports import Health
from penstock.result import Result
from penstock.threads import ConnectionPool

if TYPE_CHECKING:
    from penstock.aio import AsyncConnectionPool
    from penstock.async_lease import AsyncLease
    from penstock.async_pools import AsyncPools

__all__ = [
    "AsyncConnectionPool",
    "AsyncLease",
    "AsyncPools",
    "ConfigError",
    "ConnectionPool",
    "Counts",
    "DriverNotFoundError",
    "Health",
    "Holder",
    "Lease",
    "MisuseError",
    "OwnHold",
    "PenstockError",
    "PoolClosed",
    "PoolConfig",
    "PoolTimeout",
    "Pools",
    "Result",
    "ServerUnavailable",
    "StatementTimeout",
    "Stats",
    "TooManyRequests",
]

_ASYNC = {
    "AsyncConnectionPool": "penstock.aio",
    "AsyncLease": "penstock.async_lease",
    "AsyncPools": "penstock.async_pools",
}


def __getattr__(name: str) -> object:
    # asyncio is imported by those who use it: it takes 30 ms, and loads what gevent would rather
    # patch first.
    module = _ASYNC.get(name)
    if module is not None:
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
