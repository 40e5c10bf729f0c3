"""A request that has its connection and asks its pool for a second one, by whichever door."""

import threading

import pytest
from flask import g

from penstock import MisuseError, PoolTimeout

SECONDS = 0.1


def by_execute(pool):
    pool.execute("select 1", timeout=SECONDS)


def by_connection(pool):
    with pool.connection(timeout=SECONDS):
        pass


def by_getconn(pool):
    pool.putconn(pool.getconn(timeout=SECONDS))


def by_plain_connection(pool):
    pool.execute("select 1")


def hasty(shop_of):
    """An app whose borrowers wait for a moment only; its connection is open, so that nothing else is waited for."""
    shop = shop_of(PENSTOCK_POOL_OPTIONS={"max_size": 1, "timeout": SECONDS})
    shop.pool.execute("select 1", timeout=30)
    return shop


@pytest.fixture
def told_by(shop_of):
    """Gives what a view's second borrow is told, and the view's first line."""

    def ask(door, use=None):
        shop = hasty(shop_of)
        told = []

        def view():
            (use or shop.db.execute)("select 1")
            try:
                door(shop.db.pool)
            except (PoolTimeout, MisuseError) as error:
                told.append(error)
            return "answered"

        shop.app.get("/")(view)
        assert shop.get().text == "answered"
        (error,) = told
        return error, view.__code__.co_firstlineno + 1

    return ask


DOORS = (by_execute, by_connection, by_getconn, by_plain_connection)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_it_is_told_that_it_holds_one_itself_and_where_it_was_borrowed(door, told_by):
    error, line = told_by(door)
    assert isinstance(error, PoolTimeout)
    (own,) = error.own
    assert (own.kind, own.line, own.function) == ("thread", line, None)
    place = f"borrowed at flask/test_second_connection.py:{line}"
    assert "this thread itself holds one of them, since " in str(error)
    assert place in str(error)
    assert "next step: use the connection that it has, or give it back first" in str(error)
    assert "end transactions before slow work" not in str(error)


def test_a_connection_that_the_request_keeps_by_itself_is_told_too(shop_of):
    shop = hasty(shop_of)
    told = []

    @shop.app.get("/")
    def view():
        g.lease = shop.db.pool.connection()
        g.lease.__enter__()
        with pytest.raises(PoolTimeout) as caught:
            shop.db.execute("select 1")
        told.append(caught.value)
        g.lease.__exit__(None, None, None)
        return "answered"

    assert shop.get().text == "answered"
    assert len(told[0].own) == 1
    assert "this thread itself holds one of them" in str(told[0])


def test_a_callee_that_is_given_the_connection_is_refused_at_once(shop_of):
    shop = shop_of(PENSTOCK_POOL_OPTIONS={"max_size": 1, "timeout": 30.0})

    def report(conn):
        with pytest.raises(MisuseError, match="wait for itself"):
            shop.db.pool.execute("select 1")
        return str(conn.execute("select 2").fetchone()[0])

    @shop.app.get("/")
    def view():
        return report(shop.db.conn)

    assert shop.get().text == "2"


def test_a_request_that_waits_for_another_ones_is_told_nothing_of_the_kind(shop_of):
    shop = hasty(shop_of)
    has, may_end = threading.Event(), threading.Event()

    @shop.app.get("/hold")
    def hold():
        shop.db.execute("select 1")
        has.set()
        may_end.wait(20)
        return "held"

    @shop.app.get("/ask")
    def ask():
        with pytest.raises(PoolTimeout) as caught:
            shop.db.execute("select 1")
        return str(caught.value)

    thread = threading.Thread(target=shop.get, args=("/hold",))
    thread.start()
    assert has.wait(20)
    text = shop.get("/ask").text
    may_end.set()
    thread.join(20)
    assert "1 of 1 in use" in text
    assert "itself" not in text
