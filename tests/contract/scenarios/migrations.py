"""What a pool does when a migration changes tables and types under connections that are open.

A statement that was prepared before fails on each of them, once it is used; drivers do not forget it by
themselves in autocommit. One borrower may meet that, in a transaction or a block of autocommit; the pool's
other connections forget what they prepared before somebody else meets it. `execute` shows no error at all.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.contract.databases import pool_name
from tests.contract.scenarios import scenario

CONNECTIONS = 3


def real_scenario(play):
    """For real databases: only they know what was prepared."""

    async def played(w):
        if not w.db.fake:
            await play(w)

    played.__name__ = play.__name__
    return scenario(played)


class Shop:
    """A table of its own, and a pool all of whose connections know it."""

    def __init__(self, w: Any, **options: Any) -> None:
        self.w = w
        self.name = pool_name().replace("-", "_")
        self.query = f"select * from {self.name}"
        self.pool = w.pool(max_size=CONNECTIONS, **w.db.prepares, **options)
        self.columns = 0

    def do(self, statement: str) -> None:
        self.w.db.admin.execute(statement)

    def migrate(self) -> None:
        self.columns += 1
        self.do(f"alter table {self.name} add column c{self.columns} int")

    async def ask_everywhere(self, query: str, **options: Any) -> int:
        """Ask over all connections, one after the other while they are all lent; how many said an error."""
        borrowers = [self.w.borrow(self.pool, **options) for _ in range(CONNECTIONS)]
        errors = 0
        for borrower in borrowers:
            conn = (await borrower.wait()).conn
            try:
                await self.w.ask(conn, query)
            except Exception:
                errors += 1
        for borrower in borrowers:
            await borrower.end()
        return errors

    async def fail(self, query: str, times: int, **options: Any) -> int:
        """Ask in one block after the other; how many said an error."""
        errors = 0
        for _ in range(times):
            try:
                async with self.pool.connection(**options) as conn:
                    await self.w.ask(conn, query)
            except Exception:
                errors += 1
        return errors


@asynccontextmanager
async def shop(w, **options):
    made = Shop(w, **options)
    made.do(f"create table {made.name} (id int)")
    try:
        for _ in range(2):
            assert await made.ask_everywhere(made.query, autocommit=True) == 0
        yield made
    finally:
        await made.pool.close()
        made.do(f"drop table {made.name}")


@real_scenario
async def execute_answers_after_a_migration_over_every_connection(w):
    async with shop(w) as s:
        for _ in range(3):
            s.migrate()
            for _ in range(2 * CONNECTIONS):
                assert not (await s.pool.execute(s.query)).fetchall()
            assert await s.ask_everywhere(s.query, autocommit=True) == 0
        assert s.pool.stats().opened == CONNECTIONS, "no connection was given up for it"


@real_scenario
async def one_block_in_autocommit_meets_a_migration_and_no_other(w):
    async with shop(w) as s:
        for _ in range(3):
            s.migrate()
            assert await s.fail(s.query, 4, autocommit=True) <= 1
            assert await s.ask_everywhere(s.query, autocommit=True) == 0
        assert s.pool.stats().opened == CONNECTIONS


@real_scenario
async def one_transaction_meets_a_migration_and_no_other(w):
    async with shop(w) as s:
        for _ in range(3):
            s.migrate()
            assert await s.fail(s.query, 4, **w.db.transaction) <= 1
            assert await s.ask_everywhere(s.query, **w.db.transaction) == 0
        assert s.pool.stats().opened == CONNECTIONS


@real_scenario
async def a_connection_lent_during_a_migration_has_forgotten_when_it_is_lent_again(w):
    async with shop(w) as s:
        holder = await w.borrow(s.pool, autocommit=True).wait()
        s.migrate()
        assert await s.fail(s.query, 4, autocommit=True) <= 1
        await holder.end()
        assert await s.ask_everywhere(s.query, autocommit=True) == 0


@real_scenario
async def a_swallowed_error_of_a_migration_is_seen_all_the_same(w):
    async with shop(w) as s:
        s.migrate()
        errors = 0
        async with s.pool.connection(autocommit=True) as conn:
            for _ in range(3):
                try:
                    await w.ask(conn, s.query)
                except Exception:
                    errors += 1
        assert errors <= 1
        assert await s.ask_everywhere(s.query, autocommit=True) == 0


@real_scenario
async def a_reset_of_the_session_forgets_what_a_migration_made_outdated(w):
    async with shop(w, reset="session") as s:
        for _ in range(2):
            s.migrate()
            assert await s.fail(s.query, 4, autocommit=True) <= 1
            assert await s.ask_everywhere(s.query, autocommit=True) == 0
            assert not (await s.pool.execute(s.query)).fetchall()
        assert s.pool.stats().opened == CONNECTIONS


@real_scenario
async def getconn_after_a_migration_fails_once_at_most(w):
    async with shop(w, autocommit=True) as s:
        s.migrate()
        errors = 0
        for _ in range(4):
            conn = await s.pool.getconn()
            try:
                await w.ask(conn, s.query)
            except Exception:
                errors += 1
            await s.pool.putconn(conn)
        assert errors <= 1
        assert await s.ask_everywhere(s.query) == 0


@real_scenario
async def statements_that_the_server_has_forgotten_are_prepared_again(w):
    async with shop(w) as s:
        for each in [await w.borrow(s.pool, autocommit=True).wait() for _ in range(CONNECTIONS)]:
            # In a block of SQL: no driver sees it.
            await w.ask(each.conn, "do 'begin deallocate all; end'")
            await each.end()
        for _ in range(2 * CONNECTIONS):
            assert not (await s.pool.execute(s.query)).fetchall()
        assert await s.ask_everywhere(s.query, autocommit=True) == 0


@real_scenario
async def a_type_that_was_made_anew_costs_one_error_and_new_connections(w):
    async with shop(w) as s:
        kind = f"kind_{s.name}"
        make = f"create type {kind} as enum ('a', 'b')"
        function = f"function f_{s.name}()"
        # What PL/pgSQL remembers of a type lasts as long as its session.
        body = f"$$ declare k {kind} := 'a'; begin return k::text; end $$"
        s.do(f"{make}; create {function} returns text language plpgsql as {body}")
        try:
            query = f"select f_{s.name}()"
            assert await s.ask_everywhere(query, autocommit=True) == 0
            s.do(f"drop type {kind}; {make}")
            assert await s.fail(query, 1, autocommit=True) == 1
            assert await s.ask_everywhere(query, autocommit=True) == 0
            assert await s.fail(query, 4, **w.db.transaction) == 0
        finally:
            s.do(f"drop {function}; drop type {kind}")


@real_scenario
async def other_errors_leave_what_was_prepared_alone_and_nothing_is_asked_twice(w):
    async with shop(w) as s:
        s.do(f"create sequence seq_{s.name}")
        query = f"select 1 / (nextval('seq_{s.name}') - 2)"
        try:
            await s.pool.execute(query)
            with pytest.raises(Exception, match=r"(?i)zero"):
                await s.pool.execute(query)
            assert w.db.admin.execute(f"select last_value from seq_{s.name}").fetchone() == (2,)
        finally:
            s.do(f"drop sequence seq_{s.name}")
