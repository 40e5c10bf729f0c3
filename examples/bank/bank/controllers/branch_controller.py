"""Branches."""

from __future__ import annotations

from bank.database import db
from bank.models import Branch

BRANCHES = """
select bid, bbalance, count(tid)::int, round(bbalance::numeric / nullif(count(tid), 0), 2), current_date
from pgbench_branches left join pgbench_tellers using (bid)
group by bid, bbalance order by bid
"""


def get_branches() -> list[Branch]:
    """Answer what each branch holds."""
    return [Branch(*row) for row in db.execute(BRANCHES)]
