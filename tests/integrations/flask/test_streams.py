"""Responses that go on after the view: whose connection they use, and that it comes back."""

import gc
from typing import Any, cast

import psycopg
import pytest
from flask import Response, request, stream_with_context
from flask.globals import request_ctx
from tests.forks import until


def environ(method="GET"):
    from werkzeug.test import EnvironBuilder

    return EnvironBuilder(method=method).get_environ()


class Served:
    """A response as a WSGI server sees it: chunks to be asked for, and closed."""

    def __init__(self, app, method="GET"):
        self.status = ""
        self.body = app.wsgi_app(environ(method), self._start)
        self.chunks = iter(self.body)

    def _start(self, status, headers, error=None):
        self.status = status

    def close(self):
        self.body.close()


def numbers(shop, count=3):
    """Rows that come one by one, from the request's own connection."""
    with shop.db.conn.cursor(name="numbers") as cursor:
        cursor.itersize = 1
        cursor.execute("select generate_series(1, %s)", (count,))
        for (number,) in cursor:
            yield f"{number} "


def fetched(db):
    while row := db.execute("fetch opened").fetchone():
        yield f"{row[0]} "


def route(shop):
    """Make a function the view."""
    return lambda view: shop.app.add_url_rule("/", "end", view)


@pytest.fixture(params=["request", "explicit", "autocommit"])
def each(request, shop_of):
    return shop_of(request.param)


# -- db.stream ------------------------------------------------------------------------------------------


def in_one_transaction(shop, body):
    """Server-side cursors live in transactions; in autocommit it takes one."""
    with shop.db.conn.transaction():
        yield from body


def test_a_stream_that_is_read_to_its_end_has_the_requests_connection(each):
    pids = []

    @route(each)
    def view():
        pids.append(each.db.conn.info.backend_pid)

        def body():
            yield from in_one_transaction(each, numbers(each))
            pids.append(each.db.conn.info.backend_pid)

        return each.db.stream(body(), mimetype="text/csv", status=203)

    answer = each.get()
    assert (answer.status_code, answer.mimetype) == (203, "text/csv")
    assert answer.text == "1 2 3 "
    assert pids[0] == pids[1]
    assert each.all_are_back()
    assert each.pool.stats().borrows == 1
    assert not each.warnings()


def test_the_connection_is_kept_from_the_view_to_the_last_chunk(shop):
    route(shop)(lambda: shop.db.stream(numbers(shop)))
    served = Served(shop.app)
    assert shop.pool.stats().in_use == 1  # the request is over, nothing was sent yet
    assert list(served.chunks) == [b"1 ", b"2 ", b"3 "]
    assert shop.all_are_back()  # at its end, before the server closes it
    served.close()
    served.close()
    assert shop.pool.stats().borrows == 1


def test_a_stream_that_is_cut_gives_back(each):
    route(each)(lambda: each.db.stream(in_one_transaction(each, numbers(each, 1000))))
    served = Served(each.app)
    assert next(served.chunks) == b"1 "
    served.close()
    assert each.all_are_back()
    assert each.pool.execute("select 1").fetchone() == (1,)


def test_a_stream_that_never_begins_gives_back(each):
    route(each)(lambda: each.db.stream(numbers(each)))
    served = Served(each.app)
    assert each.pool.stats().in_use == 1
    served.close()
    assert each.all_are_back()


def test_head_gives_back_what_its_stream_was_to_keep(each):
    route(each)(lambda: each.db.stream(numbers(each)))
    served = Served(each.app, "HEAD")
    assert list(served.chunks) == []
    served.close()
    assert each.all_are_back()


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304)])
def test_an_answer_without_a_body_gives_its_stream_back_whoever_holds_it(each, method, status):
    held, closed = [], []

    class Body(list):
        def close(self):
            closed.append(self)

    route(each)(lambda: each.db.stream(Body(["1 "]), status=status))

    @each.app.after_request
    def hold(response):
        held.append(response)
        return response

    served = Served(each.app, method)
    assert list(served.chunks) == []
    assert each.all_are_back()
    assert closed
    assert each.pool.stats().opened == 1
    assert each.pool.execute("select 1").fetchone() == (1,)
    assert each.pool.stats().opened == 1  # it came back whole


def test_a_stream_that_raises_midway_gives_back_and_keeps_nothing(each):
    def body():
        yield "first "
        each.write("work")
        raise ZeroDivisionError

    route(each)(lambda: each.db.stream(body()))
    served = Served(each.app)
    assert next(served.chunks) == b"first "
    with pytest.raises(ZeroDivisionError):
        next(served.chunks)
    assert each.all_are_back()
    assert ("work" in each.kept()) == (each.mode == "autocommit")
    assert not each.warnings()


def test_a_stream_that_is_dropped_comes_back_by_itself(shop):
    """A server that never calls close(): the pool's own net, which replaces the connection."""
    kept = []

    @route(shop)
    def view():
        kept.append(cast("Any", request_ctx)._get_current_object())  # somebody may hold it on
        return shop.db.stream(numbers(shop))

    served = Served(shop.app)
    next(served.chunks)
    del served
    shop.come_back_when_collected()
    assert shop.pool.execute("select 1").fetchone() == (1,)
    assert shop.pool.stats().orphaned == 1


def test_a_stream_that_is_made_and_not_answered_keeps_nothing(shop):
    made = []

    @route(shop)
    def view():
        made.append(shop.db.stream(numbers(shop)))
        return "something else"

    assert shop.get().text == "something else"
    assert shop.all_are_back()
    made[0].close()
    assert shop.all_are_back()


@pytest.mark.parametrize("handled", [True, False])
def test_a_view_that_makes_a_stream_and_raises_gives_back(handled, shop):
    made = []
    if handled:
        shop.app.register_error_handler(ZeroDivisionError, lambda error: ("no", 400))

    @route(shop)
    def view():
        made.append(shop.db.stream(numbers(shop)))
        raise ZeroDivisionError

    assert shop.get().status_code == (400 if handled else 500)
    assert shop.all_are_back()


def test_what_the_view_wrote_is_committed_before_the_first_chunk(shop):
    @route(shop)
    def view():
        shop.write("work")
        return shop.db.stream(numbers(shop))

    served = Served(shop.app)
    assert shop.kept() == {"work"}
    assert list(served.chunks) == [b"1 ", b"2 ", b"3 "]
    served.close()
    assert not shop.warnings()


def test_a_commit_that_fails_is_a_500_and_no_stream(shop):
    @route(shop)
    def view():
        shop.write("a", 1)
        shop.write("b", 1)
        return shop.db.stream(numbers(shop))

    assert shop.get().status_code == 500
    assert shop.all_are_back()
    assert shop.kept() == set()


def test_a_cursor_that_the_view_opened_lives_on_in_the_stream(shop):
    """So a wrong statement is a 500, not a body that breaks off."""

    @route(shop)
    def view():
        shop.db.execute(f"declare opened cursor for {request.args['sql']}")
        return shop.db.stream(fetched(shop.db))

    assert shop.get(query_string={"sql": "select generate_series(1, 3)"}).text == "1 2 3 "
    assert shop.get(query_string={"sql": "selec"}).status_code == 500
    assert shop.all_are_back()


def test_a_statement_that_is_read_row_by_row_goes_on_in_the_stream(shop):
    @route(shop)
    def view():
        rows = shop.db.conn.cursor().stream("select generate_series(1, 3)")
        return shop.db.stream(f"{number} " for (number,) in rows)

    assert shop.get().text == "1 2 3 "
    assert shop.all_are_back()


def test_what_a_stream_writes_is_its_own_to_commit(shop):
    def body():
        shop.write("committed")
        shop.db.commit()
        shop.write("forgotten")
        yield "done"

    route(shop)(lambda: shop.db.stream(body()))
    assert shop.get().text == "done"
    assert shop.kept() == {"committed"}
    (told,) = shop.warnings()
    assert "GET / (endpoint 'end') answered 200: uncommitted work" in told


def test_a_response_that_was_made_already_can_be_kept_for(shop):
    @route(shop)
    def view():
        response = Response(numbers(shop), status=206, headers={"X-Rows": "3"})
        return shop.db.stream(response)

    answer = shop.get()
    assert (answer.text, answer.status_code, answer.headers["X-Rows"]) == ("1 2 3 ", 206, "3")
    assert shop.all_are_back()


def test_a_stream_of_another_database_keeps_that_one_only(shop_of, notes):
    shop = shop_of(PENSTOCK_BINDS={"second": {"url": notes}})

    @route(shop)
    def view():
        shop.db.execute("select 1")
        second = shop.db["second"]
        second.execute("declare opened cursor for select 7")
        return second.stream(fetched(second))

    served = Served(shop.app)
    assert {key: pool.stats().in_use for key, pool in shop.pools.items()} == {
        "default": 0,
        "second": 1,
    }
    assert list(served.chunks) == [b"7 "]
    served.close()
    assert shop.all_are_back()


def test_the_first_use_hook_runs_again_in_a_streams_own_transaction(shop):
    shop.db.on_first_use(lambda conn: conn.execute("select set_config('app.user', 'ann', true)"))

    def body():
        yield shop.db.execute("select current_setting('app.user')").fetchone()[0]

    @route(shop)
    def view():
        shop.write("work")
        return shop.db.stream(body())

    assert shop.get().text == "ann"
    assert shop.kept() == {"work"}


# -- streams of Flask's own ------------------------------------------------------------------------------


def test_a_plain_generator_meets_a_dead_connection(shop):
    @route(shop)
    def view():
        conn = shop.db.conn

        def body():
            yield str(conn.execute("select 1").fetchone())

        return Response(body())

    served = Served(shop.app)
    assert shop.all_are_back()
    with pytest.raises(psycopg.InterfaceError, match="given back to its pool"):
        next(served.chunks)


@pytest.mark.parametrize("cut", [False, True])
def test_stream_with_context_borrows_for_itself_and_gives_back(cut, shop):
    @route(shop)
    def view():
        shop.write("work")

        def body():
            yield "begun "
            yield from numbers(shop)

        return Response(stream_with_context(body()))

    served = Served(shop.app)
    # Up to 3.1.1 Flask keeps the whole request until the stream has ended.
    assert shop.pool.stats().in_use <= 1
    assert shop.kept() == {"work"}
    assert next(served.chunks) == b"begun "
    assert next(served.chunks) == b"1 "
    assert shop.pool.stats().in_use == 1
    if not cut:
        assert list(served.chunks) == [b"2 ", b"3 "]
    served.close()
    assert shop.all_are_back()
    assert shop.kept() == {"work"}


def test_a_stream_with_context_that_raises_gives_back(shop):
    @route(shop)
    def view():
        def body():
            yield str(shop.db.execute("select 1").fetchone())
            raise ZeroDivisionError

        return Response(stream_with_context(body()))

    served = Served(shop.app)
    next(served.chunks)
    with pytest.raises(ZeroDivisionError):
        next(served.chunks)
    assert shop.all_are_back()


def test_a_stream_with_context_that_is_dropped_gives_back(shop):
    @route(shop)
    def view():
        return Response(stream_with_context(numbers(shop)))

    served = Served(shop.app)
    next(served.chunks)
    del served
    gc.collect()
    until(shop.all_are_back, "the connection is back")
