"""A connect that is under way at a fork is the parent's: the child lets go of its socket, and of no other."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.forks import Child, libc_fork, until

from penstock import AsyncConnectionPool, ConnectionPool
from penstock._process import fork

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def sockets_to(port):
    """How many of this process's descriptors are sockets whose other end has this port."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        if not descriptor.is_socket():
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as raw:
            found += raw.getpeername()[1:2] == (port,)
    return found


@pytest.fixture
def mute():
    """A server that takes the start-up message, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as accepted:
        port = listening.getsockname()[1]

        def accept():
            raw, _ = listening.accept()
            accepted.enter_context(raw)
            raw.recv(1000)

        yield port, accept


def look(port, forked_by):
    """In the child: how many are left, once it has noticed."""
    if forked_by is libc_fork:
        fork.noticed()
    return sockets_to(port)


@pytest.mark.parametrize("forked_by", [os.fork, libc_fork], ids=["hooks", "libc"])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_thread_connects_and_another_forks(driver, forked_by, mute):
    port, accept = mute
    dsn = f"host=127.0.0.1 port={port} user=x sslmode=disable gssencmode=disable"
    with ConnectionPool(dsn, driver=driver, min_size=1, name="under-way") as pool:
        accept()
        # libc's fork breaks the GIL of a child if somebody waits for it: nobody does here.
        until(lambda: threading.active_count() >= 2)
        assert sockets_to(port) == 1
        assert Child(lambda: look(port, forked_by), fork=forked_by).answer() == 0
        assert sockets_to(port) == 1, "the parent's is there"
        pool.close(timeout=0)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_task_connects_and_another_forks(driver, mute):
    port, accept = mute
    dsn = f"host=127.0.0.1 port={port} user=x sslmode=disable gssencmode=disable"

    async def main():
        async with AsyncConnectionPool(dsn, driver=driver, min_size=1, name="under-way") as pool:
            await asyncio.to_thread(accept)
            assert sockets_to(port) == 1
            child = Child(lambda: look(port, os.fork))
            assert await asyncio.to_thread(child.answer) == 0
            assert sockets_to(port) == 1, "the parent's is there"
            await pool.close(timeout=0)

    asyncio.run(main())


def test_what_the_program_has_opened_itself_is_left_alone(mute):
    port, accept = mute
    dsn = f"host=127.0.0.1 port={port} user=x sslmode=disable gssencmode=disable"
    with (
        socket.create_connection(("127.0.0.1", port)) as own,
        ConnectionPool(dsn, driver="psycopg2", min_size=1, name="under-way") as pool,
    ):
        own.send(b"x")
        accept()
        accept()
        assert sockets_to(port) == 2
        assert Child(lambda: look(port, os.fork)).answer() == 1
        pool.close(timeout=0)
