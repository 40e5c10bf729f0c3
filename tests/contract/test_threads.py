"""What every runtime promises its borrowers, over a server that does as it is told."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import threading

import pytest

from penstock import (
    ConnectionPool,
)
from penstock.testing import FakeDriver


def test_a_pool_travels_to_another_process_as_a_new_pool_with_its_options(fake):
    pytest.importorskip(
        "psycopg", reason="only a driver by name travels, and each needs its library"
    )
    pool = ConnectionPool("host=db", min_size=2, max_size=7, name="shop")
    copy = pickle.loads(pickle.dumps(pool))
    assert repr(copy) == repr(pool)
    assert copy.stats().min_size == 2


def test_a_dropped_pool_lets_go_of_its_connections(fake):
    pool = ConnectionPool(driver=FakeDriver(fake), min_size=1)
    pool.execute("select 1")
    link = next(iter(fake.sessions.values()))
    fake.sessions.clear()
    assert link.fd >= 0
    del pool
    gc.collect()


def test_a_closed_connections_number_used_again_does_not_cost_the_new_one_its_watch(fake):
    """libpq closes a broken connection's socket by itself: another may have the number already."""
    from penstock._process import watch

    told = []
    watcher = watch.Watch(lambda token, _fd: told.append(token))
    one, two = server_socket_pairs()
    first = watcher.add(one[0].fileno(), "old")
    number = one[0].fileno()
    one[0].close()
    os.dup2(two[0].fileno(), number)
    second = watcher.add(number, "new")
    watcher.remove(number, first)
    two[1].close()
    watcher.sweep()
    assert second != first
    assert "new" in told
    watcher.close()
    os.close(number)
    two[0].close()
    one[1].close()


def server_socket_pairs():
    return socket.socketpair(), socket.socketpair()


def test_the_pool_unwatches_a_connection_by_its_serial(make_pool, monkeypatch, until):
    from penstock._process import watch

    removed = []
    remove = watch.Watch.remove

    def noting(self, fd, serial=0):
        removed.append(serial)
        return remove(self, fd, serial)

    monkeypatch.setattr(watch.Watch, "remove", noting)
    pool = make_pool(min_size=0)
    pool.execute("select 1")
    pool.drain()
    until(lambda: pool.stats().size == 0)
    assert len(removed) == 1
    assert removed[0] > 0


def test_a_lease_that_another_thread_will_end_is_no_deadlock(make_pool, until):
    """Executors run the two halves of a dependency in different threads."""
    pool = make_pool(max_size=1)
    entered = threading.Event()
    served = []

    def enter(lease):
        lease.__enter__()
        entered.set()
        # The same thread asks again, for another request, while the first one is still on its way.
        with pool.connection() as conn:
            served.append(conn)

    lease = pool.connection()
    thread = threading.Thread(target=enter, args=(lease,))
    thread.start()
    assert entered.wait(20)
    until(lambda: pool.stats().waiting == 1)
    lease.__exit__(None, None, None)
    thread.join(20)
    assert len(served) == 1


def test_a_child_that_leaves_the_parents_block_ends_nothing(make_pool, fake):
    pool = make_pool()
    with pool.connection() as conn:
        conn.execute("insert")
        pool.after_fork_in_child()  # as the hook does, in this very process
    assert [text for _, text in fake.statements] == ["insert"]
    fake.sessions.clear()
