"""What all tests share: one PostgreSQL per session, fresh ones on request, and a known seed.

Its one job: fixtures that give servers and take them away. It must not know: pools. It imports
no driver, because tests/machine runs where none is installed. It holds no lock.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_penstock.postgres import (
    SOURCES,
    Binaries,
    Server,
    ServerNotFound,
    TlsUnavailable,
    find_binaries,
)
from tests.wire import WireProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = int(os.environ.get("PENSTOCK_SEED") or random.SystemRandom().randrange(1 << 32))
os.environ["PENSTOCK_SEED"] = str(SEED)  # the workers of pytest-xdist have the one that is printed


def pytest_configure(config: pytest.Config) -> None:
    """Make hypothesis use the seed that is printed, unless it was given one; and let SIGINT interrupt.

    `nohup make test &`, and some CI systems, start it with SIGINT ignored, which every child inherits.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, "hypothesis_seed", "absent") is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"seed: {SEED} (again: PENSTOCK_SEED={SEED})"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness of this test's own: the same for a seed, whichever tests run before it."""
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture(scope="session", autouse=True)
def no_server_left_behind() -> Iterator[None]:
    """At the end no server of this process runs; fixtures made later are gone by then."""
    yield
    deadline = time.monotonic() + 10
    while (left := supervisors_of(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"a test closed its server too late or never; supervisors left: {left}"


@pytest.fixture(scope="module", autouse=True)
def handlers_as_before() -> Iterator[None]:
    """What a framework puts on the root logger goes with the module that made it.

    A handler with a queue has a lock that an interrupt can leave held: a test of interrupts hung at it.
    """
    before = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = [each for each in logging.root.handlers if each in before]


def supervisors_of(parent: int) -> list[int]:
    """The processes that own servers which this process started (Linux; elsewhere none is seen)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent_found = status.read_bytes().rpartition(b")")[2].split()[1]
            command = status.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(parent_found) == parent and b"_supervisor.py" in command:
            found.append(int(status.parent.name))
    return found


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The session's shared server: TCP and unix socket, everyone trusted. Leave it as it was."""
    with Server(settings={"max_connections": 200}) as running:
        yield running


@pytest.fixture(scope="session")
def tls_server() -> Iterator[Server]:
    """A shared server with TLS: `conninfo(over="tls")`."""
    try:
        running = Server(tls=True, binaries=binaries_with_tls()).start()
    except TlsUnavailable as why:
        pytest.skip(f"needs a server with TLS: {why}")
    with running:
        yield running


def binaries_with_tls() -> Binaries | None:
    """The first PostgreSQL found that has TLS; None leaves it to the server to say what is missing."""
    for source in SOURCES:
        try:
            found = find_binaries(sources=[source])
        except ServerNotFound:
            continue
        if found.has_tls:
            return found
    return None


@pytest.fixture
def fresh_server() -> Iterator[Server]:
    """A server of the test's own, to restart, kill, pause and fill."""
    with Server() as running:
        yield running


@pytest.fixture
def tcp_dsn(server: Server) -> str:
    return server.conninfo(over="tcp")


@pytest.fixture
def unix_dsn(server: Server) -> str:
    return server.conninfo(over="unix")


@pytest.fixture
def proxy(server: Server) -> Iterator[WireProxy]:
    """A counting, breakable way to the shared server: `server.conninfo(port=proxy.port)`."""
    with WireProxy("127.0.0.1", server.port) as running:
        yield running
