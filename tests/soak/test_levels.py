"""What may not grow: planted leaks are noticed, and what comes back to its level is none."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter

from penstock import ConnectionPool
from tests.soak.levels import (
    IN_A_ROW,
    SLACK,
    WARM,
    Growth,
    Level,
    census,
    descriptors,
    resident,
    threads,
)


def warm(level, counts):
    for _ in range(WARM):
        assert level.read(counts) == ""


def test_a_leak_of_one_a_step_is_noticed_once_it_is_beyond_the_slack():
    level = Level("descriptors")
    warm(level, Counter(sockets=3))
    steps = [level.read(Counter(sockets=3 + leaked)) for leaked in range(SLACK + 2)]
    assert steps[:-1] == [""] * (SLACK + 1)
    assert "sockets" in steps[-1]


def test_a_kind_that_was_never_there_is_noticed():
    level = Level("threads", slack=0)
    warm(level, Counter(main=1))
    assert "stranger" in level.read(Counter(main=1, stranger=1))


def test_what_goes_up_and_comes_down_is_no_growth():
    growth = Growth("memory", tolerance=5)
    assert not any(growth.read(value) for value in [50, 70, 90, 60] * 20)


def test_what_climbs_is_growth():
    growth = Growth("memory", tolerance=5)
    steps = [growth.read(100 + each) for each in range(4 * WARM + 2 * IN_A_ROW)]
    assert steps[0] == ""
    assert "memory grows" in steps[-1]


def test_a_leaked_descriptor_is_seen_and_what_it_is():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        before = descriptors(port)
        with socket.create_connection(("127.0.0.1", port)):
            reader, writer = os.pipe()
            after = descriptors(port)
            os.close(reader)
            os.close(writer)
    assert after - before == Counter(connections=1, pipe=2)


def test_a_leaked_thread_is_seen_by_its_name():
    stop = threading.Event()
    before = threads()
    thread = threading.Thread(target=stop.wait, name="leaked-7")
    thread.start()
    after = threads()
    stop.set()
    thread.join()
    assert (after - before)["leaked"] == 1
    assert (after - before)["in the kernel"] >= 1


def test_leaked_objects_are_counted_by_class():
    before = census()
    leaked = [ConnectionPool(open=False) for _ in range(3)]
    after = census()
    assert after["penstock:ConnectionPool"] - before["penstock:ConnectionPool"] == len(leaked)


def test_memory_is_measured_in_megabytes():
    assert 5 < resident() < 5000
