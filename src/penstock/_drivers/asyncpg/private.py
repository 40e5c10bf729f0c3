"""The private names of asyncpg that its driver relies on.

tests/drivers/test_asyncpg_assumptions.py holds what each means.
It must not know: what the driver does with them. No lock: it changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import asyncpg
from asyncpg import connect_utils, connection
from asyncpg.protocol import protocol

from penstock._drivers.private import Library

if TYPE_CHECKING:
    from collections.abc import Mapping

_WIRE: Final = "the way to the wire, which a return takes away"
_LISTENERS: Final = "listeners that a return takes away"
_CACHE: Final = "the statement cache"
_END: Final = "how asyncpg ends a session"
_CANCEL: Final = "a request to cancel that the pool makes itself"


def _owners() -> Mapping[str, Any]:
    return {
        "Connection": connection.Connection,
        "_Atomic": getattr(connection, "_Atomic", None),
        "_StatementCache": getattr(connection, "_StatementCache", None),
        "_ConnectionParameters": getattr(connect_utils, "_ConnectionParameters", None),
        "Protocol": protocol.Protocol,
        "PreparedStatementState": getattr(protocol, "PreparedStatementState", None),
    }


LIBRARY: Final = Library(
    name="asyncpg",
    least="0.30.0",
    why="the first whose sessions can be cleaned without a round trip",
    newest="0.32",
    version=lambda: str(asyncpg.__version__),
    owners=_owners,
    names={
        "Connection": {
            "_protocol": _WIRE,
            "_transport": "the socket",
            "_loop": "the event loop that it belongs to",
            "_check_open": "where a returned connection raises",
            "_aborted": _END,
            **dict.fromkeys(("_abort", "_cleanup", "_mark_stmts_as_closed"), _END),
            "_pool_release_ctr": "has a returned connection's cursors and statements raise",
            "_proxy": "tells that a connection is another pool's",
            "_top_xact": "tells that a transaction is open",
            "_stmt_exclusive_section": "tells that a statement is under way",
            **dict.fromkeys(("_listeners", "_log_listeners", "_termination_listeners"), _LISTENERS),
            "_query_loggers": _LISTENERS,
            "_execute": "statements of the pool's own",
            "_do_execute": "sees the errors that a migration causes",
            **dict.fromkeys(("_copy_in", "_copy_out"), "tells that a COPY is under way"),
            "_reset": "asyncpg's own reset, which takes listeners away",
            **dict.fromkeys(("_cancel", "_cancel_current_command", "_cancellations"), _CANCEL),
            **dict.fromkeys(("_addr", "_params", "_config"), _CANCEL),
            **dict.fromkeys(("_stmt_cache", "_drop_local_statement_cache"), _CACHE),
            **dict.fromkeys(("_drop_local_type_cache", "_drop_global_type_cache"), "the cache of types"),
            "_drop_global_statement_cache": _CACHE,
        },
        "_Atomic": {"_acquired": "tells that a statement is under way"},
        "_StatementCache": {"_on_remove": "has guard=True's new object close the old one's statements"},
        "_ConnectionParameters": dict.fromkeys(("database", "sslmode", "ssl"), _CANCEL),
        "Protocol": {
            "_is_cancelling": "tells that a request to cancel is under way",
            "_wait_for_cancellation": "waits for its answer",
            **dict.fromkeys(("backend_pid", "backend_secret"), _CANCEL),
        },
        "PreparedStatementState": {"_get_attributes": "the names of an answer's columns"},
    },
)  # fmt: skip
