"""pgbench's tables, made by pgbench or, where there is none, the same tables by SQL.

It must not know what is done with them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from pathlib import Path

# pgbench's own proportions: 10 tellers and 100,000 accounts per branch.
TELLERS_PER_BRANCH = 10
ACCOUNTS_PER_BRANCH = 100_000


@dataclass(frozen=True, slots=True)
class Bank:
    """How many rows each table has; ids run from 1."""

    branches: int
    tellers: int
    accounts: int


def create_bank(maintenance: str, bank: str, name: str, scale: int, pgbench: Path | None) -> Bank:
    """Create database `name` and fill it.

    Args:
        maintenance: conninfo of a database that exists.
        bank: conninfo of the database to be made.
        name: its name.
        scale: number of branches.
        pgbench: the binary, or None to make the tables by SQL.
    """
    with psycopg.connect(maintenance, autocommit=True) as conn:
        conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    if pgbench is None:
        _fill_by_sql(bank, scale)
    else:
        _fill_by_pgbench(bank, scale, pgbench)
    return Bank(scale, scale * TELLERS_PER_BRANCH, scale * ACCOUNTS_PER_BRANCH)


def _fill_by_pgbench(bank: str, scale: int, pgbench: Path) -> None:
    # pgbench takes a conninfo string in the place of a database name. A session of its own keeps
    # Ctrl-C away from it: it ends within a second, and the demo ends after it, in order.
    command = [str(pgbench), "--initialize", "--quiet", f"--scale={scale}", bank]
    subprocess.run(
        command, check=True, capture_output=True, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _fill_by_sql(bank: str, scale: int) -> None:
    tellers, accounts = scale * TELLERS_PER_BRANCH, scale * ACCOUNTS_PER_BRANCH
    with psycopg.connect(bank) as conn:
        conn.execute(TABLES)
        conn.execute(
            "insert into pgbench_branches select i, 0 from generate_series(1, %s) i", (scale,)
        )
        conn.execute(
            "insert into pgbench_tellers select i, (i - 1) / %s + 1, 0 from generate_series(1, %s) i",
            (TELLERS_PER_BRANCH, tellers),
        )
        conn.execute(
            "insert into pgbench_accounts"
            " select i, (i - 1) / %s + 1, 0, '' from generate_series(1, %s) i",
            (ACCOUNTS_PER_BRANCH, accounts),
        )
        conn.execute(KEYS)


TABLES = """
create table pgbench_branches (bid int not null, bbalance int, filler char(88));
create table pgbench_tellers (tid int not null, bid int, tbalance int, filler char(84));
create table pgbench_accounts (aid int not null, bid int, abalance int, filler char(84));
create table pgbench_history
    (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));
"""

KEYS = """
alter table pgbench_branches add primary key (bid);
alter table pgbench_tellers add primary key (tid);
alter table pgbench_accounts add primary key (aid);
"""
