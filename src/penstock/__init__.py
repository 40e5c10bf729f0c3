"""PostgreSQL connection pools for Python web workers.

>>> from penstock import ConnectionPool
>>> pool = ConnectionPool("postgresql://app@db/shop", min_size=1, max_size=10)
>>> with pool.connection() as conn:
...     conn.execute("update ...")
"""

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

__all__ = [
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
