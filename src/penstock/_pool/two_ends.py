"""What has two ends (a lease, a dedicated connection) serves one block at a time.

One job: the slow half of that rule, away from the hot path: what an enter says while somebody is
inside, what an exit says while nobody is, and the rule itself for interpreters without a global lock.

It must not know: how a slot is found, how a connection is cleaned.

No lock. With a global lock a look and a store with no call between them are one step, since threads
change at calls and jumps back only, and signals strike there: ``if self._slot is not None: ...`` and
``self._slot = ...`` in the next line. Without one, `InTurns` uses `dict.setdefault`, which is one
step everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from penstock._process import fork
from penstock._process.clock import clock
from penstock._process.fork import page

if TYPE_CHECKING:
    from types import TracebackType


class Entering:
    """Stands in a lease from the beginning of its enter to the end of it; false, as no slot is.

    A pool has one per process: one of the parent's says that the thread that was entering is not in
    this process.
    """

    __slots__ = ()

    def __bool__(self) -> Literal[False]:
        return False


def refuse_to_enter(lease: Any) -> None:
    """Raise MisuseError, since somebody is inside of a lease or is entering it.

    Returns where the lease may be entered after all: the block that it was entered for was left in
    this moment, or belongs to the parent of this process (or to an event loop that has ended).
    """
    if not page[0]:
        fork.noticed()
    pool, inside = lease._pool, lease._slot
    try:
        if inside is None:
            return
        if inside is pool._entering:
            why = "its borrower is still waiting"
        elif inside and pool._machine.has(inside):
            why = f"its block has lasted for {clock() - inside.borrowed_at:.1f} s"
        else:
            if lease._slot is inside:
                lease._slot = None
                leave_behind(lease, inside)
            return
    finally:
        del inside  # the error that is raised below holds this frame
    raise entered_twice(pool, "connection", why)


def refuse_to_leave(lease: Any, error: BaseException | None, what: str = "connection") -> None:
    """Raise MisuseError, since nobody is inside of a lease: what was done cannot be committed.

    Returns where a block is left that was entered before a fork, which is the parent's; and where it
    is left by what is no `Exception`, since no error may take the place of a cancellation.
    """
    if error is not None and not isinstance(error, Exception):
        return
    pool = lease._pool
    if _was_left_behind(pool._left_behind, lease):
        return
    raise pool._reporter.misuse(
        f"a block of pool.{what}() ends that nobody is in: it was left before, or never entered; "
        "nothing is committed",
        "leave each block once, where it was entered: use `with`, or contextlib.ExitStack",
    )


def entered_twice(pool: Any, what: str, why: str) -> BaseException:
    """Make the error of an enter while somebody is inside, or is entering."""
    error: BaseException = pool._reporter.misuse(
        f"what pool.{what}() gave was entered while it is entered already ({why}): two blocks would "
        "share one connection",
        f"call pool.{what}() in each `with`; what is kept serves one block at a time, and may be "
        "entered again after that block has ended",
    )
    return error


def leave_behind(lease: Any, inside: Any) -> None:
    """Remember what a lease held before a fork: its block may be left in this process, too."""
    if inside:
        lease._pool._left_behind.append(lease)


def _was_left_behind(left_behind: list[Any], lease: Any) -> bool:
    for index, one in enumerate(left_behind):
        if one is lease:
            del left_behind[index]
            return True
    return False


class InTurns:
    """Makes one with two ends right without a global lock; goes before it among the bases.

    Each round (entered, left) has a dictionary of its own, in which each step is taken once. A thread
    that comes with a round that is over finds its step taken.
    """

    __slots__ = ()

    _round: dict[str, object]

    def __enter__(self: Any) -> Any:
        if not page[0]:
            fork.noticed()
        mine, steps, here = object(), self._round, self._pool._entering
        try:
            if steps.setdefault("entering", mine) is mine:
                steps["process"] = here
                conn = super().__enter__()  # type: ignore[misc]  # of the other base
                steps["entered"] = mine
                return conn
        except BaseException:
            conn = None
            if steps.get("entering") is mine:
                self._begin_anew()
            raise
        self._refuse_to_enter()
        if steps.get("process", here) is here:
            raise entered_twice(self._pool, "connection", "its block is just ending")
        self._round = {}  # a fork has left it behind
        return self.__enter__()

    def __exit__(
        self: Any,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        mine, steps = object(), self._round
        try:
            if "entered" in steps and steps.setdefault("leaving", mine) is mine:
                super().__exit__(exc_type, error, traceback)  # type: ignore[misc]  # as above
                self._round = {}
                return
        except BaseException:
            if steps.get("leaving") is mine:
                self._begin_anew()
            raise
        refuse_to_leave(self, error)

    def _begin_anew(self: Any) -> None:
        """In a guard: what is held still is dropped, and the next block finds nobody inside."""
        self._drop()
        self._round = {}
