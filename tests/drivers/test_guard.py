"""`guard=True`: what was given back stays dead when its session is lent to somebody else.

One job: what carries over to the new connection object, what stays with the old one, and that nothing is
made where nobody holds the old one. Which misuse is noticed is told by tests/drivers/test_misuse.py.
"""

from __future__ import annotations

import asyncio
import gc

import asyncpg
import psycopg
import psycopg2.extensions
import pytest

from penstock import AsyncConnectionPool, ConfigError, ConnectionPool, MisuseError
from penstock.testing import AsyncFakeDriver, FakeDriver, FakeServer


class Slotted(psycopg.Connection):
    """With an attribute of each kind, and a count of how often one was made."""

    __slots__ = ("in_a_slot",)
    made = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        type(self).made += 1
        self.in_a_slot = "slot"
        self.in_the_dict = "dict"


@pytest.fixture
def make_pool(server):
    made = []

    def make(**options):
        pool = ConnectionPool(server.conninfo(over="unix"), max_size=1, guard=True, **options)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.close()


def pid(conn):
    return conn.info.backend_pid


def test_a_held_psycopg_connection_is_followed_by_another_object_over_the_same_session(make_pool):
    pool = make_pool(connection_class=Slotted, kwargs={"row_factory": psycopg.rows.dict_row})
    with pool.connection() as old:
        session, made = pid(old), Slotted.made
        for _ in range(7):
            old.execute("select 42")  # from the fifth on it is prepared
        old.in_a_slot, old.in_the_dict = "of the", "user"
    with pool.connection() as new:
        assert new is not old
        assert type(new) is type(old)
        assert isinstance(new, Slotted)
        assert (pid(new), Slotted.made) == (session, made)
        assert (new.in_a_slot, new.in_the_dict) == ("of the", "user")
        answer: object = new.execute("select count(*) as n from pg_prepared_statements").fetchone()
        assert answer == {"n": 1}  # as a dict, as the pool's row factory has it


def test_handlers_that_configure_added_hear_what_comes_to_the_new_object(make_pool):
    heard = []

    def configure(conn):
        conn.add_notice_handler(lambda notice: heard.append(notice.message_primary))

    pool = make_pool(configure=configure)
    with pool.connection() as old:
        pass
    with pool.connection() as new:
        new.execute("do $$ begin raise notice 'boo'; end $$")
        assert heard == ["boo"]
    del old


class Heeding(psycopg.Connection):
    """Its handler is a method of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.heard = []
        self.add_notice_handler(self.hear)

    def hear(self, notice):
        self.heard.append((notice.message_primary, self.info.backend_pid))


def test_a_handler_that_is_a_method_of_the_connection_is_the_new_ones(make_pool):
    pool = make_pool(connection_class=Heeding)
    for number in range(1, 4):
        with pool.connection() as conn:
            conn.add_notify_handler(print)  # a change of handlers: the return sets them back
            conn.execute("do $$ begin raise notice 'boo'; end $$")
            assert conn.heard == [("boo", pid(conn))] * number
    with pool.connection() as conn:
        conn.remove_notice_handler(conn.hear)


def test_what_is_registered_on_the_old_ones_adapters_does_not_reach_the_new_one(make_pool):
    pool = make_pool()
    with pool.connection() as old:
        adapters = old.adapters
    with pool.connection() as new:
        with pytest.raises(MisuseError, match="given back"):
            adapters.register_loader("int4", psycopg.types.string.TextLoader)
        assert new.execute("select 1").fetchone() == (1,)
        new.adapters.register_loader("int4", psycopg.types.string.TextLoader)
        assert new.execute("select 1").fetchone() == ("1",)


def test_adapters_of_the_pool_go_along_and_a_borrowers_own_do_not(make_pool):
    def configure(conn):
        conn.adapters.register_loader("int4", psycopg.types.string.TextLoader)

    pool = make_pool(configure=configure)
    with pool.connection() as old:
        old.adapters.register_loader("int8", psycopg.types.string.TextLoader)
    with pool.connection() as new:
        assert new.execute("select 1, 2::int8").fetchone() == ("1", 2)
    with pool.connection() as third:
        third.autocommit = True
    with pool.connection() as fourth:
        assert not fourth.autocommit
    del old, new, third


def test_where_nobody_holds_the_connection_the_same_object_is_lent_again(make_pool):
    for driver in ("psycopg", "psycopg2"):
        pool = make_pool(driver=driver)
        numbers = set()
        for _ in range(3):
            conn = pool.getconn()
            numbers.add(id(conn))
            conn.cursor().execute("select 1")
            pool.putconn(conn)
            del conn
        assert len(numbers) == 1
        assert pool.stats().opened == 1


def test_a_psycopg2_connection_that_somebody_holds_is_closed_and_another_one_opened(make_pool):
    pool = make_pool(driver="psycopg2")
    with pool.connection() as old:
        cursor = old.cursor()
        session = pid(old)
    with pool.connection() as new:
        assert isinstance(new, psycopg2.extensions.connection)
        assert pid(new) != session
        with pytest.raises(MisuseError):
            old.cursor()
        with pytest.raises(psycopg2.InterfaceError, match="closed"):
            cursor.execute("select 1")
    assert pool.stats().opened == 2


def test_what_configure_keeps_of_a_psycopg2_connection_does_not_close_it_for_ever(make_pool):
    kept: list[object] = []
    pool = make_pool(driver="psycopg2", configure=kept.append)
    with pool.connection():
        pass
    assert len(kept) == 1


def test_check_on_borrow_getconn_execute_and_settings_work_with_guard(make_pool):
    calls: list[object] = []
    pool = make_pool(check=calls.append, on_borrow=calls.append)
    old = pool.getconn()
    pool.putconn(old)
    with pytest.raises(MisuseError):
        pool.putconn(old)
    new = pool.getconn()
    assert new is not old
    with pytest.raises(MisuseError):
        pool.putconn(old)  # would give back what another one holds
    new.execute("select 1")
    pool.putconn(new)
    assert pool.execute("select 3").fetchone() == (3,)
    with pool.connection(settings={"app.user": "ann"}) as conn:
        assert conn.execute("select current_setting('app.user')").fetchone() == ("ann",)
    with pool.connection(autocommit=True) as conn:
        assert conn.autocommit
    assert len({id(each) for each in calls}) == 5  # one object per borrow, as all are held here


def test_the_old_object_does_not_touch_what_is_noted_of_the_new_one(make_pool):
    pool = make_pool()
    with pool.connection() as old:
        pass
    with pool.connection() as new:
        old._num_transactions += 1  # as a transaction() does that somebody leaves too late
        old.close()
        assert old.closed
        session = pid(new)
    with pool.connection() as third:
        assert pid(third) == session


def test_a_session_that_is_held_by_nobody_dies_with_the_pool_and_warns_of_nothing(make_pool):
    pool = make_pool()
    with pool.connection() as old:
        pass
    with pool.connection():
        pass
    pool.close()
    del old
    gc.collect()  # filterwarnings = error: psycopg complains of connections that were not closed


class Marked(asyncpg.Connection):  # type: ignore[misc]  # asyncpg is untyped
    """A user's class with an attribute of its own."""

    __slots__ = ("mark",)


async def async_pool(server, **options):
    return AsyncConnectionPool(server.conninfo(over="unix"), max_size=1, guard=True, **options)


def test_a_held_asyncpg_connection_is_followed_by_another_object_over_the_same_session(server):
    async def main():
        heard = []
        async with await async_pool(server, driver="asyncpg", connection_class=Marked) as pool:
            async with pool.connection() as old:
                old.mark = "mine"
                session = old.get_server_pid()
                await old.set_type_codec(
                    "json", schema="pg_catalog", encoder=str, decoder=lambda text: ("json", text)
                )
                statement = await old.prepare("select 1")
            async with pool.connection() as new:
                assert new is not old
                assert isinstance(new, Marked)
                assert (new.mark, new.get_server_pid()) == ("mine", session)
                with pytest.raises(MisuseError):
                    await old.fetch("select 1")
                with pytest.raises(asyncpg.InterfaceError):
                    await statement.fetch()
                await old.close()
                old.terminate()
                assert await new.fetchval("select 2") == 2
                assert await new.fetchval("select '1'::json") == "1"  # the codec was the borrower's
                new.add_log_listener(lambda _conn, notice: heard.append(notice.message))
                await new.execute("do $$ begin raise notice 'boo'; end $$")
                await asyncio.sleep(0)
                del old, statement
                gc.collect()  # what becomes of the old object is not the session's affair
                assert await new.fetchval("select 3") == 3
            assert pool.stats().opened == 1
        assert heard == ["boo"]

    asyncio.run(main())


def test_a_held_asyncio_psycopg_connection_is_followed_by_another_object(server):
    async def main():
        async with await async_pool(server) as pool:
            async with pool.connection() as old:
                cursor = await old.execute("select 1")
                session = pid(old)
            async with pool.connection() as new:
                assert new is not old
                assert pid(new) == session
                with pytest.raises(MisuseError):
                    await cursor.execute("select 1")
                assert await (await new.execute("select 2")).fetchone() == (2,)
            assert pool.stats().opened == 1

    asyncio.run(main())


class Unrenewing(FakeDriver):
    """As a driver that was written before there was a guard."""

    renews = False


class AsyncUnrenewing(AsyncFakeDriver):
    """The same for asyncio."""

    renews = False


def test_a_driver_without_renew_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'guard'.*driver 'fake', whose links have no renew"):
        ConnectionPool(driver=Unrenewing(FakeServer()), guard=True)
    with pytest.raises(ConfigError, match="renew"):
        AsyncConnectionPool(driver=AsyncUnrenewing(FakeServer()), guard=True)


def test_fakes_can_be_guarded():
    with ConnectionPool(driver=FakeDriver(FakeServer()), max_size=1, guard=True) as pool:
        with pool.connection() as old:
            pass
        with pool.connection() as new:
            assert old.closed
            with pytest.raises(Exception, match="closed"):
                old.execute("select 1")
            new.execute("select 1")
