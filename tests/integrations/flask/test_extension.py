"""The extension as an app's author meets it: settings, several apps and databases, hooks, errors, cost."""

import flask
import pytest
from flask import Blueprint, Flask
from tests.forks import until

from penstock import ConfigError, MisuseError, PoolTimeout
from penstock.integrations.flask import Penstock
from pytest_penstock.undone import undone


@pytest.fixture
def app_of():
    made = []

    def make(**settings):
        app = Flask("shop")
        app.config.update({f"PENSTOCK_{key}": value for key, value in settings.items()})
        made.append(app)
        return app

    yield make
    for app in made:
        if "penstock" in app.extensions:
            app.extensions["penstock"].close(timeout=0)


NOWHERE = "postgresql://app@/nowhere?host=does-not-exist.invalid"


# -- initialising -----------------------------------------------------------------------------------------


def test_init_app_opens_nothing_and_names_the_pools_after_the_app(app_of):
    app = app_of(DATABASE_URI=NOWHERE, BINDS={"orders": NOWHERE, "audit": {"url": NOWHERE}})
    Penstock(app)
    pools = app.extensions["penstock"].pools
    assert {key: pool.name for key, pool in pools.items()} == {
        "default": "shop",
        "orders": "shop.orders",
        "audit": "shop.audit",
    }
    assert {pool.stats().state for pool in pools.values()} == {"new"}


def test_an_app_is_initialised_once(app_of):
    app = app_of(DATABASE_URI="")
    db = Penstock(app)
    for again in (db, Penstock()):
        with pytest.raises(MisuseError, match="the app 'shop' was initialised twice"):
            again.init_app(app)


def test_an_app_that_has_served_and_refuses_our_handlers_is_left_as_it_was(app_of):
    app = app_of(DATABASE_URI=NOWHERE, RETRY_AFTER=2)
    app.test_client().get("/")
    with pytest.raises(AssertionError, match="setup"):  # Flask's own
        Penstock(app)
    assert "penstock" not in app.extensions


def test_a_connexion_app_is_one_that_holds_a_flask_app(app_of):
    class FlaskApp:
        def __init__(self):
            self.app = app_of(DATABASE_URI="")

    connexion_app = FlaskApp()
    Penstock(connexion_app)
    assert "penstock" in connexion_app.app.extensions
    with pytest.raises(MisuseError, match="init_app\\(\\) got a value of type object"):
        Penstock(object())


def test_one_object_serves_several_apps(shop_of, notes):
    first = shop_of()
    second = Flask("second")
    second.config["PENSTOCK_DATABASE_URI"] = notes
    first.db.init_app(second)
    with first.app.app_context():
        assert first.db.pool.name == "shop"
    with second.app_context():
        assert first.db.pool.name == "second"
        assert first.db.execute("select 1").fetchone() == (1,)
    assert first.pool.stats().opened == 0
    second.extensions["penstock"].close()


def test_an_app_that_is_another_objects_is_told_so(shop):
    with (
        shop.app.app_context(),
        pytest.raises(MisuseError, match="the app 'shop' was initialised by another Penstock"),
    ):
        Penstock().execute("select 1")
    with (
        Flask("bare").app_context(),
        pytest.raises(MisuseError, match="the app 'bare' was not initialised"),
    ):
        shop.db.execute("select 1")


# -- settings ---------------------------------------------------------------------------------------------


def test_options_are_everybodys_unless_a_database_has_its_own(app_of):
    app = app_of(
        DATABASE_URI={"host": "db", "dbname": "shop", "MAX_SIZE": 4},
        BINDS={"orders": "postgresql://db/orders", "audit": {"url": "host=db", "timeout": 1}},
        POOL_OPTIONS={"max_size": 7, "timeout": 2},
    )
    Penstock(app)
    pools = app.extensions["penstock"].pools
    assert {key: pool.stats().max_size for key, pool in pools.items()} == {
        "default": 4,
        "orders": 7,
        "audit": 7,
    }


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "option 'PENSTOCK_DATABASE_URI' must be a URL"),
        ({"DATABASE_URI": 5}, "option 'PENSTOCK_DATABASE_URI' must be a mapping"),
        ({"DATABASE_URI": "nonsense"}, "option 'PENSTOCK_DATABASE_URI' does not parse"),
        ({"DATABASE_URI": {"max_szie": 3}}, "PENSTOCK_DATABASE_URI[\"max_szie\"]' of pool 'shop'"),
        (
            {"BINDS": {"orders": {"max_szie": 3}}},
            (
                "unknown option 'PENSTOCK_BINDS[\"orders\"][\"max_szie\"]' of pool 'shop.orders': did "
                'you mean \'PENSTOCK_BINDS["orders"]["max_size"]\'?'
            ),
        ),
        (
            {"BINDS": {"orders": {"max_size": 0}}},
            (
                "option 'PENSTOCK_BINDS[\"orders\"][\"max_size\"]' of pool 'shop.orders' must be a "
                "whole number, 1 or more"
            ),
        ),
        ({"BINDS": ["orders"]}, "option 'PENSTOCK_BINDS' must be a mapping"),
        ({"BINDS": {"default": ""}}, "the main database is PENSTOCK_DATABASE_URI"),
        (
            {"DATABASE_URI": "", "POOL_OPTIONS": {"maxconn": 3}},
            (
                "unknown option 'PENSTOCK_POOL_OPTIONS[\"maxconn\"]' of pool 'shop': did you mean "
                "'PENSTOCK_POOL_OPTIONS[\"max_size\"]'?"
            ),
        ),
        (
            {"DATABASE_URI": "", "POOLS_OPTIONS": {}},
            "unknown option 'PENSTOCK_POOLS_OPTIONS': did you mean PENSTOCK_POOL_OPTIONS?",
        ),
        (
            {"DATABASE_URI": "", "MAX_SIZE": 3},
            "option 'PENSTOCK_MAX_SIZE': did you mean PENSTOCK_POOL_OPTIONS[\"max_size\"]?",
        ),
        ({"URL": ""}, "unknown option 'PENSTOCK_URL': did you mean PENSTOCK_DATABASE_URI?"),
        (
            {"DATABASE_URI": "", "TRANSACTIONS": "auto"},
            (
                'option \'PENSTOCK_TRANSACTIONS\' must be "request", "explicit" or "autocommit", '
                "not 'auto'"
            ),
        ),
        ({"DATABASE_URI": "", "RETRY_AFTER": "soon"}, "option 'PENSTOCK_RETRY_AFTER' must be a"),
    ],
)
def test_a_wrong_setting_is_named(settings, text, app_of):
    app = app_of(**settings)
    with pytest.raises(ConfigError) as raised:
        Penstock(app)
    assert text in str(raised.value)
    assert "penstock" not in app.extensions


def test_no_error_shows_a_password(app_of):
    app = app_of(DATABASE_URI={"url": "postgresql://app:s3cret@db/shop", "max_size": "many"})
    with pytest.raises(ConfigError) as raised:
        Penstock(app)
    assert "s3cret" not in str(raised.value)


# -- several databases --------------------------------------------------------------------------------------


def test_a_bind_is_a_database_of_its_own(shop_of, notes):
    shop = shop_of(PENSTOCK_BINDS={"orders": notes})
    orders = shop.db["orders"]  # at the top of a module, before there is an app

    @shop.app.get("/")
    def view():
        assert orders.conn is shop.db["orders"].conn
        assert orders.conn is not shop.db.conn
        assert orders.pool is shop.pools["orders"]
        assert shop.db["default"].conn is shop.db.conn
        orders.execute("insert into note values ('by orders')")
        return orders.health().why

    assert "1 of 1 in use" in shop.get().text
    assert shop.kept() == {"by orders"}
    assert shop.all_are_back()


def test_a_database_that_is_not_there_is_named_beside_those_that_are(shop_of, notes):
    shop = shop_of(PENSTOCK_DATABASE_URI=None, PENSTOCK_BINDS={"a": notes, "b": notes})
    with shop.app.app_context():
        for use in (lambda: shop.db.conn, lambda: shop.db["default"].pool):
            with pytest.raises(MisuseError, match="has no database 'default'; it has 'a', 'b'"):
                use()


def test_a_database_may_be_in_autocommit_while_requests_are_transactions(shop_of, notes):
    shop = shop_of(PENSTOCK_BINDS={"log": {"url": notes, "autocommit": True}})

    @shop.app.get("/")
    def view():
        shop.write("in the transaction")
        shop.db["log"].execute("insert into note values ('logged')")
        flask.abort(409)

    assert shop.get().status_code == 409
    assert shop.kept() == {"logged"}


def test_tests_may_put_another_pool_in_the_place_of_one(shop, shop_of):
    other = shop_of().pool
    shop.pools["default"] = other
    shop.app.add_url_rule("/", "end", lambda: (shop.write("work"), "ok")[1])
    assert shop.get().status_code == 200
    assert other.stats().borrows == 1


def test_what_an_app_does_in_a_test_can_be_undone(shop):
    shop.app.add_url_rule("/", "end", lambda: (shop.write("work"), "ok")[1])
    shop.app.add_url_rule("/no", "no", lambda: (shop.write("more"), flask.abort(409))[1])
    with undone(shop.app.extensions["penstock"]):
        assert (shop.get().status_code, shop.get("/no").status_code) == (200, 409)
        with shop.app.app_context():
            assert shop.db.execute("select tag from note").fetchall() == [("work",)]
        assert shop.all_are_back()
    assert shop.kept() == set()
    assert shop.get().status_code == 200
    assert shop.kept() == {"work"}


# -- on_first_use ---------------------------------------------------------------------------------------------


@pytest.fixture
def counted(shop_of, notes):
    """An app whose hook notes its calls, and says who the user is for the transaction."""
    shop = shop_of(PENSTOCK_BINDS={"second": notes})
    shop.calls = []

    @shop.db.on_first_use
    def say_who(conn):
        shop.calls.append(conn)
        conn.execute("select set_config('app.user', %s, true)", [flask.request.args["user"]])

    shop.who = lambda: shop.db.execute("select current_setting('app.user', true)").fetchone()[0]
    return shop


def test_the_hook_runs_once_per_request_and_database_before_anybody_else(counted):
    @counted.app.get("/")
    def view():
        assert not counted.calls
        first = counted.who()
        counted.db["second"].execute("select 1")
        assert counted.who() == first
        return first

    assert counted.get("/?user=ann").text == "ann"
    assert len(counted.calls) == 2
    assert counted.get("/nowhere?user=bob").status_code == 404
    assert len(counted.calls) == 2


def test_what_the_hook_set_does_not_outlive_the_request(counted):
    counted.app.add_url_rule("/", "end", counted.who)
    assert counted.get("/?user=ann").text == "ann"
    assert counted.get("/?user=bob").text == "bob"
    with counted.pool.connection() as conn:
        assert not conn.execute("select current_setting('app.user', true)").fetchone()[0]


def test_the_hook_runs_again_in_the_next_transaction(counted):
    @counted.app.get("/")
    def view():
        counted.write("work")
        for end in (counted.db.commit, counted.db.rollback, counted.db.conn.commit):
            end()
            assert counted.who() == "ann"
        return "ok"

    assert counted.get("/?user=ann").status_code == 200
    assert len(counted.calls) == 4


def test_row_level_security_by_the_hook(counted):
    counted.outside.execute("""
        drop table if exists secret;
        create table secret (owner text, words text);
        insert into secret values ('ann', 'of ann'), ('bob', 'of bob');
        alter table secret enable row level security;
        create policy own on secret using (owner = current_setting('app.user'));
        drop role if exists reader;
        create role reader;
        grant select on secret to reader;
    """)
    counted.db.on_first_use(lambda conn: conn.execute("set local role reader"))
    counted.app.add_url_rule(
        "/", "end", lambda: str(counted.db.execute("select words from secret").fetchall())
    )
    assert counted.get("/?user=ann").text == "[('of ann',)]"
    assert counted.get("/?user=bob").text == "[('of bob',)]"
    counted.outside.execute("drop table secret; drop role reader")


def test_a_hook_that_raises_gives_back_and_the_next_use_tries_again(counted):
    @counted.app.get("/")
    def view():
        try:
            counted.db.conn  # noqa: B018
        except KeyError:
            assert counted.all_are_back()
        return str(counted.db.pool.stats().in_use)

    counted.app.testing = True
    assert counted.get("/").text == "0"
    assert len(counted.calls) == 1


def test_a_hook_may_use_the_database_itself(shop):
    @shop.db.on_first_use
    def look_up(conn):
        assert shop.db.conn is conn
        shop.db.execute("select 1")

    shop.app.add_url_rule("/", "end", lambda: str(shop.db.execute("select 2").fetchone()[0]))
    assert shop.get().text == "2"


def test_a_databases_own_hook_is_its_own(shop_of, notes):
    shop = shop_of(PENSTOCK_BINDS={"second": notes})
    calls = []
    shop.db["second"].on_first_use(lambda conn: calls.append("second"))
    shop.db.on_first_use(lambda conn: calls.append("every"))
    with shop.app.app_context():
        shop.db.conn  # noqa: B018
        shop.db["second"].conn  # noqa: B018
    assert calls == ["every", "every", "second"]


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "status"), [(None, 500), (7, 503)])
def test_a_full_pool_is_a_503_where_that_is_wanted(seconds, status, shop_of):
    shop = shop_of(
        PENSTOCK_RETRY_AFTER=seconds, PENSTOCK_POOL_OPTIONS={"max_size": 1, "timeout": 0.01}
    )
    shop.app.add_url_rule("/", "end", lambda: str(shop.db.conn))
    shop.pool.open(wait=True, timeout=30)
    held = shop.pool.getconn(30)
    answer = shop.get()
    shop.pool.putconn(held)
    assert answer.status_code == status
    assert answer.headers.get("Retry-After") == (None if seconds is None else "7")
    if seconds:
        assert "no connection within 0.01" in shop.warnings()[0].replace("0.0 s", "0.01 s")


def test_settings_of_an_app_that_were_not_given_are_its_own(app_of):
    first, second = app_of(DATABASE_URI="", ECHO=True), app_of(DATABASE_URI="")
    for app in (first, second):
        Penstock(app)
    first.config["PENSTOCK_BINDS"]["orders"] = NOWHERE
    assert second.config["PENSTOCK_BINDS"] == {}


def test_a_503_of_ours_is_rendered_by_the_apps_own_handler(shop_of):
    shop = shop_of(PENSTOCK_RETRY_AFTER=2, PENSTOCK_DATABASE_URI=NOWHERE)
    shop.app.register_error_handler(503, lambda error: ("come again", 503))
    shop.app.add_url_rule("/", "end", lambda: str(shop.db.conn))
    answer = shop.get()
    assert (answer.text, answer.status_code) == ("come again", 503)


def test_a_view_may_catch_a_full_pool_itself(shop_of):
    shop = shop_of(PENSTOCK_POOL_OPTIONS={"max_size": 1, "timeout": 0.01})

    @shop.app.get("/")
    def view():
        with pytest.raises(PoolTimeout):
            shop.db.conn  # noqa: B018
        return "busy"

    shop.pool.open(wait=True, timeout=30)
    held = shop.pool.getconn(30)  # somebody else's, as far as the pool can know
    assert shop.get().text == "busy"
    shop.pool.putconn(held)


def test_commit_of_a_failed_transaction_is_no_silent_rollback(shop):
    with shop.app.app_context():
        shop.write("work")
        with pytest.raises(Exception, match="duplicate key"):
            shop.write("work")
        with pytest.raises(
            MisuseError, match="commit of a transaction in which a statement failed"
        ):
            shop.db.commit()
        shop.db.rollback()
        shop.write("work")
        shop.db.commit()
    assert shop.kept() == {"work"}


def test_a_lost_session_is_replaced_after_a_rollback(shop):
    with shop.app.app_context():
        lost = shop.db.conn
        with pytest.raises(Exception, match="terminating connection"):
            shop.db.execute("select pg_terminate_backend(pg_backend_pid())")
        assert shop.db.conn is lost  # its transaction is lost, and nobody has said that he knows
        shop.db.rollback()
        assert shop.db.execute("select 1").fetchone() == (1,)
    assert shop.all_are_back()


def test_a_session_that_ends_between_two_transactions_of_a_request_is_replaced(shop):
    with shop.app.app_context():
        lost = shop.db.conn
        pid = shop.db.execute("select pg_backend_pid()").fetchone()[0]
        shop.db.commit()
        shop.outside.execute("select pg_terminate_backend(%s)", [pid])
        until(lambda: shop.db.conn is not lost, "the watcher has heard of it")
        assert shop.db.execute("select 1").fetchone() == (1,)
    assert shop.all_are_back()


# -- blueprints ---------------------------------------------------------------------------------------------


def test_a_blueprint_and_before_request_use_the_module_level_object(shop):
    blueprint = Blueprint("orders", __name__)

    @blueprint.before_request
    def who():
        flask.g.user = shop.db.execute("select 'ann'").fetchone()[0]

    @blueprint.get("/orders")
    def orders():
        return flask.g.user

    shop.app.register_blueprint(blueprint)
    assert shop.get("/orders").text == "ann"
    assert shop.pool.stats().borrows == 1


# -- what it costs on the wire ------------------------------------------------------------------------------


def read(shop):
    return str(shop.db.execute("select 1").fetchone())


def read_and_refuse(shop):
    read(shop)
    flask.abort(404)


COSTS = [
    ("request", lambda shop: "nothing", 0),
    ("request", read, 3),  # begin, the statement, commit
    ("request", read_and_refuse, 3),  # begin, the statement, "has it written?" with rollback
    ("request", lambda shop: (read(shop), shop.db.commit(), "done")[2], 3),
    ("explicit", read, 3),
    ("autocommit", lambda shop: "nothing", 0),
    ("autocommit", read, 1),
    ("autocommit", read_and_refuse, 1),
]


@pytest.fixture
def wired(shop_of, server, proxy):
    uri = server.conninfo(dbname="notes", port=proxy.port)
    return lambda mode: shop_of(mode, PENSTOCK_DATABASE_URI=uri)


@pytest.mark.parametrize(("mode", "view", "trips"), COSTS)
def test_what_a_request_says_to_the_server(mode, view, trips, wired, proxy):
    shop = wired(mode)
    shop.app.add_url_rule("/", "end", lambda: view(shop))
    shop.pool.open(wait=True, timeout=30)
    with proxy.counting() as count:
        shop.get()
    assert count.round_trips == trips
