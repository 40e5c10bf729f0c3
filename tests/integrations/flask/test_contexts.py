"""Whose a connection is: nested and copied contexts, threads, async views, commands, test clients, forks."""

import contextvars
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import click
import flask
import pytest
from flask import copy_current_request_context, current_app
from tests.forks import Child, quiet_libc_fork

from penstock import MisuseError

TWO = {"max_size": 2, "timeout": 10.0}


def pid_of(conn):
    return conn.execute("select pg_backend_pid()").fetchone()[0]


# -- nested contexts --------------------------------------------------------------------------------------


def test_contexts_nested_in_a_request_share_its_connection_and_transaction(shop):
    @shop.app.get("/")
    def view():
        conn = shop.db.conn
        with current_app.app_context():
            assert shop.db.conn is conn
            shop.write("inside")
            with current_app.app_context():
                assert shop.db.conn is conn
        assert shop.db.conn is conn  # the end of a nested context is not the request's
        return "ok"

    assert shop.get().status_code == 200
    assert shop.kept() == {"inside"}
    assert shop.pool.stats().borrows == 1


def test_a_nested_context_is_not_the_first_to_borrow_for_itself(shop):
    @shop.app.get("/")
    def view():
        with current_app.app_context():
            conn = shop.db.conn
        assert shop.db.conn is conn
        return "ok"

    assert shop.get().status_code == 200
    assert shop.all_are_back()


def test_another_apps_context_in_a_request_is_that_apps(shop, shop_of):
    other = shop_of()

    @shop.app.get("/")
    def view():
        mine = pid_of(shop.db.conn)
        with other.app.app_context():
            theirs = pid_of(other.db.conn)
        assert other.all_are_back()
        assert pid_of(shop.db.conn) == mine != theirs
        return "ok"

    assert shop.get().status_code == 200


def test_a_request_within_a_request_is_another_one(shop_of):
    shop = shop_of(PENSTOCK_POOL_OPTIONS=TWO)
    shop.app.add_url_rule("/inner", "inner", lambda: str(pid_of(shop.db.conn)))

    @shop.app.get("/")
    def outer():
        mine = pid_of(shop.db.conn)
        theirs = shop.get("/inner").text
        assert pid_of(shop.db.conn) == mine
        return "same" if theirs == str(mine) else "another"

    assert shop.get().text == "another"
    assert shop.all_are_back()


def test_app_contexts_outside_of_requests_have_one_connection_each(shop_of):
    shop = shop_of(PENSTOCK_POOL_OPTIONS=TWO)
    with shop.app.app_context():
        conn = shop.db.conn
        assert shop.db.conn is conn
        with shop.app.app_context():
            assert shop.db.conn is not conn
        assert shop.pool.stats().in_use == 1
    assert shop.all_are_back()


def test_a_request_in_an_app_context_that_was_there_is_a_request(shop_of):
    """A fixture that pushes one. Flask up to 3.1 does not push another, nor end this one."""
    shop = shop_of(PENSTOCK_POOL_OPTIONS=TWO)
    shop.app.add_url_rule("/", "end", lambda: (shop.write("work"), "ok")[1])
    with shop.app.app_context():
        shop.write("the fixture's, not committed")
        assert shop.get().status_code == 200
        assert shop.kept() == {"work"}
        assert shop.pool.stats().in_use == 1
        shop.db.rollback()
    assert shop.all_are_back()


# -- contexts without a request ---------------------------------------------------------------------------


def test_what_an_app_context_writes_is_kept_only_if_it_commits(shop):
    with shop.app.app_context():
        shop.write("committed")
        shop.db.commit()
        shop.write("forgotten")
    assert shop.kept() == {"committed"}
    assert shop.all_are_back()
    (told,) = shop.warnings()
    assert told.startswith("an app context of 'shop': uncommitted work")


def test_an_app_context_that_raises_gives_back_without_a_word(shop):
    with pytest.raises(ZeroDivisionError), shop.app.app_context():
        shop.write("work")
        raise ZeroDivisionError
    assert shop.kept() == set()
    assert shop.all_are_back()
    assert not shop.warnings()


def test_a_command_is_named_when_it_forgets_to_commit(shop):
    @shop.app.cli.command("import-notes")
    @click.option("--commit/--forget", default=True)
    def import_notes(commit):
        shop.write("imported" if commit else "forgotten")
        if commit:
            shop.db.commit()

    runner = shop.app.test_cli_runner()
    for option in ("--commit", "--forget"):
        done = runner.invoke(args=["import-notes", option])
        assert done.exit_code == 0, done.output
        assert shop.all_are_back()
    assert shop.kept() == {"imported"}
    (told,) = shop.warnings()
    assert told.startswith("command 'import-notes': uncommitted work")


def test_a_command_that_fails_gives_back(shop):
    @shop.app.cli.command("fail")
    def fail():
        shop.write("work")
        raise ZeroDivisionError

    assert shop.app.test_cli_runner().invoke(args=["fail"]).exit_code == 1
    assert shop.all_are_back()
    assert shop.kept() == set()


# -- the test client --------------------------------------------------------------------------------------


def test_a_client_that_keeps_the_context_may_go_on_and_gives_back(shop):
    """Its teardown runs twice: after the request, and at the end of the block."""
    shop.app.add_url_rule("/", "end", lambda: (shop.write("work"), "ok")[1])
    with shop.app.test_client() as client:
        client.get("/")
        assert shop.all_are_back()
        assert flask.request.path == "/"
        assert shop.db.execute("select tag from note").fetchall() == [("work",)]
        assert shop.pool.stats().in_use == 1
        client.get("/nowhere")
        assert shop.all_are_back()
    assert shop.all_are_back()


def test_a_test_request_context_is_a_request(shop):
    with shop.app.test_request_context("/"):
        conn = shop.db.conn
        assert shop.db.conn is conn
    assert shop.all_are_back()


# -- threads ------------------------------------------------------------------------------------------------


def test_a_copied_request_context_has_a_connection_of_its_own(shop_of):
    shop = shop_of(PENSTOCK_POOL_OPTIONS=TWO)

    @shop.app.get("/")
    def view():
        mine = pid_of(shop.db.conn)

        @copy_current_request_context
        def work():
            theirs = pid_of(shop.db.conn)
            shop.write("the thread's")
            shop.db.commit()
            return theirs

        with ThreadPoolExecutor(1) as threads:
            theirs = threads.submit(work).result()
        assert shop.pool.stats().in_use == 1
        return "same" if theirs == mine else "another"

    assert shop.get().text == "another"
    assert shop.kept() == {"the thread's"}
    assert shop.all_are_back()


def test_threads_that_work_for_one_request_borrow_once(shop):
    """They run in copies of its context, as `asyncio.to_thread` has it."""
    together = threading.Barrier(8)

    def work():
        together.wait()
        return id(shop.db.conn)

    @shop.app.get("/")
    def view():
        with ThreadPoolExecutor(8) as threads:
            runs = [contextvars.copy_context().run for _ in range(8)]
            found = {done.result() for done in [threads.submit(run, work) for run in runs]}
        return str(len(found))

    assert shop.get().text == "1"
    assert shop.pool.stats().borrows == 1


def test_a_context_that_is_never_ended_comes_home_when_it_is_collected(shop):
    """The net below: nothing of Flask's runs."""

    def never_ended():
        shop.app.app_context().push()
        shop.write("work")

    contextvars.copy_context().run(never_ended)
    shop.come_back_when_collected()
    assert shop.pool.execute("select count(*) from note").fetchone() == (0,)
    assert shop.pool.stats().orphaned == 1


def test_outside_of_any_context_one_is_told_what_to_do(shop):
    for use in (
        lambda: shop.db.conn,
        lambda: shop.db.execute("select 1"),
        lambda: shop.db["orders"].pool,
        shop.db.commit,
        shop.db.rollback,
        shop.db.health,
        lambda: shop.db.stream(["x"]),
    ):
        with pytest.raises(MisuseError, match=r"app\.app_context\(\)"):
            use()


# -- async views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["request", "explicit", "autocommit"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_async_view_has_the_requests_connection(mode, fails, shop_of):
    pytest.importorskip("asgiref", reason="async views need flask[async]")
    shop = shop_of(mode)
    seen = []

    @shop.app.before_request
    def look():
        seen.append(shop.db.conn)

    @shop.app.get("/")
    async def view():
        seen.append(shop.db.conn)
        shop.write("work")
        if fails:
            raise ZeroDivisionError
        return "ok"

    assert shop.get().status_code == (500 if fails else 200)
    assert seen[0] is seen[1]
    assert ("work" in shop.kept()) == (mode == "autocommit" or (mode == "request" and not fails))
    assert shop.all_are_back()
    assert shop.pool.stats().borrows == 1


def test_an_async_view_that_borrows_first_gives_back(shop):
    pytest.importorskip("asgiref", reason="async views need flask[async]")

    @shop.app.get("/")
    async def view():
        shop.write("work")
        return "ok"

    assert shop.get().status_code == 200
    assert shop.kept() == {"work"}
    assert shop.all_are_back()


# -- forks --------------------------------------------------------------------------------------------------


def test_workers_that_are_forked_after_a_request_have_sessions_of_their_own(shop):
    shop.app.add_url_rule("/", "end", lambda: str(pid_of(shop.db.conn)))
    parents = shop.get().text
    children = [Child(lambda: shop.get().text) for _ in range(2)]
    found = {parents, *(child.answer() for child in children)}
    assert len(found) == 3
    assert shop.get().text == parents


@pytest.mark.parametrize("fork", [os.fork, quiet_libc_fork], ids=["hooks run", "no hook runs"])
def test_a_child_that_inherits_a_context_leaves_the_parents_transaction_alone(fork, shop):
    """`multiprocessing` in a command: the child stands in the same context."""

    def in_the_child():
        theirs = pid_of(shop.db.conn)
        shop.db.rollback()
        return theirs

    def at_its_end():
        with context:
            return

    with shop.app.app_context() as context:
        shop.write("work")
        mine = pid_of(shop.db.conn)
        assert Child(in_the_child, fork=fork).answer() != mine
        assert Child(at_its_end, fork=fork).answer() is None
        assert pid_of(shop.db.conn) == mine
        shop.db.commit()
    assert shop.kept() == {"work"}
