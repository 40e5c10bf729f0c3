"""What `statement_timeout_client` relies on in the drivers: where they wait, and by which names."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import psycopg.connection
import psycopg.connection_async
import pytest
from psycopg import waiting
from psycopg2 import extensions

from penstock._drivers.asyncpg.statement_limit import LimitedProtocol
from penstock._drivers.psycopg2 import statement_limit

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


def heard_of(seen: list[int]) -> Generator[Any, Any, str]:
    """One of psycopg's generators, as it were: waits for what never comes, three times."""
    for _ in range(3):
        seen.append((yield waiting.WAIT_R))  # noqa: PERF401  each is told of by itself
    return "told"


@pytest.fixture
def silent() -> Iterator[int]:
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("how", ["wait", "wait_poll", "wait_selector", "wait_select"])
def test_psycopg_tells_its_generator_again_and_again_that_nothing_has_come(
    how: str, silent: int
) -> None:
    seen: list[int] = []
    assert getattr(waiting, how)(heard_of(seen), silent, 0.01) == "told"
    assert seen == [waiting.READY_NONE] * 3


def test_psycopg_does_so_on_asyncio(silent: int) -> None:
    seen: list[int] = []
    assert asyncio.run(waiting.wait_async(heard_of(seen), silent, 0.01)) == "told"
    assert seen == [waiting.READY_NONE] * 3


@pytest.mark.parametrize(
    ("module", "connection", "call"),
    [
        (psycopg.connection, psycopg.Connection, "waiting.wait("),
        (psycopg.connection_async, psycopg.AsyncConnection, "waiting.wait_async("),
    ],
)
def test_psycopg_waits_for_statements_in_one_method(
    module: Any, connection: Any, call: str
) -> None:
    everywhere = inspect.getsource(module).count(call)
    assert everywhere == inspect.getsource(connection.wait).count(call) > 0


def test_asyncpg_reaches_the_wire_by_names_that_are_bounded() -> None:
    folder = Path(asyncpg.__file__).parent
    named: set[str] = set()
    for module in ("connection", "cursor", "prepared_stmt", "transaction"):
        source = (folder / f"{module}.py").read_text(encoding="utf-8")
        named |= set(re.findall(r"\bprotocol\.(\w+)\(", source.replace("_protocol", "protocol")))
    bounded = {name for name in vars(LimitedProtocol) if not name.startswith("_")}
    local = {
        *("_get_timeout", "_is_cancelling", "abort", "get_record_class", "get_server_pid"),
        *("get_settings", "is_connected", "is_in_transaction"),
    }
    # Waits for a request to cancel, which has a limit of its own.
    assert named - local - {"_wait_for_cancellation"} == bounded


LOCAL = {
    extensions.connection: {
        *("cancel", "close", "cursor", "fileno", "get_backend_pid", "get_dsn_parameters"),
        *("get_native_connection", "get_parameter_status", "get_transaction_status"),
        *("isexecuting", "lobject", "poll", "xid"),
    },
    extensions.cursor: {"cast", "mogrify", "nextset", "setinputsizes", "setoutputsize"},
    extensions.lobject: set(),
}
BOUNDED = {
    extensions.connection: statement_limit._OF_CONNECTIONS,
    extensions.cursor: (
        *statement_limit._OF_CURSORS,
        *statement_limit._OF_NAMED,
        *statement_limit._OF_FILES,
    ),
    extensions.lobject: statement_limit._OF_LARGE_OBJECTS,
}


@pytest.mark.parametrize("kind", LOCAL, ids=lambda kind: kind.__name__)
def test_psycopg2_asks_the_server_by_names_that_are_bounded(kind: type[Any]) -> None:
    methods = {
        name
        for name in vars(kind)
        if not name.startswith("__")
        and callable(getattr(kind, name))
        and not isinstance(getattr(kind, name), type)
    }
    assert methods - LOCAL[kind] == set(BOUNDED[kind]) - {"__next__"}
