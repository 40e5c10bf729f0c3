"""A cancel request to the server for an asyncpg connection, over a socket of its own.

asyncpg has one. It reads the session's key only when its task begins, by which time the connection may
have been given back; and what it opened it closes politely, which over TLS waits half a minute for a
server that says nothing. This one gets the key, and what it opened is gone when it ends.

It must not know: connections, links, pools. No lock: everything happens on one event loop.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import ssl

#: How long the request may take, in seconds; as long as a connect. Whoever waits has a bound of his own.
REQUEST_SECONDS: Final = 10.0

# https://www.postgresql.org/docs/current/protocol-message-formats.html
_TLS_REQUEST: Final = struct.pack("!ii", 8, 80877103)
_CANCEL_CODE: Final = 80877102


class Target(NamedTuple):
    """Whom to ask, and to end what.

    Attributes:
        address: a Unix socket's path, or an address and a port.
        tls: the context for TLS, None for none.
        advisory: whether a server that knows no TLS is asked without.
        pid: the session's process id.
        secret: its key.
    """

    address: str | tuple[str, int]
    tls: ssl.SSLContext | None
    advisory: bool
    pid: int
    secret: int


class _Conversation(asyncio.Protocol):
    """What the server says: a byte about TLS, and the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.transport: Any = None
        self.answer: asyncio.Future[bytes] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  it has ended, one way or the other
        for each in (self.answer, self.ended):
            if not each.done():
                each.cancel()


async def ask_to_cancel(target: Target) -> None:
    """Have the server cancel what the session is doing; returns when it has taken notice.

    Cancelled or failed, it leaves no socket.

    Raises:
        TimeoutError: the server said nothing for `REQUEST_SECONDS`.
        OSError: no connection, or no TLS where it is asked for.
    """
    loop = asyncio.get_running_loop()
    conversation = _Conversation(loop)
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            await _connect(loop, conversation, target)
            conversation.transport.write(
                struct.pack("!iiii", 16, _CANCEL_CODE, target.pid, target.secret)
            )
            await asyncio.wait({conversation.ended})
    finally:
        if conversation.transport is not None:
            conversation.transport.abort()


async def _connect(
    loop: asyncio.AbstractEventLoop, conversation: _Conversation, target: Target
) -> None:
    if isinstance(target.address, str):
        await loop.create_unix_connection(lambda: conversation, target.address)
        return
    await loop.create_connection(lambda: conversation, *target.address)
    if target.tls is None:
        return
    conversation.transport.write(_TLS_REQUEST)
    await asyncio.wait({conversation.answer})
    answer = b"" if conversation.answer.cancelled() else conversation.answer.result()
    if answer == b"N" and target.advisory:
        return
    if answer != b"S":
        raise ConnectionError("the server refused TLS for a request to cancel")
    secured = await loop.start_tls(
        conversation.transport, conversation, target.tls, server_hostname=target.address[0]
    )
    if secured is None:
        raise ConnectionError("the server went away during a request to cancel")
    conversation.transport = secured
