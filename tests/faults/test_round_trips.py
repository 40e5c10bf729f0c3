"""What a pool says to the server, counted on the wire: nothing that its user did not ask for."""

import gc

import pytest
from tests.forks import until

from penstock import ConnectionPool


@pytest.fixture
def pool_of(server, proxy):
    made: list[ConnectionPool] = []

    def make(**options):
        pool = ConnectionPool(
            server.conninfo(port=proxy.port), name=f"wire-{len(made)}", **{"max_size": 1, **options}
        )
        made.append(pool)
        pool.open(wait=True)
        return pool

    yield make
    for pool in made:
        pool.close()


def test_borrow_and_return_say_nothing(pool_of, proxy):
    pool = pool_of()
    with proxy.counting() as count:
        for _ in range(50):
            with pool.connection():
                pass
            pool.putconn(pool.getconn())
            with pool.connection(autocommit=True):
                pass
    assert (count.round_trips, count.total.sent) == (0, 0)


def test_execute_takes_one_round_trip(pool_of, proxy):
    pool = pool_of()
    with proxy.counting() as count:
        assert pool.execute("select 1").fetchone() == (1,)
    assert count.round_trips == 1
    with proxy.counting() as count:
        assert pool.execute("select %s::text", ["x"]).fetchone() == ("x",)
    assert count.round_trips == 1


def test_a_block_with_one_statement_takes_three(pool_of, proxy):
    pool = pool_of()
    with proxy.counting() as count, pool.connection() as conn:
        conn.execute("select 1")
    assert count.round_trips == 3  # begin, the statement, commit


def test_a_block_that_raises_takes_three(pool_of, proxy):
    pool = pool_of()
    with proxy.counting() as count, pytest.raises(KeyError), pool.connection() as conn:
        conn.execute("select 1")
        raise KeyError
    assert count.round_trips == 3  # begin, the statement, rollback


def test_a_block_in_autocommit_takes_one(pool_of, proxy):
    per_borrow, per_pool = pool_of(), pool_of(autocommit=True)
    with proxy.counting() as count, per_borrow.connection(autocommit=True) as conn:
        conn.execute("select 1")
    assert count.round_trips == 1
    with proxy.counting() as count, per_pool.connection() as conn:
        conn.execute("select 1")
    assert count.round_trips == 1


def test_settings_of_a_borrow_take_one_more_than_the_block(pool_of, proxy):
    pool = pool_of()
    settings = {"app.user": "ann", "app.tenant": 7}
    with proxy.counting() as count, pool.connection(settings=settings) as conn:
        conn.execute("select 1")
    assert count.round_trips == 4


def test_a_session_reset_takes_one_round_trip_per_return(pool_of, proxy):
    with proxy.counting() as count:
        pool = pool_of(reset="session", autocommit=True)  # connects, and borrows once
        for _ in range(4):  # psycopg prepares the sixth: one more
            with pool.connection() as conn:
                conn.execute("select 1")
        until(lambda: count.round_trips >= 3 + 1 + 8, "the last reset is answered")
        with pool.connection():  # reads the answer, and sends one more
            pass
        until(lambda: count.round_trips >= 3 + 1 + 8 + 1, "its reset is answered")
    assert count.round_trips == 3 + 1 + 8 + 1


def test_nobody_waits_for_a_session_reset_to_be_answered_at_the_return(pool_of, proxy):
    pool = pool_of(reset="session", autocommit=True)
    with pool.connection() as conn:
        conn.execute("set search_path to nowhere")
        proxy.freeze()
    # We are here, though the wire stands still.
    assert pool.stats().in_use == 0
    proxy.thaw()
    with pool.connection() as conn:
        assert conn.execute("show search_path").fetchone() != ("nowhere",)


def test_a_ping_takes_one_round_trip(pool_of, proxy):
    pool = pool_of(ping_after=0)
    with proxy.counting() as count, pool.connection():
        pass
    assert count.round_trips == 1


def test_connecting_takes_two_round_trips(pool_of, proxy):
    """One to log in (trust), one for the check interval; without that one, one."""
    with proxy.counting() as count:
        pool_of()
    print(f"connect: {count.round_trips} round trips, {dict(count.messages)}")
    assert (count.opened, count.round_trips) == (1, 2)
    with proxy.counting() as count:
        pool_of(server_check_interval=None)
    assert (count.opened, count.round_trips) == (1, 1)
    with proxy.counting() as count:
        pool_of(reset="session")
        # One more: what `configure` has set is asked for. And open(wait=True) borrows, so that a reset
        # is sent, whose answer nobody waits for.
        until(lambda: count.round_trips == 4, "the answer to the reset")
    assert count.opened == 1


def test_an_idle_pool_says_nothing(pool_of, proxy):
    pool = pool_of(max_size=4, min_size=4)
    with proxy.counting() as count:
        gc.collect()
        assert pool.stats().idle == 4
        assert pool.health().ready
    assert count.total.sent == 0


def test_closing_says_goodbye_once_per_connection(pool_of, proxy):
    pool = pool_of(max_size=3, min_size=3)
    with proxy.counting() as count:
        pool.close()
        until(lambda: count.messages["Terminate"] == 3, "three goodbyes")
    assert (count.round_trips, count.messages) == (0, {"Terminate": 3})
