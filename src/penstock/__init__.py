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
from penstock._pool.reporter import Health
from penstock._pool.result import Result
from penstock._pool.sync.lease import Lease
from penstock._pool.sync.pool import ConnectionPool
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
from penstock.pools import Pools

if TYPE_CHECKING:
    from penstock._pool.aio.lease import AsyncLease
    from penstock._pool.aio.pool import AsyncConnectionPool
    from penstock._pool.aio.pools import AsyncPools

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
    "AsyncConnectionPool": "penstock._pool.aio.pool",
    "AsyncLease": "penstock._pool.aio.lease",
    "AsyncPools": "penstock._pool.aio.pools",
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
