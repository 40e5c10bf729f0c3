"""A connection of its own, outside the pool's size, for one ``async with`` block.

One job: open it, commit or roll back at the end, and end the session whatever ends the block.

A class and no `@asynccontextmanager`: before 3.13 a coroutine that is closed, or destroyed, while
it waits inside of an asynchronous generator does not reach the generator's `except` and `finally`,
and the session would stay open for good.

It must not know: slots, the machine. No lock.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from penstock._machine.machine import Phase
from penstock._machine.progress import CONNECT_SECONDS
from penstock._pool.two_ends import entered_twice, leave_behind, refuse_to_leave
from penstock._process.clock import clock
from penstock._process.fork import notice_fork

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from penstock._pool.aio.borrowing import AsyncBorrowing

ConnT = TypeVar("ConnT")


class AsyncDedicated(Generic[ConnT]):
    """``async with pool.dedicated() as conn``."""

    __slots__ = ("_autocommit", "_link", "_pool", "_seconds")

    def __init__(self, pool: AsyncBorrowing, seconds: float, autocommit: bool | None) -> None:
        self._pool = pool
        self._seconds = seconds
        self._autocommit = autocommit
        self._link: Any = None

    async def __aenter__(self) -> ConnT:
        notice_fork()
        if self._link is not None:
            self._refuse_to_enter()
        self._link = self._pool._entering
        link = None
        try:
            link = await _opened(self._pool, self._seconds)
            link.lend()
            if self._autocommit is not None:
                link.set_autocommit(self._autocommit)
        except BaseException:
            self._link = None
            if link is not None:
                link.discard()  # nobody will leave the block
            raise
        self._link = self._pool._dedicated[id(link)] = link
        return link.conn  # type: ignore[no-any-return]  # a link is opaque to the pool

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        link = self._link
        if not link:
            refuse_to_leave(self, error, "dedicated")
            return
        self._link = None
        notice_fork()
        if self._pool._dedicated.pop(id(link), None) is None:
            return  # it is the parent's
        try:
            if error is None:
                await link.commit()
        except Exception:
            await link.close()
            raise
        except BaseException:
            link.discard()
            raise
        if error is None or isinstance(error, Exception):
            await link.close()
        else:
            link.discard()  # at once: nobody who is cancelled is kept waiting

    def _refuse_to_enter(self) -> None:
        """Somebody is inside: MisuseError, unless a fork or the end of a loop has left it behind."""
        link = self._link
        if link is self._pool._entering:
            raise entered_twice(self._pool, "dedicated", "its borrower is still waiting")
        if link and id(link) in self._pool._dedicated:
            raise entered_twice(self._pool, "dedicated", "its block has not ended")
        self._link = None
        leave_behind(self, link)


async def opened_aside(connecting: Coroutine[Any, Any, Any]) -> Any:
    """The link that `connecting` opens, in a task of its own; whoever waits may vanish at any moment.

    Drivers see to a cancellation, but not all to a coroutine that is closed or destroyed (asyncpg's
    connect leaves its socket open then). A task can only be cancelled.
    """
    task = asyncio.get_running_loop().create_task(connecting)
    try:
        await asyncio.wait({task})
    except BaseException:
        task.add_done_callback(_drop)
        task.cancel()
        raise
    return task.result()


def _drop(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().discard()


async def _opened(pool: AsyncBorrowing, seconds: float) -> Any:
    notice_fork()
    pool._refuse_other_loops()
    if pool._machine.phase is Phase.CLOSED:
        raise pool._reporter.closed()
    pool._join_loop()  # whose end it does not outlive
    began = clock()
    try:
        return await opened_aside(pool._opener.without_limit().open(min(seconds, CONNECT_SECONDS)))
    except Exception as error:  # noqa: BLE001  whatever it is, it is explained
        failure = await pool._opener.explain(error)
    raise pool._reporter.not_opened(failure, clock() - began)
