"""Servers for the plugin's own tests, and a look at what is left of them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_penstock.postgres import Server, TlsUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED = os.environ.get("PENSTOCK_SEED") or str(random.SystemRandom().randrange(1 << 32))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness of this test's own; PENSTOCK_SEED repeats it."""
    print(f"seed: {SEED}")
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture(scope="session")
def supervisors_of() -> Callable[[int], list[int]]:
    """The processes that own servers which a process started (Linux; elsewhere none is seen)."""

    def found(parent: int) -> list[int]:
        seen = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent_found = status.read_bytes().rpartition(b")")[2].split()[1]
                command = status.with_name("cmdline").read_bytes()
            except OSError:
                continue
            if int(parent_found) == parent and b"_supervisor.py" in command:
                seen.append(int(status.parent.name))
        return seen

    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A shared server: TCP and unix socket, everyone trusted. Leave it as it was."""
    with Server() as running:
        yield running


@pytest.fixture
def fresh_server() -> Iterator[Server]:
    """A server of the test's own."""
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def tls_server() -> Iterator[Server]:
    """A shared server with TLS."""
    try:
        running = Server(tls=True).start()
    except TlsUnavailable as why:
        pytest.skip(f"needs a server with TLS: {why}")
    with running:
        yield running
