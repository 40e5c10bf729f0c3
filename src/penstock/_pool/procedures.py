"""What both runtimes do alike: their constants, and the plain functions that neither waits in.

One job: plain functions and numbers that stand once for threads, gevent and asyncio. It must not know: how
to wait, locks, tasks. No lock: nothing is kept.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from penstock._process import stacks, watch
from penstock.drivers import Activity
from penstock.errors import ConfigError, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import FrameType

    from penstock.config.pool_config import PoolConfig
    from penstock.errors import PenstockError

#: How long bringing a connection back to a clean state may take at the return, in seconds: a
#: rollback is one round trip, and a server that does not answer it in this time is not there.
TIDY_SECONDS: Final = 5.0

#: A ping may use this share of what the borrower has left, so that there is time for another
#: connection if it is not answered; at most PING_SECONDS, and at least LEAST_PING_SECONDS, since a
#: connection is not to be closed because its borrower was in a hurry.
PING_SHARE: Final = 0.5
PING_SECONDS: Final = 5.0
LEAST_PING_SECONDS: Final = 0.1
FOREVER: Final = float("inf")

#: With `guard`, of a driver that cannot make another object over the session.
STILL_HELD: Final = "somebody still has this connection object, which was given back"


def left_in(activity: Activity) -> str:
    """What somebody was in the middle of who gave back a connection that nobody can use now."""
    if activity is Activity.ACTIVE:
        return "while a statement was under way"
    return "in the middle of something, or it could not be rolled back in time"


class GivenBack(Exception):  # noqa: N818  never raised: it stands for "roll back" in putconn()
    """What putconn() tells a lease instead of an exception, to have it rolled back."""


def kept_on_stack(held: Mapping[int, Any], top: FrameType) -> Collection[int]:
    """Those of the links (by serial) whose connections this stack keeps from being given back."""
    serials = {id(link.conn): serial for serial, link in held.items()}
    sights = stacks.seen(serials, top)
    return {serials[number] for number, sight in sights.items() if sight.kept}


def explain_by(error: PenstockError, refusal: Exception | None, seconds: float) -> None:
    """A borrower whose connections were all refused by `check`: that is why he got none."""
    if refusal is not None:
        error.__cause__ = refusal
        if isinstance(error, PoolTimeout):
            error.timeout = seconds


#: The longest that anybody sleeps at a time, in seconds: longer times overflow a lock's.
LONGEST_SLEEP: Final = 1e6


new: Callable[[Any], Any] = object.__new__  # makes a lease, 40 ns sooner than calling its class
_names = iter(range(1, sys.maxsize))


def next_name() -> str:
    """What a pool is called that was given no name."""
    return f"pool-{next(_names)}"


def wants_nothing_special(config: PoolConfig) -> bool:
    """Whether plain leases will do."""
    special = (config.on_borrow, config.check)
    # Where nobody watches (no epoll), each borrow looks at the socket, and leases are careful.
    return (
        watch.available()
        and config.reset == "rollback"
        and not config.guard
        and all(option is None for option in special)
    )


def refuse_guard_without_renewal(config: PoolConfig, driver: Any) -> None:
    """Raise ConfigError where `guard` is asked for and the driver cannot do it."""
    if config.guard and not getattr(driver, "renews", False):
        raise ConfigError(
            "guard", "True", f"False with driver {driver.name!r}, whose links have no renew()",
            pool=config.name,
        )  # fmt: skip


def abandon(link: Any, *, busy: bool) -> Exception | None:
    """Let go of one inherited link; one that cannot be must not keep the others."""
    try:
        link.abandon(busy=busy)
    except Exception as error:  # noqa: BLE001  told once all were tried
        return error
    return None
