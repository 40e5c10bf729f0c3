"""Striking a coroutine at a chosen suspension point, and counting these points.

One job: run a coroutine as its task would, and at its k-th suspension do to it what may happen there.
It must not know: pools.
"""

from __future__ import annotations

import asyncio

#: More suspensions than any case has: a case that comes here never ends.
TOO_MANY = 300


class Struck(BaseException):
    """As a KeyboardInterrupt, but nobody else's."""


class Stepped:
    """``await Stepped(coro, ...)``: counts the suspensions of `coro`, and strikes at number `at`.

    Args:
        how: what strikes, one of `WAYS`; None: nothing.

    Attributes:
        suspended: how often it was suspended.
        struck: whether it came to that point.
    """

    def __init__(self, coro, at=0, how=None):
        self.suspended = 0
        self.struck = False
        self._coro = coro
        self._at = at
        self._how = how

    def __await__(self):
        step = self._coro.send
        value = None
        while True:
            try:
                waited_for = step(value)
            except StopIteration as end:
                return end.value
            self.suspended += 1
            assert self.suspended < TOO_MANY, "it suspends for ever"
            if self._strikes():
                self.struck = True
                if self._how in LEAVE:
                    LEAVE[self._how](self._coro)
                    return None
                CANCEL[self._how](waited_for)
            try:
                value = yield waited_for
                step = self._coro.send
            except BaseException as error:
                value, step = error, self._coro.throw

    def _strikes(self):
        if self._how in {None, "cancelled late"}:
            return self._how is not None and self.suspended == self._at
        twice = self._how == "cancelled twice" and self.suspended == self._at + 1
        on_and_on = self._how == "cancelled on and on" and self.suspended > self._at
        return self.suspended == self._at or twice or on_and_on


def _cancel(_waited_for):
    """While it waits."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


def _cancel_late(waited_for):
    """When what it waits for has come, and before it hears of it."""
    task = asyncio.current_task()
    assert task is not None
    if waited_for is None:  # a bare turn of the loop
        asyncio.get_running_loop().call_soon(task.cancel)
    else:
        waited_for.add_done_callback(lambda _future: task.cancel())


def _close(coro):
    """As the garbage collector does, or whoever closes an asynchronous generator."""
    coro.close()


def _interrupt(coro):
    """Something that is no Exception arrives, and the coroutine ends by it, awaiting nothing more."""
    try:
        coro.throw(Struck())
    except Struck:
        return
    except StopIteration:
        raise AssertionError("it swallowed the interrupt") from None
    coro.close()
    raise AssertionError("it went on awaiting after an interrupt")


CANCEL = {
    "cancelled": _cancel,
    "cancelled late": _cancel_late,
    "cancelled twice": _cancel,  # at the next suspension again
    "cancelled on and on": _cancel,  # as AnyIO does: at each suspension from here
}
LEAVE = {"closed": _close, "interrupted": _interrupt}
WAYS = (*CANCEL, *LEAVE)
