"""Reports of an asyncio pool: who holds a connection is a task, and where it stands its coroutine's frame.

One job: find the tasks' names and frames, at the moment of the error.

It must not know: how anything is done. No lock; a task that ends meanwhile is simply not found.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock._pool.reporter import Reporter, holder_report
from penstock._process.stacks import is_plumbing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from penstock._machine.machine import Machine
    from penstock.errors.figures import Hold, Holder

    Loop = asyncio.AbstractEventLoop


class TaskReporter(Reporter):
    """Reports on one asyncio pool.

    Args:
        loop_of: gives the pool's loop, or None while it has none.
    """

    def __init__(
        self, name: str, machine: Machine, driver: Any, loop_of: Callable[[], Loop | None]
    ) -> None:
        super().__init__(name, machine, driver)
        self._loop_of = loop_of

    def _kind(self) -> str:
        return "task"

    def _report(self, holds: list[Hold]) -> list[Holder]:
        tasks = {id(task): task for task in _tasks_of(self._loop_of())}
        frames = {number: frame for number, task in tasks.items() if (frame := _place_of(task))}
        named = [
            replace(hold, thread=tasks[hold.ident].get_name(), kind="task")
            if hold.ident in tasks
            else hold
            for hold in holds
        ]
        return holder_report(named, frames=frames)


def _tasks_of(loop: Loop | None) -> set[asyncio.Task[Any]]:
    if loop is None:
        return set()
    try:
        return asyncio.all_tasks(loop)
    except RuntimeError:  # they changed, in another thread, for as often as it looked
        return set()


def _place_of(task: asyncio.Task[Any]) -> FrameType | None:
    """The innermost frame that is the user's; if none is, the innermost."""
    frames = list(_frames(task.get_coro()))
    users = [frame for frame in frames if not is_plumbing(frame)]
    found = users or frames
    return found[-1] if found else None


def _frames(awaiting: Any) -> Iterator[FrameType]:
    """The frames of a suspended coroutine, outermost first."""
    while awaiting is not None:
        frame = getattr(awaiting, "cr_frame", None) or getattr(awaiting, "gi_frame", None)
        frame = frame or getattr(awaiting, "ag_frame", None)
        if frame is not None:
            yield frame
        awaiting = getattr(awaiting, "cr_await", None) or getattr(awaiting, "gi_yieldfrom", None)
