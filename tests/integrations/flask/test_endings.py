"""Every way a request can end, in every transaction mode: the connection is back, the work is where
it should be, and no request has two connections (the pool has one)."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import flask
import psycopg
import pytest

from penstock import PoolTimeout

MODES = ["request", "explicit", "autocommit"]


class Killed(BaseException):
    """As gevent's GreenletExit: no Exception."""


class Refused(Exception):
    """An error that the app has a handler for."""


@dataclass
class Ending:
    """One way to end.

    Attributes:
        view: called with the shop; writes the note "work" and ends.
        status: what is answered; by mode where it differs. An exception type: it leaves the app.
        commits: whether mode "request" keeps the work.
        warns: whether somebody must be told that it was not kept.
        prepare, then: what the app does before and after it initialises the extension.
    """

    view: Any
    status: Any
    commits: bool
    warns: bool = False
    prepare: Any = lambda shop: None
    then: Any = lambda shop: None
    kept: dict = field(default_factory=dict)
    warned: dict = field(default_factory=dict)

    def answers(self, mode):
        return self.status.get(mode, 200) if isinstance(self.status, dict) else self.status

    def keeps(self, mode):
        by_mode = {"request": self.commits, "explicit": False, "autocommit": True}
        return self.kept.get(mode, by_mode[mode])

    def tells(self, mode):
        loud = not (isinstance(self.status, type) or self.answers(mode) == 500) or self.warns
        by_mode = {"request": self.warns, "explicit": loud, "autocommit": False}
        return self.warned.get(mode, by_mode[mode])


def answering(text, status=200):
    def view(shop):
        shop.write("work")
        return text, status

    return view


def raising(error):
    def view(shop):
        shop.write("work")
        raise error

    return view


def aborting(shop):
    shop.write("work")
    flask.abort(409)


def redirecting(shop):
    shop.write("work")
    return flask.redirect("/elsewhere")


def handling(*answer):
    return lambda shop: shop.app.register_error_handler(Refused, lambda error: answer)


def breaks(*_):
    raise ZeroDivisionError("somebody else's")


def hook(name, function=breaks):
    return lambda shop: getattr(shop.app, name)(function)


def answers_early(shop):
    @shop.app.before_request
    def answer():
        shop.write("work")
        return "early", 202


def violates_at_commit(shop):
    shop.write("work", 1)
    shop.write("work too", 1)
    return "written"


def kills_its_session(shop):
    shop.write("work")
    with contextlib.suppress(psycopg.OperationalError):
        shop.db.execute("select pg_terminate_backend(pg_backend_pid())")
        shop.db.execute("select 1")
    return "as if nothing had happened"


def swallows(shop):
    shop.write("work")
    with contextlib.suppress(psycopg.errors.UniqueViolation):
        shop.write("work")
    return "never mind"


def leaves_a_statement(shop):
    shop.write("work")
    shop.rows = shop.db.conn.cursor().stream("select generate_series(1, 100000)")
    next(shop.rows)
    return "not read to the end"


def writes_twice(shop):
    shop.write("work")
    shop.write("work")


def closes(shop):
    shop.write("work")
    shop.db.conn.close()
    return "closed"


def rolls_back(shop):
    shop.write("work")
    shop.db.rollback()
    return "on second thoughts"


def commits(shop):
    shop.write("work")
    shop.db.commit()
    return "no", 400


ALL = {"request": True, "explicit": True, "autocommit": True}
SILENT = {"explicit": False}
TOLD = {"explicit": True}

ENDINGS = {
    "2xx": Ending(answering("made", 201), 201, commits=True),
    "3xx": Ending(redirecting, 302, commits=True),
    "4xx returned": Ending(answering("no", 404), 404, commits=False, warns=True),
    "5xx returned": Ending(answering("oh", 503), 503, commits=False, warns=True),
    "abort()": Ending(aborting, 409, commits=False, warns=True),
    "an exception": Ending(raising(ValueError("bug")), 500, commits=False),
    "an exception, handled, 200": Ending(
        raising(Refused()), 200, commits=True, prepare=handling("fine", 200)
    ),
    "an exception, handled, 4xx": Ending(
        raising(Refused()), 409, commits=False, warns=True, then=handling("no", 409)
    ),
    "an exception, handled as 500, answering 200": Ending(
        raising(ValueError("bug")),
        200,
        commits=True,
        warned=SILENT,  # Flask tells teardowns of the error, and has logged it
        prepare=lambda shop: shop.app.register_error_handler(500, lambda error: ("sorry", 200)),
    ),
    "after_request raises, registered first": Ending(
        answering("ok"), 500, commits=False, prepare=hook("after_request")
    ),
    "after_request raises, registered last": Ending(
        answering("ok"), 500, commits=False, then=hook("after_request")
    ),
    "before_request answers": Ending(answering("never"), 202, commits=True, then=answers_early),
    "teardown_request raises": Ending(
        answering("ok"), ZeroDivisionError, commits=True, warned=TOLD, then=hook("teardown_request")
    ),
    "teardown_appcontext raises, registered first": Ending(
        answering("ok"),
        ZeroDivisionError,
        commits=True,
        warned=TOLD,
        prepare=hook("teardown_appcontext"),
    ),
    "teardown_appcontext raises, registered last": Ending(
        answering("ok"),
        ZeroDivisionError,
        commits=True,
        warned=TOLD,
        then=hook("teardown_appcontext"),
    ),
    "an exception and a teardown that raises": Ending(
        raising(ValueError("bug")), ZeroDivisionError, commits=False, then=hook("teardown_request")
    ),
    "the commit fails": Ending(
        violates_at_commit,
        {"request": 500, "autocommit": 500},
        commits=False,
        warned=TOLD,
    ),
    "the session is killed, and the view goes on": Ending(
        kills_its_session, {"request": 500}, commits=False, warned=SILENT
    ),
    "a failed statement is swallowed": Ending(swallows, 200, commits=False, warns=True),
    "a failed statement is answered with a 4xx": Ending(
        writes_twice,
        409,
        commits=False,
        warned=SILENT,
        then=lambda shop: shop.app.register_error_handler(
            psycopg.errors.UniqueViolation, lambda error: ("taken", 409)
        ),
    ),
    "a statement is still under way": Ending(
        leaves_a_statement, {"request": 500}, commits=False, warned=ALL
    ),
    "the view closes the connection": Ending(closes, 200, commits=False, warned=SILENT),
    "the view rolls back": Ending(rolls_back, 200, commits=False, warned=SILENT),
    "the view commits": Ending(commits, 400, commits=True, kept=ALL, warned=SILENT),
    "KeyboardInterrupt": Ending(raising(KeyboardInterrupt()), KeyboardInterrupt, commits=False),
    "SystemExit": Ending(raising(SystemExit(3)), SystemExit, commits=False),
    "a greenlet is killed": Ending(raising(Killed()), Killed, commits=False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENDINGS)
def test_however_a_request_ends(name, mode, shop_of):
    ending = ENDINGS[name]
    shop = shop_of(mode, prepare=ending.prepare)
    ending.then(shop)
    shop.app.add_url_rule("/", "end", lambda: ending.view(shop))

    expected = ending.answers(mode)
    if isinstance(expected, type):
        with pytest.raises(expected):
            shop.get()
    else:
        assert shop.get().status_code == expected

    assert shop.all_are_back(), repr(shop.pool)
    assert ("work" in shop.kept()) == ending.keeps(mode)
    assert bool(shop.warnings()) == ending.tells(mode), shop.warnings()
    with shop.pool.connection() as conn:  # what comes back is fit for others
        assert conn.info.transaction_status == 0
        assert conn.execute("select 1").fetchone() == (1,)


def test_a_warning_names_the_endpoint_and_what_it_answered(shop):
    shop.app.add_url_rule("/notes/<tag>", "note.add", lambda tag: answering("no", 409)(shop))
    shop.get("/notes/x")
    (told,) = shop.warnings()
    assert told.startswith(
        "GET /notes/<tag> (endpoint 'note.add') answered 409: uncommitted work on pool 'shop' was "
        "thrown away"
    )


def test_nobody_is_warned_where_nothing_was_written(shop):
    @shop.app.get("/")
    def look():
        shop.db.execute("select * from note")
        flask.abort(404)

    assert shop.get().status_code == 404
    assert not shop.warnings()
    assert shop.pool.stats().borrows == 1


@pytest.mark.parametrize("path", ["/nowhere", "/static/nothing.css"])
def test_a_404_borrows_nothing(path, shop):
    shop.app.add_url_rule("/", "end", lambda: answering("ok")(shop))
    assert shop.get(path).status_code == 404
    assert shop.pool.stats().opened == 0


def test_options_borrows_nothing_and_head_does_what_get_does(shop):
    shop.app.add_url_rule("/", "end", lambda: answering("ok")(shop))
    client = shop.app.test_client()
    assert client.options("/").status_code == 200
    assert shop.pool.stats().opened == 0
    assert client.head("/").status_code == 200
    assert shop.kept() == {"work"}
    assert shop.all_are_back()


def test_a_request_has_one_connection_from_before_request_to_after_request(shop):
    seen = []

    def look(response=None):
        seen.append(shop.db.conn)
        return response

    shop.app.before_request(look)
    shop.app.after_request(look)
    shop.app.teardown_request(lambda error: look())
    shop.app.add_url_rule("/", "end", lambda: (look(), "ok")[1])
    shop.get()
    assert len(seen) == 4
    assert len({id(conn) for conn in seen}) == 1
    assert shop.pool.stats().borrows == 1


def test_what_after_request_functions_write_is_committed_too(shop):
    @shop.app.after_request
    def write(response):
        shop.write("from after_request")
        return response

    shop.app.add_url_rule("/", "end", lambda: answering("ok")(shop))
    shop.get()
    assert shop.kept() == {"work", "from after_request"}


def test_a_teardown_may_use_the_connection_and_what_it_writes_is_not_kept(shop):
    @shop.app.teardown_appcontext
    def write(error):
        shop.write("from teardown")

    shop.app.add_url_rule("/", "end", lambda: answering("ok")(shop))
    shop.get()
    assert shop.kept() == {"work"}
    assert shop.all_are_back()
    assert len(shop.warnings()) == 1


def test_the_connection_is_dead_for_its_old_holder(shop):
    @shop.app.get("/")
    def keep():
        shop.stolen = shop.db.conn
        return "ok"

    shop.get()
    with pytest.raises(psycopg.InterfaceError, match="given back to its pool"):
        shop.stolen.execute("select 1")


def test_a_commit_that_fails_after_another_database_has_committed_is_a_500(shop_of, notes):
    options = {"conninfo": notes, "max_size": 1}
    shop = shop_of(PENSTOCK_BINDS={"second": options})

    @shop.app.get("/")
    def both():
        shop.write("first")
        for tag in ("a", "b"):
            shop.db["second"].execute("insert into note values (%s, 1)", (tag,))
        return "ok"

    assert shop.get().status_code == 500
    assert shop.kept() == {"first"}
    assert shop.all_are_back()


def test_an_apps_own_handler_is_kept_also_if_it_was_there_before_ours(shop_of):
    def prepare(shop):
        shop.app.register_error_handler(PoolTimeout, lambda error: ("full", 418))

    options = {"max_size": 1, "timeout": 0.01}
    shop = shop_of(prepare=prepare, PENSTOCK_RETRY_AFTER=7, PENSTOCK_POOL_OPTIONS=options)
    shop.app.add_url_rule("/", "end", lambda: str(shop.db.conn))
    shop.pool.open(wait=True, timeout=30)
    held = shop.pool.getconn(30)
    answer = shop.get()
    shop.pool.putconn(held)
    assert (answer.text, answer.status_code) == ("full", 418)
