"""What a review found and only a real driver or a real server can show.

One job: the findings of the review that `tests/contract/test_reviewed.py` cannot tell over a fake.
"""

from __future__ import annotations

import gc
import os
import socket
import weakref

import pytest
from tests.forks import Child, quiet_libc_fork, until

from penstock import ConnectionPool, PenstockError, PoolTimeout, ServerUnavailable


@pytest.fixture
def no_gc():
    """Only reference counting frees anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def unknown_name(*_args, **_kwargs):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def fail_to_borrow(conninfo, **options):
    """Gives a reference to the pool that could not connect, and what it was told."""
    pool = ConnectionPool(conninfo, **options)
    told = None
    try:
        pool.execute("select 1")
    except PenstockError as error:
        told = type(error)
    return weakref.ref(pool), told


def test_a_pool_whose_server_has_no_such_name_is_freed_by_reference_counting_alone(
    no_gc, monkeypatch
):
    monkeypatch.setattr(socket, "getaddrinfo", unknown_name)
    pool, told = fail_to_borrow("host=no.such.host.invalid dbname=shop", timeout=1.0)
    assert issubclass(told, ServerUnavailable)
    until(lambda: pool() is None, "the pool is freed")


def test_a_pool_whose_socket_does_not_exist_is_freed_by_reference_counting_alone(no_gc, tmp_path):
    pool, told = fail_to_borrow(f"host={tmp_path} dbname=shop", timeout=0.5)
    assert issubclass(told, (ServerUnavailable, PoolTimeout))
    until(lambda: pool() is None, "the pool is freed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_without_hooks_keeps_its_own_file_under_an_inherited_number(tcp_dsn, tmp_path):
    """As a daemon does that closes what it inherited, and opens its log before it borrows."""
    log = tmp_path / "log"
    with ConnectionPool(tcp_dsn, min_size=1, max_size=1) as pool:
        before = pool.execute("select pg_backend_pid()").fetchall()[0][0]
        [slot] = pool._machine.slots()
        number = slot.link.fd
        del slot

        def child():
            os.close(number)
            with log.open("wb", buffering=0) as file:
                if file.fileno() != number:
                    os.dup2(file.fileno(), number)
                os.write(number, b"before ")
                own = pool.execute("select pg_backend_pid()").fetchall()[0][0]
                os.write(number, b"after")
                return own

        own = Child(child, fork=quiet_libc_fork).answer()
        assert own != before
        assert log.read_bytes() == b"before after"
        assert pool.execute("select pg_backend_pid()").fetchall()[0][0] == before
