"""Threads, gevent and asyncio behind one face, so that a scenario is written once.

One job: run a coroutine, start others beside it, let it wait, and give it pools whose methods are
awaited. On threads (and in greenlets, which are threads there) nothing of that suspends: a
coroutine is driven by one `send`, and blocks where asyncio would suspend.

It must not know: drivers, scenarios. What is here is called, not imported, by gevent's child process,
which has patched the standard library before.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from typing import Any

from penstock import ConnectionPool

#: How long anything waits for something else: a failure's price, never a pass mark.
PATIENCE = 20.0

#: How long to wait before a condition is looked at again.
A_MOMENT = 0.002


def driven(coro):
    """What a coroutine gives that never suspends."""
    try:
        coro.send(None)
    except StopIteration as end:
        return end.value
    coro.close()
    raise AssertionError("something was awaited that is asyncio's")


class Threads:
    """Also gevent, where the standard library is patched."""

    name = "threads"
    asynchronous = False
    event = threading.Event

    def run(self, coro):
        return driven(coro)

    def spawn(self, coro):
        return ThreadFlight(coro)

    async def pause(self, seconds=A_MOMENT):
        time.sleep(seconds)  # noqa: ASYNC251  this coroutine is a thread's

    async def wait_for(self, event):
        return event.wait(PATIENCE)

    def pool(self, *args, **options):
        return AsAsync(ConnectionPool(*args, **options))

    def callable(self, function):
        """A coroutine function as this runtime's pool takes it."""

        def plain(*args):
            return driven(function(*args))

        return plain

    def stub(self, value):
        """In the place of a link's method that may wait."""
        return lambda *_args: value

    def identity(self):
        return threading.get_ident()


class Gevent(Threads):
    name = "gevent"


class Asyncio:
    name = "asyncio"
    asynchronous = True
    event = asyncio.Event

    def __init__(self):
        self.unseen: list[str] = []  # what the loop's exception handler was told

    def loop_factory(self):
        return asyncio.new_event_loop()

    def run(self, coro):
        """Run it to its end; nothing may be left running, and nothing may have failed unseen."""
        unseen = self.unseen

        async def play():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _loop, context: unseen.append(str(context)))
            result = await coro
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if left:  # what was asked to end may be at it
                await asyncio.wait(left, timeout=PATIENCE)
            assert not [task for task in left if not task.done()], f"left running: {left}"
            return result

        with asyncio.Runner(loop_factory=self.loop_factory) as runner:
            result = runner.run(play())
        assert not unseen, unseen
        return result

    def spawn(self, coro):
        return TaskFlight(coro)

    async def pause(self, seconds=A_MOMENT):
        await asyncio.sleep(seconds)

    async def wait_for(self, event):
        try:
            async with asyncio.timeout(PATIENCE):
                return await event.wait()
        except TimeoutError:
            return False

    def pool(self, *args, **options):
        from penstock import AsyncConnectionPool

        return AsyncConnectionPool(*args, **options)

    def callable(self, function):
        return function

    def stub(self, value):
        async def answer(*_args):
            return value

        return answer

    def identity(self):
        return id(asyncio.current_task())


class Eager(Asyncio):
    """From 3.12 on: tasks that run at once, in the middle of who makes them."""

    name = "eager"
    there = hasattr(asyncio, "eager_task_factory")

    def loop_factory(self):
        loop = asyncio.new_event_loop()
        loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  3.11 has none
        return loop


class Uvloop(Asyncio):
    name = "uvloop"

    def loop_factory(self):
        import uvloop

        return uvloop.new_event_loop()


class ThreadFlight:
    """Something under way beside the scenario."""

    def __init__(self, coro):
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(coro,), daemon=True)
        self.thread.start()

    def _run(self, coro):
        try:
            self.result = driven(coro)
        except BaseException as error:
            self.error = error

    @property
    def done(self):
        return not self.thread.is_alive()

    async def join(self):
        self.thread.join(PATIENCE)
        assert self.done, "it does not come to its end"
        return self


class TaskFlight:
    """The same, a task."""

    def __init__(self, coro):
        self.result: Any = None
        self.error: BaseException | None = None
        self.task = asyncio.get_running_loop().create_task(self._run(coro))

    async def _run(self, coro):
        try:
            self.result = await coro
        except BaseException as error:
            self.error = error

    @property
    def done(self):
        return self.task.done()

    async def join(self):
        await asyncio.wait({self.task}, timeout=PATIENCE)
        assert self.done, "it does not come to its end"
        return self


class AsAsync:
    """A `ConnectionPool` as `AsyncConnectionPool` spells it; what waits is awaited."""

    def __init__(self, pool):
        self.__dict__["sync"] = pool

    def __getattr__(self, name):
        return getattr(self.sync, name)

    def __repr__(self):
        return repr(self.sync)

    def connection(self, *args, **options):
        return Entered(self.sync.connection(*args, **options))

    def dedicated(self, *args, **options):
        return Entered(self.sync.dedicated(*args, **options))

    async def getconn(self, *args, **options):
        return self.sync.getconn(*args, **options)

    async def putconn(self, conn):
        self.sync.putconn(conn)

    async def execute(self, *args, **options):
        return self.sync.execute(*args, **options)

    async def open(self, *args, **options):
        self.sync.open(*args, **options)

    async def close(self, *args, **options):
        self.sync.close(*args, **options)

    async def drain(self):
        self.sync.drain()

    async def resize(self, *args, **options):
        self.sync.resize(*args, **options)

    async def __aenter__(self):
        self.sync.__enter__()
        return self

    async def __aexit__(self, *exc):
        return self.sync.__exit__(*exc)


class Entered:
    """A block of `with` as one of `async with`."""

    def __init__(self, block):
        self.block = block

    async def __aenter__(self):
        return self.block.__enter__()

    async def __aexit__(self, *exc):
        return self.block.__exit__(*exc)


async def settled(value):
    """What a call gives, be it there or to be awaited."""
    return await value if inspect.isawaitable(value) else value
