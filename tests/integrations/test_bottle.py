"""Bottle's plugin: every way a request can end, streams, routes' options, several databases.

The pool has one connection, so a request that kept one, or that wants two, is seen at once.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import psycopg
import pytest
from tests.forks import until

from penstock import ConnectionPool, MisuseError, PoolTimeout

bottle = pytest.importorskip("bottle")
from penstock.integrations.bottle import Penstock  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_penstock.postgres import Server

MODES = ["request", "explicit", "autocommit"]
TABLE = "create table note (tag text primary key, alone int unique deferrable initially deferred)"


@pytest.fixture(scope="module")
def notes(server: Server) -> Iterator[str]:
    server.execute("create database bottle_notes")
    server.execute(TABLE, dbname="bottle_notes")
    yield server.conninfo(dbname="bottle_notes", over="unix")
    server.execute("drop database bottle_notes with (force)")


@pytest.fixture
def outside(notes: str) -> Iterator[psycopg.Connection]:
    """A connection that has nothing to do with any pool."""
    with psycopg.connect(notes, autocommit=True) as conn:
        conn.execute("truncate note")
        yield conn


class Served:
    """An answer as a WSGI server sees it: chunks to be asked for, and closed."""

    def __init__(self, app: Any, method: str = "GET", path: str = "/", **environ: Any) -> None:
        environ |= {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.errors": io.StringIO()}
        environ["SERVER_PROTOCOL"] = "HTTP/1.1"
        setup_testing_defaults(environ)
        self.text = ""
        self.body = app(environ, self._start)
        self.chunks = iter(self.body)

    def _start(self, status: str, headers: list[tuple[str, str]], *_: Any) -> None:
        self.status_code = int(status.split(maxsplit=1)[0])
        self.headers = dict(headers)

    def close(self) -> None:
        getattr(self.body, "close", lambda: None)()


class Shop:
    """An app on a pool of one connection, and what can be seen of it from outside."""

    def __init__(self, conninfo: str, caplog: pytest.LogCaptureFixture, **options: Any) -> None:
        self.app = bottle.Bottle()
        self.plugin = Penstock(conninfo, max_size=1, **{"timeout": 10.0, **options})
        self.pool = self.plugin.pool
        self._caplog = caplog

    def install(self) -> Shop:
        self.app.install(self.plugin)
        return self

    def get(self, path: str = "/") -> Served:
        """Ask, and read the whole answer."""
        served = Served(self.app, path=path)
        served.text = b"".join(served.chunks).decode()
        served.close()
        return served

    def warnings(self) -> list[str]:
        return [
            record.getMessage()
            for record in self._caplog.records
            if record.name.startswith("penstock") and record.levelno >= logging.WARNING
        ]

    def all_are_back(self) -> bool:
        return self.pool.stats().in_use == 0


@pytest.fixture
def shop_of(notes: str, outside: psycopg.Connection, caplog: pytest.LogCaptureFixture) -> Iterator:
    made: list[Shop] = []

    def make(**options: Any) -> Shop:
        made.append(Shop(notes, caplog, **options).install())
        return made[-1]

    yield make
    for shop in made:
        shop.app.close()
        assert shop.pool.closed


@pytest.fixture
def shop(shop_of: Callable[[], Shop]) -> Shop:
    return shop_of()


def write(db, tag="work", alone=None):
    db.execute("insert into note values (%s, %s)", (tag, alone))


def kept(outside):
    return {tag for (tag,) in outside.execute("select tag from note").fetchall()}


class Killed(BaseException):
    """As gevent's GreenletExit: no Exception."""


# -- endings ------------------------------------------------------------------------------------------


def answers(answer):
    def view(db):
        write(db)
        return answer

    return view


def answers_with_status(db):
    write(db)
    bottle.response.status = 409
    return "no"


def raises(error):
    def view(db):
        write(db)
        raise error

    return view


def redirects(db):
    write(db)
    bottle.redirect("/elsewhere")


def aborts(db):
    write(db)
    bottle.abort(409)


def violates_at_commit(db):
    write(db, "work", 1)
    write(db, "work too", 1)
    return "written"


def violates_and_redirects(db):
    violates_at_commit(db)
    bottle.redirect("/elsewhere")


def swallows(db):
    write(db)
    with contextlib.suppress(psycopg.errors.UniqueViolation):
        write(db)
    return "never mind"


def rolls_back(db):
    write(db)
    db.rollback()
    return "on second thoughts"


def commits_and_refuses(db):
    write(db)
    db.commit()
    bottle.abort(400)


def closes(db):
    write(db)
    db.close()
    return "closed"


#: view, status (or what leaves the app; or by mode), kept in mode "request", warned of there
ENDINGS: dict[str, Any] = {
    "a text": (answers("made"), 200, True, False),
    "a dict": (answers({"made": 1}), 200, True, False),
    "nothing": (answers(None), 200, True, False),
    "a response below 400": (answers(bottle.HTTPResponse("made", 201)), 201, True, False),
    "a response from 400 on": (answers(bottle.HTTPResponse("no", 404)), 404, False, True),
    "an error returned": (answers(bottle.HTTPError(503, "oh")), 503, False, True),
    "response.status": (answers_with_status, 409, False, True),
    "redirect()": (redirects, 303, True, False),
    "abort()": (aborts, 409, False, True),
    "a response below 400 raised": (raises(bottle.HTTPResponse("ok", 202)), 202, True, False),
    "an exception": (raises(ValueError("bug")), 500, False, False),
    "the commit fails": (violates_at_commit, {"request": 500, "autocommit": 500}, False, False),
    "the commit of a redirect fails": (
        violates_and_redirects,
        {"request": 500, "autocommit": 500, "explicit": 303},
        False,
        False,
    ),
    "a failed statement is swallowed": (swallows, 200, False, True),
    "the view rolls back": (rolls_back, 200, False, False),
    "the view commits": (commits_and_refuses, 400, True, False),
    "the view closes the connection": (closes, 200, False, False),
    "KeyboardInterrupt": (raises(KeyboardInterrupt()), KeyboardInterrupt, False, False),
    "a greenlet is killed": (raises(Killed()), Killed, False, False),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENDINGS)
def test_however_a_request_ends(name, mode, shop_of, outside):
    view, status, keeps, warns = ENDINGS[name]
    shop = shop_of(transactions=mode)
    shop.app.get("/", callback=view)
    expected = status.get(mode, 200) if isinstance(status, dict) else status

    if isinstance(expected, type):
        with pytest.raises(expected):
            shop.get()
    else:
        assert shop.get().status_code == expected

    assert shop.all_are_back(), repr(shop.pool)
    commits_itself = mode == "autocommit" or view is commits_and_refuses
    assert ("work" in kept(outside)) == (commits_itself or (keeps and mode == "request"))
    if mode == "request":
        assert bool(shop.warnings()) == warns, shop.warnings()
    with shop.pool.connection() as conn:  # what comes back is fit for others
        assert conn.execute("select 1").fetchone() == (1,)


def test_a_warning_names_the_route_and_what_it_answered(shop):
    shop.app.get("/orders/<number:int>", callback=lambda number, db: aborts(db))
    assert shop.get("/orders/7").status_code == 409
    (warning,) = shop.warnings()
    assert warning.startswith(
        "GET /orders/<number:int> answered 409: uncommitted work on pool 'db'"
    )


def test_a_view_that_does_not_take_it_borrows_nothing(shop):
    shop.app.get("/", callback=lambda: "static")
    assert shop.get().text == "static"
    assert not shop.pool.opened


def test_after_its_request_a_connection_that_was_kept_raises(shop):
    found = []

    @shop.app.get("/")
    def keep(db):
        found.append(db)

    assert shop.get().status_code == 200
    with pytest.raises(psycopg.InterfaceError):
        found[0].execute("select 1")


def test_the_hook_runs_in_the_views_transaction_and_before_it(shop):
    @shop.plugin.on_first_use
    def say_who(db):
        db.execute("select set_config('app.user', 'ann', true)")

    @shop.app.get("/")
    def who(db):
        return db.execute("select current_setting('app.user', true)").fetchone()[0]

    assert shop.get().text == "ann"
    with shop.pool.connection() as conn:
        assert conn.execute("select current_setting('app.user', true)").fetchone() == ("",)


def test_a_hook_that_raises_gives_the_connection_back_and_the_view_does_not_run(shop):
    @shop.plugin.on_first_use
    def refuse(db):
        raise bottle.HTTPError(403)

    shop.app.get("/", callback=answers("never"))
    assert shop.get().status_code == 403
    assert shop.all_are_back()


# -- streams -------------------------------------------------------------------------------------------


def numbers(db):
    """A generator view: rows one by one from a cursor on the server; writes at its end."""
    with db.cursor(name="numbers") as cursor:
        cursor.itersize = 1
        cursor.execute("select generate_series(1, 3)")
        for (number,) in cursor:
            yield f"{number} "
    write(db)


def test_a_generator_keeps_its_connection_until_it_has_been_read_and_then_commits(shop, outside):
    shop.app.get("/", callback=numbers)
    served = Served(shop.app)
    assert next(served.chunks) == b"1 "
    assert not shop.all_are_back()
    assert list(served.chunks) == [b"2 ", b"3 "]
    assert shop.all_are_back()  # before close()
    served.close()
    assert kept(outside) == {"work"}
    assert shop.warnings() == []


def test_what_a_view_wrote_is_committed_before_the_first_chunk_of_its_stream(shop, outside):
    def view(db):
        write(db, "before")
        return (f"{len(kept(outside))} {n}" for (n,) in db.execute("select 1 union all select 2"))

    shop.app.get("/", callback=view)
    assert shop.get().text == "1 11 2"
    assert shop.all_are_back()


def test_a_commit_that_fails_before_a_stream_is_a_500(shop, outside):
    def view(db):
        violates_at_commit(db)
        return iter(["never"])

    shop.app.get("/", callback=view)
    assert shop.get().status_code == 500
    assert shop.all_are_back()
    assert kept(outside) == set()


def test_a_cursor_that_a_view_has_opened_is_read_by_its_stream(shop):
    def view(db):
        db.execute("declare opened cursor for select generate_series(1, 3)")
        return (str(n) for _ in range(3) for (n,) in db.execute("fetch opened"))

    shop.app.get("/", callback=view)
    assert shop.get().text == "123"


def test_a_stream_in_a_response_object_keeps_it_too(shop):
    shop.app.get("/", callback=lambda db: bottle.HTTPResponse(numbers(db), 201))
    answer = shop.get()
    assert (answer.status_code, answer.text) == (201, "1 2 3 ")
    assert shop.all_are_back()


def test_a_stream_that_was_raised_keeps_it_too(shop):
    def view(db):
        raise bottle.HTTPResponse(numbers(db))

    shop.app.get("/", callback=view)
    assert shop.get().text == "1 2 3 "
    assert shop.all_are_back()


def test_a_client_that_goes_away_in_the_middle_gives_it_back(shop, outside):
    def view(db):
        write(db, "lost")
        yield from numbers(db)

    shop.app.get("/", callback=view)
    served = Served(shop.app)
    next(served.chunks)
    served.close()
    assert shop.all_are_back()
    assert kept(outside) == set()
    assert "GET / was cut off in the middle of its body: uncommitted work" in shop.warnings()[0]


def test_the_finally_of_a_generator_that_is_cut_off_may_use_the_connection(shop):
    found = []

    def view(db):
        try:
            yield "begun"
            yield "never"
        finally:
            found.append(db.execute("select 1").fetchone())

    shop.app.get("/", callback=view)
    served = Served(shop.app)
    next(served.chunks)
    served.close()
    assert found == [(1,)]
    assert shop.all_are_back()


def test_head_reads_no_body_and_gives_it_back(shop):
    shop.app.get("/", callback=numbers)
    served = Served(shop.app, "HEAD")
    assert (served.status_code, list(served.chunks)) == (200, [])
    assert shop.all_are_back()


def test_a_stream_that_is_dropped_without_a_close_comes_home(shop):
    shop.app.get("/", callback=numbers)
    served = Served(shop.app)
    next(served.chunks)
    del served
    gc.collect()
    until(shop.all_are_back, "the pool has it back")


def raises_at_once(db):
    write(db)
    raise ValueError("bug")
    yield ""


def raises_in_the_middle(db):
    write(db)
    yield "begun"
    raise ValueError("bug")


def aborts_at_once(db):
    write(db)
    bottle.abort(409)
    yield ""


def aborts_in_the_middle(db):
    write(db)
    yield "begun"
    bottle.abort(409)


def redirects_in_the_middle(db):
    write(db)
    yield "begun"
    bottle.redirect("/elsewhere")  # too late


def redirects_at_once(db):
    write(db)
    bottle.redirect("/elsewhere")
    yield ""


def yields_a_response(db):
    write(db)
    yield bottle.HTTPResponse("instead", 201)


def yields_an_error(db):
    write(db)
    yield bottle.HTTPError(404)


def yields_what_is_no_text(db):
    write(db)
    yield 5


def sets_the_status(db):
    write(db)
    bottle.response.status = 404
    yield "no"


def yields_nothing(db):
    write(db)
    yield from ()


def leaves_a_failed_transaction(db):
    yield from swallows(db)


#: view, status (None: the body raises), kept
STREAMS: dict[str, Any] = {
    "raises before the first chunk": (raises_at_once, 500, False),
    "raises in the middle": (raises_in_the_middle, None, False),
    "aborts before the first chunk": (aborts_at_once, 409, False),
    "aborts in the middle": (aborts_in_the_middle, None, False),
    "redirects in the middle": (redirects_in_the_middle, None, False),
    "redirects before the first chunk": (redirects_at_once, 303, True),
    "yields a response": (yields_a_response, 201, True),
    "yields an error": (yields_an_error, 404, False),
    "yields what is no text": (yields_what_is_no_text, 500, False),
    "sets the status before the first chunk": (sets_the_status, 404, False),
    "yields nothing": (yields_nothing, 200, True),
    "leaves a failed transaction": (leaves_a_failed_transaction, 200, False),
}


@pytest.mark.parametrize("name", STREAMS)
def test_however_a_stream_ends(name, shop, outside):
    view, status, keeps = STREAMS[name]
    shop.app.get("/", callback=view)
    served = Served(shop.app)
    try:
        list(served.chunks)
    except (ValueError, bottle.HTTPResponse):
        assert status is None
    else:
        assert served.status_code == status
    served.close()
    assert shop.all_are_back(), repr(shop.pool)
    assert ("work" in kept(outside)) == keeps


def test_a_stream_that_only_notifies_is_committed_too(shop, outside):
    outside.execute("listen news")
    shop.app.get("/", callback=lambda db: (str(db.execute("notify news")) for _ in "1"))
    shop.get()
    assert [note.channel for note in outside.notifies(timeout=10, stop_after=1)] == ["news"]


def test_psycopg2s_connections_are_lent_committed_and_kept_for_streams_as_well(shop_of, outside):
    shop = shop_of(driver="psycopg2")

    def insert(db, tag):
        with db.cursor() as cursor:
            cursor.execute("insert into note values (%s)", (tag,))

    @shop.app.get("/one")
    def one(db):
        insert(db, "one")
        return "made"

    @shop.app.get("/two")
    def two(db):
        insert(db, "before")
        return (insert(db, tag) or tag for tag in ("a", "b"))

    @shop.app.get("/refused")
    def refused(db):
        insert(db, "refused")
        bottle.abort(409)

    texts = [(answer.status_code, answer.text) for answer in map(shop.get, ("/one", "/two"))]
    assert texts == [(200, "made"), (200, "ab")]
    assert shop.get("/refused").status_code == 409
    assert kept(outside) == {"one", "before", "a", "b"}
    assert shop.all_are_back()
    assert len(shop.warnings()) == 1


@pytest.mark.parametrize("headers", [{}, {"HTTP_RANGE": "bytes=1-"}])
def test_a_file_or_a_part_of_it_needs_no_connection(headers, shop, tmp_path):
    (tmp_path / "big.txt").write_text("big")
    shop.app.get("/", callback=lambda db: bottle.static_file("big.txt", str(tmp_path)))
    served = Served(shop.app, **headers)
    assert shop.all_are_back()
    served.close()


# -- several databases, and options ----------------------------------------------------------------------


@pytest.fixture
def two(shop_of, notes):
    shop = shop_of()
    with ConnectionPool(notes, max_size=1, name="log") as pool:
        shop.app.install(Penstock(pool, "log"))
        shop.log = pool
        yield shop


def test_several_databases_are_several_keywords(two, outside):
    @two.app.get("/")
    def view(db, log):
        write(db, "one")
        write(log, "two")
        return str(db.info.backend_pid == log.info.backend_pid)

    assert two.get().text == "False"
    assert kept(outside) == {"one", "two"}
    assert two.log.stats().in_use == 0
    assert two.all_are_back()


def test_a_stream_may_use_several_databases(two):
    @two.app.get("/")
    def view(db, log):
        yield str(db.execute("select 1").fetchone()[0])
        yield str(log.execute("select 2").fetchone()[0])

    assert two.get().text == "12"
    assert two.log.stats().in_use == 0
    assert two.all_are_back()


def test_a_pool_that_was_given_is_its_makers_to_close(two):
    two.app.close()
    assert two.pool.closed
    assert not two.log.closed


def test_two_plugins_with_one_keyword_are_refused(shop, notes):
    with pytest.raises(MisuseError, match=r'keyword="orders"'):
        shop.app.install(Penstock(notes))


def test_a_route_has_its_own_transactions(two, outside):
    @two.app.get("/", penstock={"transactions": "autocommit", "log": {"transactions": "explicit"}})
    def view(db, log):
        write(db, "one")
        write(log, "two")
        log.rollback()
        bottle.abort(409)

    assert two.get().status_code == 409
    assert kept(outside) == {"one"}


def test_an_apps_configuration_is_for_all_its_routes(shop_of, outside):
    shop = shop_of()
    shop.app.config["penstock.transactions"] = "autocommit"
    shop.app.config["penstock.url"] = "somebody's own, and no option of a route"
    shop.app.get("/", callback=aborts)
    assert shop.get().status_code == 409
    assert kept(outside) == {"work"}


def test_a_route_names_its_own_argument_and_gets_it_unasked(shop):
    @shop.app.get("/", penstock={"keyword": "conn"})
    def view(**given):
        return " ".join(
            f"{name} {conn.execute('select 1').fetchone()}" for name, conn in given.items()
        )

    assert shop.get().text == "conn (1,)"


def test_a_decorated_view_gets_it_and_a_skipped_one_does_not(shop):
    import functools

    def decorated(view):
        @functools.wraps(view)
        def inner(*args, **kwargs):
            return view(*args, **kwargs)

        return inner

    @shop.app.get("/a")
    @decorated
    def takes(db):
        return str(db.execute("select 1").fetchone()[0])

    shop.app.get("/b", skip=["penstock"], callback=lambda db=None: str(db))
    assert shop.get("/a").text == "1"
    assert shop.get("/b").text == "None"


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"transaction": "explicit"}, "the options are keyword and transactions"),
        ({"autocommit": True}, 'penstock={"transactions": "autocommit"}'),
        ({"transactions": "always"}, "request, explicit, autocommit"),
        ({"ordres": {"transactions": "explicit"}}, "the keyword of one"),
        ({"keyword": ""}, "name an argument of views"),
    ],
)
def test_a_wrong_option_of_a_route_says_what_to_write(options, step, shop):
    shop.app.get("/", callback=lambda db: "", penstock=options)
    with pytest.raises(MisuseError) as caught:
        shop.app.routes[0].prepare()
    assert step in str(caught.value)
    assert "route '/'" in str(caught.value)


def test_a_path_with_the_keywords_name_is_told(shop):
    shop.app.catchall = False
    shop.app.get("/<db>", callback=lambda db: "")
    with pytest.raises(MisuseError, match=r'keyword="conn"'):
        shop.get("/orders")
    assert not shop.pool.opened


def test_what_the_plugin_is_made_of_is_checked(notes):
    with pytest.raises(MisuseError, match="request, explicit, autocommit"):
        Penstock(notes, transactions="never")
    with pytest.raises(MisuseError, match="name an argument"):
        Penstock(notes, "two words")
    pool = ConnectionPool(notes)
    with pytest.raises(MisuseError, match="where it is made"):
        Penstock(pool, max_size=3)
    pool.close()


# -- a full pool ----------------------------------------------------------------------------------------


def test_a_full_pool_is_a_500_or_where_it_is_wanted_a_503(notes, caplog):
    found = {}
    for retry_after in (None, 7):
        shop = Shop(notes, caplog, retry_after=retry_after, timeout=0.05).install()
        shop.app.get("/", callback=lambda db: "")
        with shop.pool.connection(timeout=10.0):
            answer = shop.get()
        found[answer.status_code] = answer.headers.get("Retry-After")
        shop.app.close()
    assert found == {500: None, 503: "7"}
    (told,) = [line for line in shop.warnings() if "no connection within" in line]
    assert "1 of 1 in use" in told


# -- a view that asks its pool for a second connection --------------------------------------------------


def test_a_view_that_has_its_connection_and_asks_for_another_is_refused_at_once(shop_of):
    shop = shop_of(timeout=30.0)

    @shop.app.get("/")
    def view(db):
        with pytest.raises(MisuseError, match="wait for itself"):
            shop.pool.execute("select 1")
        return str(db.execute("select 2").fetchone()[0])

    assert shop.get().text == "2"


def test_where_it_is_not_seen_the_error_tells_that_it_holds_one_itself_and_the_view(shop_of):
    shop = shop_of(timeout=0.1)
    shop.pool.execute(
        "select 1", timeout=30
    )  # a connection is open, so that nothing else is waited for
    told = []

    def view(**kwargs):
        with pytest.raises(PoolTimeout) as caught:
            shop.pool.execute("select 1")
        told.append(caught.value)
        return "answered"

    line = view.__code__.co_firstlineno
    shop.app.get("/", penstock={"keyword": "db"})(view)
    assert shop.get().text == "answered"
    (own,) = told[0].own
    assert own.line == line
    assert "this thread itself holds one of them, since " in str(told[0])
    assert f"borrowed at integrations/test_bottle.py:{line}" in str(told[0])
