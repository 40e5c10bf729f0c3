"""`statement_timeout_client`: what a pool asks of its driver, and what happens when it strikes.

One job: make the `StatementLimit` that a pool's connections are opened with: how long, which error, whom to
tell. How a statement is ended is the driver's business, what that means for other connections the
machine's.

It must not know: how connections are opened. No lock: a limit never changes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.drivers import StatementLimit
from penstock.errors import ConfigError, StatementTimeout, flavoured

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from penstock.config.pool_config import PoolConfig

OPTION = "statement_timeout_client"


def limit_of(
    config: PoolConfig, driver: Any, pool: str, doubt: weakref.WeakMethod[Callable[[], object]]
) -> StatementLimit | None:
    """The limit of a pool's statements; None where the option is not set.

    Args:
        config: the pool's options.
        driver: the pool's driver.
        pool: the pool's name.
        doubt: has the pool's idle connections pinged before they are lent. Weak: connections must not
            keep their pool alive.

    Raises:
        ConfigError: the driver cannot do that.
    """
    seconds = config.statement_timeout_client
    if seconds is None:
        return None
    if not getattr(driver, "limits_statements", False):
        allowed = f"None with driver {driver.name!r}, which cannot give a statement up"
        raise ConfigError(OPTION, f"{seconds:g}", allowed, pool=pool)
    return StatementLimit(
        seconds=seconds, given_up=partial(_given_up, driver, pool, seconds, doubt)
    )


def _given_up(
    driver: Any, pool: str, seconds: float, doubt: weakref.WeakMethod[Callable[[], object]]
) -> Exception:
    tell = doubt()
    if tell is not None:
        tell()
    error: Exception = flavoured(StatementTimeout, driver)(pool=pool, seconds=seconds)
    return error


def within(seconds: float, config: PoolConfig) -> float:
    """So many seconds, or the limit of statements where that is less: for the pool's own at a return."""
    limit = config.statement_timeout_client
    return seconds if limit is None else min(seconds, limit)
