"""A server's lifespan events: the pools open before the app starts, and close after it has stopped.

One job: to stand between server and app while they talk about startup and shutdown. What they say
passes unchanged, and so does what the app raises.

It must not know: requests, frameworks, how pools work. No lock: it runs once, in one task.

An app that does not know lifespan raises, and its server goes on without: then the pools stay as
they are (each opens at its first borrow, too), and nobody closes them but the end of the process.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log = logging.getLogger("penstock.asgi")

#: After these the app does nothing any more.
_LAST = {"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"}


class Lifespan:
    """One run of an app.

    Args:
        open_pools: called when the server says "startup", before the app hears of it.
        close_pools: called when the app has stopped, before the server hears of it. Not called if
            the app's lifespan ends before the server's "shutdown": then the server goes on.
        receive: the server's.
        send: the server's.
    """

    def __init__(
        self,
        open_pools: Callable[[], Awaitable[None]],
        close_pools: Callable[[], Awaitable[None]],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        self._open_pools = open_pools
        self._close_pools = close_pools
        self._receive = receive
        self._send = send
        self._stopping = False

    async def run(self, app: Callable[..., Awaitable[None]], scope: Any) -> None:
        """Run the app's side. Raises what it raises."""
        try:
            await app(scope, self.receive, self.send)
        finally:
            if self._stopping:  # it did not say that it has stopped
                await self._close()

    async def receive(self) -> Any:
        """Hear what the server says, and act before the app does."""
        message = await self._receive()
        if message["type"] == "lifespan.startup":
            await self._open_pools()
        elif message["type"] == "lifespan.shutdown":
            self._stopping = True
        return message

    async def send(self, message: Any) -> None:
        """Tell the server, once the pools are closed if that is due."""
        if message["type"] in _LAST:
            await self._close()
        await self._send(message)

    async def _close(self) -> None:
        self._stopping = False
        try:
            await self._close_pools()
        except Exception:  # noqa: BLE001  the app has stopped well, whatever became of our side
            _log.exception("closing the pools at shutdown failed")
