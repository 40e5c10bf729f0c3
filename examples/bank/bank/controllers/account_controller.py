"""Accounts: balances and histories.

Every answer carries what was asked (the nonce) back *through the database*, so that a row meant for
another request shows.
"""

from __future__ import annotations

from bank.database import db
from bank.models import Balance, History, Line

BALANCE = "select %s::text, aid, abalance from pgbench_accounts where aid = %s"

NONCE = "select %s::text, aid from pgbench_accounts where aid = %s"

LINES = """
select rtrim(filler), mtime at time zone current_setting('TimeZone'), tid, bid, delta
from pgbench_history where aid = %s order by mtime desc limit %s
"""


def get_balance(aid: int, nonce: str) -> object:
    """Answer what an account holds."""
    row = db.execute(BALANCE, (nonce, aid)).fetchone()
    return Balance(*row) if row else _unknown(aid)


def get_history(aid: int, nonce: str, limit: int = 20) -> object:
    """Answer an account's last transfers: two statements, one connection."""
    row = db.execute(NONCE, (nonce, aid)).fetchone()
    if row is None:
        return _unknown(aid)
    returned, account = row
    return History(returned, account, [Line(*line) for line in db.execute(LINES, (aid, limit))])


def _unknown(aid: int) -> object:
    return {"error": "UnknownAccount", "text": f"there is no account {aid}"}, 404
