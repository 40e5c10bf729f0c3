"""What a key that nobody knows was probably meant to be.

It must not know: which keys there are. No lock: pure functions.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# What other pools call the same thing, for "did you mean". From psycopg2.pool, SQLAlchemy, DBUtils,
# asyncpg, HikariCP and Django's OPTIONS.
_FOREIGN = {
    "minconn": "min_size", "maxconn": "max_size", "pool_size": "max_size",
    "maxconnections": "max_size", "maximum_pool_size": "max_size", "minimum_idle": "min_size",
    "mincached": "min_size", "pool_timeout": "timeout", "connection_timeout": "timeout",
    "pool_recycle": "max_lifetime", "conn_max_age": "max_lifetime", "idle_timeout": "max_idle",
    "max_inactive_connection_lifetime": "max_idle", "pool_pre_ping": "ping_after",
    "dsn": "conninfo", "url": "conninfo", "connect_args": "kwargs", "setup": "on_borrow",
    "init": "configure", "pool_name": "name",
}  # fmt: skip


def resembling(key: str, names: Iterable[str]) -> str | None:
    """The one of `names` that was probably meant, by what other pools call it or by its letters."""
    meant = _FOREIGN.get(key.lower())
    close = difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1)
    return meant or (close[0] if close else None)
