"""Transfers, as TPC-B makes them: all five statements, or none."""

from __future__ import annotations

from typing import Any

from bank.database import db
from bank.models import Receipt

TRANSFER = (
    "update pgbench_accounts set abalance = abalance + %(delta)s where aid = %(aid)s",
    "update pgbench_tellers set tbalance = tbalance + %(delta)s where tid = %(tid)s",
    "update pgbench_branches set bbalance = bbalance + %(delta)s where bid = %(bid)s",
    """insert into pgbench_history (tid, bid, aid, delta, mtime, filler)
       values (%(tid)s, %(bid)s, %(aid)s, %(delta)s, current_timestamp, %(id)s)""",
)

RECEIPT = "select %(nonce)s::text, %(id)s::text, abalance from pgbench_accounts where aid = %(aid)s"


def make_transfer(body: dict[str, Any]) -> Receipt:
    """Move money. The answer commits it: who gets no answer with status 200 has not moved any."""
    for statement in TRANSFER:
        db.execute(statement, body)
    return Receipt(*db.execute(RECEIPT, body).fetchone())
