"""The private names of psycopg 3 that its drivers rely on.

tests/drivers/test_third_party_assumptions.py and test_psycopg3_async_assumptions.py hold what each means.
It must not know: what the drivers do with them. No lock: it changes nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from penstock._drivers.private import Library, parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_SETTING: Final = "a setting that a return sets back"
_BLOCK: Final = "tells that somebody is inside a block of the connection"
_HANDLERS: Final = "handlers that a return takes away"
# Older ones hand out notifications by notifies() only, and keep none.
_BACKLOG: Final = (
    {"_notifies_backlog": f"{_BLOCK}, and keeps the last borrower's notifications"}
    if parts_of(psycopg.__version__) >= (3, 2, 4)
    else {}
)
_PREPARED: Final = "the prepared statements that a rollback, a reset and a migration end"
_CONNECT: Final = "psycopg's own way to connect, told from a tracer's"


def _owners() -> Mapping[str, Any]:
    # Of connections that are closed: what they are made of needs no server.
    handle: Any = SimpleNamespace(status=pq.ConnStatus.BAD, transaction_status=0)
    made = psycopg.Connection(handle)
    return {
        "Connection": made,
        "AsyncConnection": psycopg.AsyncConnection,
        "Connection._prepared": getattr(made, "_prepared", None),
        "Cursor": psycopg.Cursor,
        "pq.PGconn": pq.PGconn,
    }


LIBRARY: Final = Library(
    name="psycopg",
    least="3.2.1",
    why="the first one that pip installs with psycopg[binary]",
    newest="3.3",
    version=lambda: psycopg.__version__,
    owners=_owners,
    names={
        "Connection": {
            **dict.fromkeys(("_autocommit", "_isolation_level", "_read_only", "_deferrable"), _SETTING),
            "_adapters": _SETTING,
            "_begin_statement": "psycopg's cache of what the settings mean",
            "_tpc": "the two-phase transaction that a return forgets",
            **dict.fromkeys(("_num_transactions", "_pipeline"), _BLOCK),
            **_BACKLOG,
            **dict.fromkeys(("_notice_handlers", "_notify_handlers"), _HANDLERS),
            **dict.fromkeys(("_notice_handler", "_notify_handler"), "what guard=True has a new object hear"),
            "_prepared": _PREPARED,
            "_closed": 'tells "closed" from "broken"',
            "_check_connection_ok": "where a returned connection raises",
            "_get_tx_start_command": "begins a transaction with its isolation level",
            **dict.fromkeys(("_connect_gen", "_get_connection_params"), _CONNECT),
        },
        "AsyncConnection": {
            "_check_connection_ok": "where a returned connection raises",
            **dict.fromkeys(("_connect_gen", "_get_connection_params"), _CONNECT),
        },
        "Connection._prepared": dict.fromkeys(("clear", "key", "_names", "_counts", "_to_flush"), _PREPARED),
        "Cursor": dict.fromkeys(("_tx", "_convert_query"), "tells which statement a migration ended"),
        "pq.PGconn": {"_encoding": "the language of an error's text"},
    },
)  # fmt: skip
