"""Calls that block, made aside: few threads, a bounded wait, and nothing that keeps a loop from ending."""

from __future__ import annotations

import asyncio
import os
import threading
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from tests.drivers.async_links import LOOPS, SECONDS, async_test, until

from penstock._drivers import blocking_calls
from penstock._drivers.blocking_calls import SideThreads, call_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

on_both_loops = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    opened = threading.Event()
    yield opened
    opened.set()
    for thread in threading.enumerate():
        if thread.name == "penstock-aside":
            thread.join(SECONDS)


def held_by(gate: threading.Event, answer: Any = None) -> Callable[[], Any]:
    def call() -> Any:
        gate.wait()
        return answer

    return call


@on_both_loops
@async_test
async def test_it_returns_and_raises_what_the_call_does(loop: str) -> None:
    assert await call_aside(None, threading.current_thread, inf) is not threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        await call_aside(None, lambda: 1 / 0, monotonic() + SECONDS)


@on_both_loops
@async_test
async def test_it_is_given_up_at_the_deadline(gate: threading.Event, loop: str) -> None:
    started = monotonic()
    with pytest.raises(TimeoutError):
        await call_aside(None, held_by(gate), started + 0.1)
    assert 0.09 < monotonic() - started < 5


@async_test
async def test_equal_keys_share_one_call_while_it_lasts(gate: threading.Event) -> None:
    threads = SideThreads()
    calls: list[int] = []

    def count() -> int:
        calls.append(1)
        gate.wait()
        return len(calls)

    waiting = [asyncio.ensure_future(threads.call("same", count, inf)) for _ in range(5)]
    await until(lambda: bool(calls))
    waiting[0].cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*waiting[1:]) == [1] * 4
    assert await threads.call("same", count, inf) == 2


@async_test
async def test_a_call_that_hangs_is_joined_no_longer(gate: threading.Event) -> None:
    threads = SideThreads()
    hanging = asyncio.ensure_future(threads.call("same", held_by(gate, "late"), inf))
    await until(lambda: bool(threads._calls) and threads._calls["same"].began < inf)
    with pytest.raises(TimeoutError):
        await threads.call("same", lambda: "joined, never called", monotonic() + 0.02)
    threads._calls["same"].began -= blocking_calls.JOINED_WITHIN
    assert await threads.call("same", lambda: "anew", monotonic() + SECONDS) == "anew"
    gate.set()
    assert await hanging == "late"
    assert not threads._calls
    assert await threads.call("same", lambda: "at last", inf) == "at last"


@async_test
async def test_beyond_the_limit_calls_wait_for_their_turn(gate: threading.Event) -> None:
    threads = SideThreads(limit=2)
    waiting = [
        asyncio.ensure_future(threads.call(number, held_by(gate, number), inf))
        for number in range(6)
    ]
    await asyncio.sleep(0)
    assert sum(each.name == "penstock-aside" for each in threading.enumerate()) == 2
    gate.set()
    assert await asyncio.gather(*waiting) == list(range(6))


@async_test
async def test_a_queued_call_that_nobody_waits_for_is_dropped(gate: threading.Event) -> None:
    threads = SideThreads(limit=1)
    first = asyncio.ensure_future(threads.call("first", held_by(gate), inf))
    await asyncio.sleep(0)
    called: list[str] = []
    with pytest.raises(TimeoutError):
        await threads.call("dropped", lambda: called.append("dropped"), monotonic() + 0.02)
    gate.set()
    await first
    await threads.call("last", lambda: called.append("last"), inf)
    assert called == ["last"]


@async_test
async def test_one_that_comes_back_to_a_queued_call_is_served(gate: threading.Event) -> None:
    threads = SideThreads(limit=1)
    first = asyncio.ensure_future(threads.call("first", held_by(gate), inf))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await threads.call("again", lambda: 1, monotonic() + 0.02)
    again = asyncio.ensure_future(threads.call("again", lambda: 2, inf))
    await asyncio.sleep(0)
    gate.set()
    await first
    assert await again == 1  # the call that was queued


@async_test
async def test_where_no_thread_can_be_had_it_says_so_and_goes_on_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = SideThreads(limit=1)

    def refused(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="thread"):
                await threads.call("key", lambda: 1, inf)
    assert await threads.call("key", lambda: 1, inf) == 1


def test_a_loop_that_has_ended_is_no_loss(gate: threading.Event) -> None:
    async def main() -> None:
        asyncio.ensure_future(call_aside("held", held_by(gate), inf))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(main())
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "penstock-aside":
            thread.join(SECONDS)
            assert not thread.is_alive()


def test_a_forked_child_has_threads_of_its_own(gate: threading.Event) -> None:
    async def main() -> None:
        asyncio.ensure_future(call_aside("held", held_by(gate), inf))  # noqa: RUF006
        await asyncio.sleep(0)
        blocking_calls._process._threads._lock.acquire()
        child = os.fork()
        if child == 0:
            await_in_the_child()
        blocking_calls._process._threads._lock.release()
        _, status = os.waitpid(child, 0)  # noqa: ASYNC222
        assert os.waitstatus_to_exitcode(status) == 0

    asyncio.run(main())


def await_in_the_child() -> None:
    code = 1
    try:
        threads = blocking_calls._process.get()
        loop = asyncio.SelectorEventLoop()
        asyncio._set_running_loop(None)
        answer = loop.run_until_complete(threads.call("held", lambda: 42, monotonic() + SECONDS))
        code = 0 if answer == 42 else 2
    finally:
        os._exit(code)
