"""One request, or one websocket's handshake, between a server and an app.

One job: to say where a unit of work begins, what its answer decides, and where it ends.

It must not know: how connections are borrowed and given back (async_loans.py), what users call
(asgi.py), frameworks. No lock: what one app sends for one request it sends one after the other.

When what happens, for a request:

* `http.response.start` decides. Below 400 everything is committed before the server hears of it, so
  that a commit that fails is a 500 and no lie; it raises in the app, at its own `send`.
* An answer that may be a stream (it does not tell its length) may also be a late one: compressing
  middleware, and some frameworks, send the start with the first chunk, when the body has begun to
  read from a cursor. So a transaction that has only read stays open to the end of such an answer.
* The last chunk of the body gives everything back, before it is sent: neither a slow client nor a
  background task (frameworks run those before the app returns) keeps a connection.
* What is borrowed after that (a background task's) is given back when the app returns.
* A body of several chunks keeps what it has until its last one.

A websocket's handshake is a request whose answer is `websocket.accept`. Afterwards there is no end
to wait for, so nothing is lent but in units of their own.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from penstock._pool.procedures import GivenBack
from penstock.errors import MisuseError, PoolTimeout, ServerUnavailable, TooManyRequests
from penstock.integrations._unit.aio_loans import AsyncLoans

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping
    from contextvars import ContextVar, Token

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("penstock.asgi")

UNAVAILABLE: Final = (PoolTimeout, ServerUnavailable, TooManyRequests)
_STARTS: Final = {"http.response.start", "websocket.http.response.start"}
_CHUNKS: Final = {
    "http.response.body",
    "http.response.pathsend",
    "http.response.zerocopysend",
    "websocket.http.response.body",
}
_BODILESS: Final = {204, 304}  # statuses of answers that have no body, and so no length
_SWITCHED: Final = 101  # what an accepted websocket is, as an answer
_FORBIDDEN: Final = 403  # what one is that is closed before it was accepted


class Unit:
    """What `db.connection()` finds in its context.

    Attributes:
        loans: what has been borrowed.
        scope: the request's; None: there is no request.
        unavailable: the last error of a borrow that a 503 tells best.
    """

    __slots__ = ("loans", "scope", "unavailable")

    def __init__(self, where: Callable[[], str], scope: Scope | None) -> None:
        self.loans = AsyncLoans(where)
        self.scope = scope
        self.unavailable: BaseException | None = None

    async def finish(self, error: BaseException | None, *, commits: bool = False) -> None:
        """End it: commit if nothing was raised, else roll back, and give everything back."""
        try:
            if commits and error is None:
                await self.loans.commit_all()
        except BaseException as failure:
            error = failure
            raise
        finally:
            await self.loans.end(error, self._is_over)

    def _is_over(self) -> MisuseError:
        return MisuseError(
            f"a connection was asked for in {self.loans.where()}, which is over",
            next_step="a task that outlives what began it works in `async with db.unit():`",
        )


@dataclass(frozen=True, slots=True)
class Manner:
    """How the apps of one Penstock object want it.

    Attributes:
        transactions: "request", "explicit" or "autocommit".
        retry_after: seconds for a 503's Retry-After, or None for no 503.
        current: the unit of the running task.
    """

    transactions: str
    retry_after: int | None
    current: ContextVar[Unit | None] = field(repr=False)


class OwnUnit:
    """``async with db.unit():``; see `Penstock.unit`."""

    __slots__ = ("_manner", "_token", "_unit")

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._unit: Unit | None = None
        self._token: Token[Unit | None] | None = None

    async def __aenter__(self) -> None:
        if self._unit is not None:
            raise MisuseError("a unit was entered twice", next_step="call db.unit() for each")
        task = asyncio.current_task()
        name = "no task" if task is None else f"task {task.get_name()!r}"
        outer = self._manner.current.get()
        self._unit = Unit(lambda: f"a unit of its own in {name}", outer.scope if outer else None)
        self._token = self._manner.current.set(self._unit)

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        unit, token = self._unit, self._token
        if unit is None or token is None:
            if error is None or isinstance(error, Exception):  # a cancellation passes as it is
                raise MisuseError(
                    "a unit was left that nobody is in: nothing is committed",
                    next_step="leave each block once, where it was entered: use `async with`",
                )
            return
        self._token = None
        try:
            await unit.finish(error, commits=self._manner.transactions == "request")
        finally:
            _reset(self._manner.current, token)


class Exchange:
    """One request with its answer.

    Args:
        manner: how the app wants it.
        scope: the request's.
        send: the server's.
    """

    def __init__(self, manner: Manner, scope: Scope, send: Send) -> None:
        self._manner = manner
        self._send = send
        self._is_websocket = scope["type"] == "websocket"
        self.unit = Unit(lambda: name_of(scope), scope)
        self._started = False  # the server has heard of an answer
        self._replaced = False  # we have answered; what the app says is not heard
        self._status = 0
        self._failure: Exception | None = None  # of the commit

    async def run(self, app: App, scope: Scope, receive: Receive) -> None:
        """Run the app's side; raises what it raises, but for what is answered with 503."""
        token = self._manner.current.set(self.unit)
        try:
            try:
                await app(scope, receive, self.send)
            except BaseException as error:
                await self.unit.finish(error)
                self._raise_failure()
                if not await self._has_answered(error):
                    raise
            else:
                await self.unit.finish(None)
                self._raise_failure()
        finally:
            _reset(self._manner.current, token)
            self._failure = self.unit.unavailable = None  # they hold this frame

    async def send(self, message: Message) -> None:
        """Pass on what the app says, once it is true."""
        if self._replaced:
            return
        kind = message["type"]
        if kind in _STARTS:
            if await self._replaces(message["status"]):
                return
            streams = _may_stream(message)
            await self._decide(message["status"], streams=streams)
            self.unit.loans.cut_off = streams
        elif kind in _CHUNKS:
            if not message.get("more_body", False):
                self.unit.loans.cut_off = False
                await self._give_back()
        elif not self._started and kind in {"websocket.accept", "websocket.close"}:
            await self._shake_hands(_SWITCHED if kind == "websocket.accept" else _FORBIDDEN)
        await self._send(message)

    # -- the answer -------------------------------------------------------------------------------

    async def _decide(self, status: int, *, streams: bool) -> None:
        loans = self.unit.loans
        loans.answered = f" answered {status}"
        loans.refused = status >= 400
        self._status = status
        if self._manner.transactions == "request" and not loans.refused:
            try:
                await loans.commit_all(streams=streams)
            except Exception as error:
                self._failure = error
                raise
        self._started = True

    async def _give_back(self) -> None:
        # What became an error was told as one, by whoever made it one.
        await self.unit.loans.give_all_back(GivenBack() if self._status >= 500 else None)

    async def _shake_hands(self, status: int) -> None:
        await self._decide(status, streams=False)
        await self._give_back()
        if status == _SWITCHED:
            self.unit.loans.over = _websocket_is_open

    def _raise_failure(self) -> None:
        """If the commit failed and the app has not answered with that: raise it for the server."""
        if self._failure is not None and not self._started:
            raise self._failure

    # -- 503 --------------------------------------------------------------------------------------

    async def _has_answered(self, error: BaseException) -> bool:
        """Whether an error that nobody handled is answered here."""
        if self._started or self._is_websocket or not _is_unavailable(error):
            return False
        self.unit.unavailable = error
        return await self._replaces(500)

    async def _replaces(self, status: int) -> bool:
        """Whether the app's 500 for a full pool or an unreachable server has become a 503."""
        error, seconds = self.unit.unavailable, self._manner.retry_after
        if status != 500 or error is None or seconds is None or self._is_websocket:
            return False
        self.unit.unavailable = None  # it holds frames
        _log.error("%s", error, exc_info=error.__cause__)
        self._replaced = self._started = True
        await self.unit.loans.give_all_back(error)
        await _send_503(self._send, seconds)
        return True


async def _send_503(send: Send, seconds: int) -> None:
    body = b"Service Unavailable"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % seconds),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _may_stream(start: Message) -> bool:
    """Whether the body of this answer may come in several chunks, made while they are sent."""
    if start["status"] in _BODILESS:
        return False
    return all(bytes(name).lower() != b"content-length" for name, _ in start.get("headers", ()))


def _is_unavailable(error: BaseException) -> bool:
    """Whether it is one of ours, or a task group's that holds no others."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_unavailable, error.exceptions))
    return isinstance(error, UNAVAILABLE)


def _websocket_is_open() -> MisuseError:
    return MisuseError(
        "a websocket that is open asked for a connection",
        next_step="work in `async with db.unit():`, once per message: a websocket may be open for "
        "hours, and would keep it as long",
    )


def name_of(scope: Scope) -> str:
    """How warnings call a request: by its route if the framework tells, else by its path."""
    route = scope.get("route")
    path = getattr(route, "path_format", None) or getattr(route, "path", None) or scope["path"]
    endpoint = scope.get("endpoint")
    name = getattr(endpoint, "__qualname__", None)
    within = "" if name is None else f" (endpoint {name!r})"
    return f"{scope.get('method', scope['type'])} {path}{within}"


def _reset(current: ContextVar[Unit | None], token: Token[Unit | None]) -> None:
    try:
        current.reset(token)
    except ValueError:  # ended in another context than it began in, as async fixtures are
        current.set(None)
