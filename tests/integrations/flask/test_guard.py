"""In debug mode a connection that outlived its request raises, also while another request has its session."""

import psycopg
import pytest
from flask import Flask

from penstock import MisuseError
from penstock.integrations.flask import Penstock


def misused(conninfo, *, debug, **options):
    """What comes of a connection that was kept, while another context has the session."""
    app = Flask("shop")
    app.debug = debug
    app.config["PENSTOCK_DATABASE_URI"] = conninfo
    app.config["PENSTOCK_POOL_OPTIONS"] = {"max_size": 1, **options}
    db = Penstock(app)
    try:
        with app.app_context():
            kept = db.conn
            kept.cursor().execute("select 1")
        with app.app_context():
            db.conn.cursor().execute("select 1")
            kept.cursor().execute("select 2")
        return app.extensions["penstock"].pools["default"].stats().opened
    finally:
        app.extensions["penstock"].pools["default"].close()


def test_debug_mode_notices_a_connection_that_outlived_its_request(notes):
    with pytest.raises(MisuseError) as caught:
        misused(notes, debug=True)
    assert isinstance(caught.value, psycopg.InterfaceError)


def test_without_debug_mode_or_against_the_apps_own_word_it_does_not(notes):
    assert misused(notes, debug=False) == 1
    assert misused(notes, debug=True, guard=False) == 1


def test_psycopg2_is_guarded_only_if_the_app_says_so_because_it_costs_sessions(notes):
    assert misused(notes, debug=True, driver="psycopg2") == 1
    with pytest.raises(MisuseError):
        misused(notes, debug=False, driver="psycopg2", guard=True)
