"""What the tests of the asyncpg driver share: links that are closed, and short ways to ask."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from penstock._drivers.asyncpg.driver import driver
from penstock.drivers import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import asyncpg

    from penstock._drivers.asyncpg.link import AsyncpgLink
    from penstock.drivers import AsyncDriver

    conforming: AsyncDriver[asyncpg.Connection] = driver  # to the protocol, for mypy to see

SECONDS = 20.0  # a bound for what is expected to work
GIVEN_BACK = "given back to its pool"


@asynccontextmanager
async def opened(conninfo: str, **options: Any) -> AsyncIterator[AsyncpgLink]:
    link = await driver.open(Recipe(conninfo=conninfo, **options), SECONDS)
    try:
        yield link
    finally:
        await link.close()


async def one(link: AsyncpgLink, query: str, *params: Any) -> Any:
    reply = await link.execute(query, params)
    assert reply.rows is not None
    return reply.rows[0][0]


async def comes_true(condition: Callable[[], Any]) -> None:
    """Let the loop go on until it is true; fails when that never happens."""
    deadline = monotonic() + SECONDS
    while not condition():
        assert monotonic() < deadline, f"did not come true: {condition}"
        await asyncio.sleep(0.001)


def sockets() -> set[str]:
    """The open sockets of this process; uvloop opens other things when it likes."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(str(entry.readlink()))
    return {each for each in found if each.startswith("socket:")}
