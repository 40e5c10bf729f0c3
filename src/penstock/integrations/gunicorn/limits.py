"""Whether all workers together may open more connections than a server, a role or a database allows.

One job: ask each pool's server what it allows, add up what the workers may open, and put into words
what does not fit.

It must not know: gunicorn, worker classes. It runs in a thread of its own, and may wait. A server that
cannot be asked allows everything: requests will tell. No lock: all is its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock._pool.aio.pool import AsyncConnectionPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.integrations.gunicorn.traps import Share

_log = logging.getLogger("penstock.gunicorn")

# A server is known by its start and its port: whichever address a pool has reached it at.
_ASK: Final = """
    select pg_catalog.pg_postmaster_start_time()::text || ' ' || pg_catalog.current_setting('port'),
           session_user::text, pg_catalog.current_database()::text,
           pg_catalog.current_setting('max_connections')::int,
           case when r.rolsuper then 0
                else pg_catalog.current_setting('superuser_reserved_connections')::int
                   + coalesce(pg_catalog.current_setting('reserved_connections', true)::int, 0)
           end,
           case when r.rolsuper then -1 else r.rolconnlimit end,
           case when r.rolsuper then -1 else d.datconnlimit end
    from pg_catalog.pg_roles r, pg_catalog.pg_database d
    where r.rolname = session_user and d.datname = pg_catalog.current_database()
"""


class Allowed(NamedTuple):
    """What a pool's server says. A limit of -1 is none."""

    server: str
    role: str
    database: str
    max_connections: int
    reserved: int
    role_limit: int
    database_limit: int


def exceeded(workers: int, shares: Sequence[Share]) -> list[str]:
    """Ask the servers, and tell what does not fit, as sentences with a next step."""
    asked = [(share, allowed) for share in shares if (allowed := _ask(share.pool)) is not None]
    return found(workers, asked)


def _ask(pool: Any) -> Allowed | None:
    try:
        if isinstance(pool, AsyncConnectionPool):  # it is the application's loop's, not ours
            return Allowed(*asyncio.run(_ask_beside(pool)))
        return Allowed(*pool.execute(_ASK).fetchone())
    except Exception:  # noqa: BLE001  whatever it is, a request will meet it, too
        _log.debug("pool %r: the server's limits are unknown", pool.name, exc_info=True)
        return None


async def _ask_beside(pool: AsyncConnectionPool[Any]) -> Any:
    config = pool._config.replace(min_size=0, max_size=1)  # noqa: SLF001  of a pool like it
    beside = AsyncConnectionPool.from_config(config)
    try:
        return (await beside.execute(_ASK)).fetchone()
    finally:
        await beside.close()


def found(workers: int, asked: Sequence[tuple[Share, Allowed]]) -> list[str]:
    """What does not fit, once per server, role and database."""
    sums: dict[tuple[str, int], list[Share]] = defaultdict(list)
    for share, allowed in asked:
        for limit in _limits(allowed):
            sums[limit].append(share)
    return [
        _too_many(workers, shares, what, limit)
        for (what, limit), shares in sums.items()
        if workers * sum(share.connections for share in shares) > limit
    ]


def _limits(allowed: Allowed) -> list[tuple[str, int]]:
    left = allowed.max_connections - allowed.reserved
    kept = f", {allowed.reserved} of them reserved" if allowed.reserved else ""
    port = allowed.server.rpartition(" ")[2]
    server = f"the server on port {port} (max_connections {allowed.max_connections}{kept})"
    limits = [
        (server, left),
        (f"the role {allowed.role!r} (its connection limit)", allowed.role_limit),
        (f"the database {allowed.database!r} (its connection limit)", allowed.database_limit),
    ]
    return [(what, limit) for what, limit in limits if limit >= 0]


def _too_many(workers: int, shares: Sequence[Share], what: str, limit: int) -> str:
    each = sum(share.connections for share in shares)
    names = ", ".join(f"{share.connections} of pool {share.pool.name!r}" for share in shares)
    room = limit // workers
    step = f"at most {room} for each worker" if room else f"at most {limit} workers"
    return (
        f"{workers} workers x {each} connections ({names}) may be {workers * each}, and {what} allows "
        f"{limit}: under load some will be refused (53300). Next step: {step} (half of that if "
        "reloads are to fit, too), or a higher limit; see penstock's docs/sizing.md"
    )
