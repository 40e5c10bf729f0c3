"""One connection outside the pool's size, for one block: `pool.dedicated()`.

One job: have a worker connect while the caller waits, and close what comes too late; commit at the
block's end, and close the session whatever ends the block.

It must not know: slots, the machine. `Opening._lock` guards who is late: the worker that brings the
connection, or the caller who has gone. `Dedicated` takes none (see _pool/two_ends.py).
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from penstock._machine.machine import Phase
from penstock._machine.progress import CONNECT_SECONDS, Progress
from penstock._pool.opener import Failure, explain_hanging
from penstock._pool.sync.executor import prepare_drivers
from penstock._pool.two_ends import (
    InTurns,
    entered_twice,
    leave_behind,
    refuse_to_leave,
)
from penstock._process import keeper, runtime
from penstock._process.clock import clock
from penstock._process.fork import notice_fork

if TYPE_CHECKING:
    from types import TracebackType

    from penstock._pool.opener import Opener
    from penstock._pool.reporter import Reporter
    from penstock._pool.sync.borrowing import Borrowing

ConnT = TypeVar("ConnT")


class Opening:
    """A connection outside the pool being opened in a worker; whoever wanted it may be gone."""

    def __init__(self, opener: Opener, seconds: float) -> None:
        self._opener = opener
        self._seconds = min(seconds, 1e9)
        self._progress = Progress(clock(), self._seconds)
        self._answer = runtime.gate()
        self._lock = runtime.Lock()
        self._given_up = False

    def run(self) -> None:
        """In a worker."""
        prepare_drivers()
        try:
            seconds = min(self._seconds, CONNECT_SECONDS)
            answer = self._opener.open(seconds, progress=self._progress)
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            answer = self._opener.explain(error)
        with self._lock:
            late = self._given_up
            self._answer.put(answer)
        if late and not isinstance(answer, Failure):
            answer.close()

    def wait(self, reporter: Reporter) -> Any:
        """Give the link, or raise ServerUnavailable within the time."""
        try:
            answer = self._answer.get(timeout=self._seconds)
        except queue.Empty:
            answer = None
        except BaseException:
            self._give_up()
            raise
        if answer is None:
            answer = self._give_up()
        if answer is None and self._progress.doing is not None:
            answer = explain_hanging(self._progress)
        if answer is None or not hasattr(answer, "lend"):
            raise reporter.not_opened(answer, self._seconds)
        return answer

    def _give_up(self) -> Any:
        with self._lock:
            self._given_up = self._progress.taken_back = True
            try:
                return self._answer.get(False)
            except queue.Empty:
                return None


class Dedicated(Generic[ConnT]):
    """``with pool.dedicated() as conn``."""

    __slots__ = ("_autocommit", "_link", "_pool", "_seconds")

    def __init__(self, pool: Borrowing, seconds: float, autocommit: bool | None) -> None:
        self._pool = pool
        self._seconds = seconds
        self._autocommit = autocommit
        self._link: Any = None

    def __enter__(self) -> ConnT:
        notice_fork()
        if self._link is not None:
            self._refuse_to_enter()
            return self.__enter__()
        self._link = self._pool._entering
        try:
            link = _opened(self._pool, self._seconds)
            self._link = self._pool._dedicated[id(link)] = link
            link.lend()
            if self._autocommit is not None:
                link.set_autocommit(self._autocommit)
            return link.conn  # type: ignore[no-any-return]  # a link is opaque to the pool
        except BaseException:
            self._drop()
            raise

    def __exit__(
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
        try:
            notice_fork()
            if error is None and id(link) in self._pool._dedicated:  # else it is the parent's
                link.commit()
        finally:
            notice_fork()
            if self._pool._dedicated.pop(id(link), None) is not None:
                link.close()

    def _refuse_to_enter(self) -> None:
        """Somebody is inside: MisuseError, unless a fork has left him behind."""
        link = self._link
        if link is None:
            return
        if link is self._pool._entering:
            raise entered_twice(self._pool, "dedicated", "its borrower is still waiting")
        if link and id(link) in self._pool._dedicated:
            raise entered_twice(self._pool, "dedicated", "its block has not ended")
        if self._link is link:
            self._link = None
            leave_behind(self, link)

    def _drop(self) -> None:
        """In a guard: end what was opened."""
        link, self._link = self._link, None
        if link and self._pool._dedicated.pop(id(link), None) is not None:
            link.close()


class DedicatedInTurns(InTurns, Dedicated[ConnT]):
    """`Dedicated` for interpreters without a global lock."""

    __slots__ = ("_round",)

    def __init__(self, pool: Borrowing, seconds: float, autocommit: bool | None) -> None:
        super().__init__(pool, seconds, autocommit)
        self._round: dict[str, object] = {}


def _opened(pool: Borrowing, seconds: float) -> Any:
    notice_fork()
    if pool._machine.phase is Phase.CLOSED:
        raise pool._reporter.closed()
    opening = Opening(pool._opener.without_limit(), seconds)
    keeper.current().submit(opening.run)
    return opening.wait(pool._reporter)
