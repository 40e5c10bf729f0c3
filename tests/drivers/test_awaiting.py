"""Waiting for a descriptor on a loop: exact, both kinds of readiness, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

import pytest
from tests.drivers.async_links import LOOPS, SECONDS, async_test, registered

from penstock._drivers import loop_wait
from penstock._drivers.loop_wait import stop_awaiting, wait
from penstock._process.sockets import READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator

on_both_loops = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def is_free(fd: int) -> bool:
    """Whether the loop waits for it no more. uvloop does not tell."""
    return fd not in registered() and not asyncio.get_running_loop().remove_reader(fd)


Pair = tuple[socket.socket, socket.socket]


@on_both_loops
@async_test
async def test_it_tells_what_came_true(pair: Pair, loop: str) -> None:
    ours, theirs = pair
    deadline = monotonic() + SECONDS
    assert await wait(ours.fileno(), WRITE, deadline) == WRITE
    assert await wait(ours.fileno(), READ | WRITE, deadline) == WRITE
    reading = asyncio.ensure_future(wait(ours.fileno(), READ, inf))
    await asyncio.sleep(0)
    assert not reading.done()
    theirs.send(b"x")
    assert await reading == READ
    theirs.close()
    ours.recv(1)
    assert await wait(ours.fileno(), READ, deadline) == READ  # the end of the stream
    assert is_free(ours.fileno())


@on_both_loops
@async_test
async def test_it_ends_at_the_deadline(
    pair: Pair, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = pair[0].fileno()
    monkeypatch.setattr(loop_wait, "BEAT", 0.06)
    for seconds in (0.05, 0.1):
        started = monotonic()
        assert await wait(fd, READ, started + seconds) == 0
        assert seconds <= monotonic() - started + 0.002 < seconds + 5
    assert await wait(fd, READ, monotonic() - 1) == 0
    assert fd not in registered()
    assert is_free(fd)


@on_both_loops
@async_test
async def test_what_came_while_the_loop_was_blocked_is_seen_though_it_is_late(
    pair: Pair, loop: str
) -> None:
    ours, theirs = pair
    waiting = asyncio.ensure_future(wait(ours.fileno(), READ, monotonic() + 0.02))
    await asyncio.sleep(0)
    theirs.send(b"x")
    time.sleep(0.03)  # noqa: ASYNC251  somebody's code that blocks
    assert await waiting == READ
    assert await wait(ours.fileno(), READ, monotonic() - 1) == READ


@on_both_loops
@async_test
async def test_cancelled_it_leaves_nothing_registered(pair: Pair, loop: str) -> None:
    fd = pair[0].fileno()
    waiting = asyncio.ensure_future(wait(fd, READ, inf))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert is_free(fd)


@on_both_loops
@async_test
async def test_one_that_is_dropped_leaves_nothing_registered(pair: Pair, loop: str) -> None:
    waiting = wait(pair[0].fileno(), READ, inf)
    waiting.send(None)
    waiting.close()
    assert is_free(pair[0].fileno())


@on_both_loops
@async_test
async def test_whoever_takes_our_registration_away_makes_us_late_and_no_more(
    pair: Pair, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_wait, "BEAT", 0.02)
    ours, theirs = pair
    waiting = asyncio.ensure_future(wait(ours.fileno(), READ, inf))
    await asyncio.sleep(0)
    asyncio.get_running_loop().remove_reader(ours.fileno())
    theirs.send(b"x")
    assert await asyncio.wait_for(waiting, SECONDS) == READ


@on_both_loops
@async_test
async def test_a_number_that_the_loop_knows_from_before_is_waited_for_all_the_same(
    loop: str,
) -> None:
    running = asyncio.get_running_loop()
    first, first_peer = socket.socketpair()
    number = first.fileno()
    running.add_reader(number, print)
    running.add_writer(number, print)
    first.close()
    ours, theirs = socket.socketpair()
    moved = ours.fileno() != number
    if moved:
        os.dup2(ours.fileno(), number)
    theirs.send(b"x")
    assert await asyncio.wait_for(wait(number, READ, inf), SECONDS) == READ
    assert await asyncio.wait_for(wait(number, WRITE, inf), SECONDS) == WRITE
    assert is_free(number)
    for each in (first_peer, ours, theirs):
        each.close()
    if moved:
        os.close(number)


@async_test
async def test_nobody_waits_any_more_for_what_is_to_be_closed(pair: Pair) -> None:
    fd = pair[0].fileno()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, print)
    loop.add_writer(fd, print)
    stop_awaiting(fd)
    assert fd not in registered()
    stop_awaiting(fd)


def test_where_no_loop_runs_nobody_waits() -> None:
    stop_awaiting(0)
