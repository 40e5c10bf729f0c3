"""What the tests of asyncio drivers share: loops to run on, links that are closed, and cancelling anywhere."""

from __future__ import annotations

import asyncio
import gc
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import uvloop

from penstock._drivers.psycopg3.aio_driver import AsyncPsycopg3Link, driver
from penstock.drivers import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator

SECONDS = 20.0  # a bound for what is expected to work

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def run(main: Coroutine[Any, Any, Any], loop: str = "asyncio") -> Any:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(main)


def async_test(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine function; its argument `loop`, if it has one, says on which."""

    @wraps(test)
    def run_it(**arguments: Any) -> None:
        run(test(**arguments), arguments.get("loop", "asyncio"))

    return run_it


@asynccontextmanager
async def opened(conninfo: str, **options: Any) -> AsyncIterator[AsyncPsycopg3Link]:
    link = await driver.open(Recipe(conninfo=conninfo, **options), SECONDS)
    try:
        yield link
    finally:
        await link.close()


async def one(link: AsyncPsycopg3Link, query: str) -> Any:
    reply = await link.execute(query)
    assert reply.rows is not None
    return reply.rows[0][0]


def descriptors(*, collect: bool = True) -> set[str]:
    if collect:
        gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def registered() -> set[int]:
    """What the running loop waits for; empty where a loop does not tell."""
    selector = getattr(asyncio.get_running_loop(), "_selector", None)
    return set() if selector is None else set(selector.get_map())


async def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + SECONDS
    while not condition():
        assert monotonic() < deadline
        await asyncio.sleep(0)


class CancelledAt:
    """Await something, and have one's own task cancelled when it is suspended for the nth time.

    `late`: not at once but when it would go on, with what it waited for having come.
    """

    def __init__(self, inner: Coroutine[Any, Any, Any], nth: int, *, late: bool = False) -> None:
        self._inner = inner
        self._nth = nth
        self._late = late
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._inner.__await__()
        step: Callable[[], Any] = lambda: steps.send(None)  # noqa: E731
        while True:
            try:
                future = step()
            except StopIteration as ended:
                return ended.value
            self.suspensions += 1
            if self.suspensions == self._nth:
                self._cancel(future)
            try:
                yield future
            except BaseException as error:
                step = _throwing(steps, error)
            else:
                step = lambda: steps.send(None)  # noqa: E731

    def _cancel(self, future: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._late and future is not None:
            future.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


def _throwing(steps: Any, error: BaseException) -> Callable[[], Any]:
    return lambda: steps.throw(error)


async def suspensions_of(work: Coroutine[Any, Any, Any]) -> int:
    counting = CancelledAt(work, 0)
    await counting
    return counting.suspensions


async def was_cancelled(work: Coroutine[Any, Any, Any], nth: int, *, late: bool) -> bool:
    """Run it in a task, cancelled at its nth suspension; whether that is how it ended."""

    async def inside() -> None:
        await CancelledAt(work, nth, late=late)

    task = asyncio.ensure_future(inside())
    done, _ = await asyncio.wait({task}, timeout=SECONDS)
    assert done, "it did not end when it was cancelled"
    return task.cancelled()
