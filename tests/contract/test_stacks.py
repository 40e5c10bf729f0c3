"""What a stack shows of a borrower's connections: asked from every place of a body that users write."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest

from penstock._process import stacks


class Connection:
    """Something that is found by its identity."""


CONN = Connection()


def here() -> Any:
    """How the connection is seen from where this is called."""
    return stacks.seen({id(CONN)}, sys._getframe(1)).get(id(CONN))


@contextlib.contextmanager
def block():
    yield CONN


@contextlib.contextmanager
def other():
    yield Connection()


def plain():
    with block() as conn:
        found = here()
    del conn
    return found


def in_a_try():
    with block() as conn:
        try:
            return here()
        except ValueError:
            return conn


def in_an_except():
    with block() as conn:
        try:
            raise ValueError
        except ValueError:
            return here() if conn else None


def in_a_finally():
    with block() as conn:
        try:
            pass
        finally:
            found = here()
    return found if conn else None


def in_a_loop_in_two_tries():
    found = None
    with block() as conn:
        try:
            for _ in range(1):
                try:
                    found = here()
                except KeyError:
                    raise
        except (ValueError, OSError):
            return conn
    return found


def in_a_generator():
    def inner():
        with block() as conn:
            try:
                yield here() if conn else None
            finally:
                pass

    return next(inner())


def in_the_head_of_the_next_one():
    with (
        block() as conn,
        contextlib.nullcontext(here()) as found,
    ):
        return found if conn else None


def in_a_callee():
    def callee():
        return here()

    with block() as conn:
        return callee() if conn else None


def bound_among_others():
    @contextlib.contextmanager
    def two():
        yield 1, CONN

    with two() as (_, conn):
        return here() if conn else None


def given_to_a_function():
    def use(conn):
        return here() if conn else None

    return use(CONN)


def given_by_keyword():
    def use(*, conn):
        return here() if conn else None

    return use(conn=CONN)


def before():
    conn, found = CONN, None
    for turn in range(2):
        if turn == 0:
            found = here()
        else:
            with other() as conn:
                pass
    return found if conn else None


def after():
    with block() as conn:
        pass
    return here() if conn else None


def in_a_try_whose_except_has_one():
    conn = CONN
    try:
        return here()
    except ValueError:
        with block() as conn:
            return conn


def in_a_try_whose_finally_has_one():
    conn = CONN
    try:
        found = here()
    finally:
        with other() as conn:
            pass
    return found if conn else None


def in_a_try_beside_one():
    with block() as conn:
        pass
    try:
        return here() if conn else None
    except ValueError:
        return None


def in_the_with_of_something_else():
    conn = CONN
    with other() as span:
        return here() if conn and span else None


def in_a_worker_that_keeps_the_last_result():
    result = None
    for call in (lambda: CONN, here):
        last, result = result, call()
    return result if last is CONN else None


def a_variable_of_a_function_outside_that_has_ended():
    def outer():
        with block() as conn:

            def inner():
                return here() if conn else None

            return inner

    return outer()()


KEPT = (
    plain,
    in_a_try,
    in_an_except,
    in_a_finally,
    in_a_loop_in_two_tries,
    in_a_generator,
    in_the_head_of_the_next_one,
    in_a_callee,
    bound_among_others,
    given_to_a_function,
    given_by_keyword,
)
NOT_KEPT = (
    before,
    after,
    in_a_try_whose_except_has_one,
    in_a_try_whose_finally_has_one,
    in_a_try_beside_one,
    in_the_with_of_something_else,
    in_a_worker_that_keeps_the_last_result,
    a_variable_of_a_function_outside_that_has_ended,
)


@pytest.mark.parametrize("place", KEPT, ids=lambda place: place.__name__)
def test_a_connection_that_a_running_with_has_bound_or_a_call_was_given_is_kept(place):
    found = place()
    assert found is not None
    assert found.kept


@pytest.mark.parametrize("place", NOT_KEPT, ids=lambda place: place.__name__)
def test_a_connection_that_a_variable_merely_names_is_seen_and_not_kept(place):
    found = place()
    assert found is not None
    assert not found.kept


def test_a_with_tells_the_line_at_which_it_has_bound_the_connection():
    line = plain.__code__.co_firstlineno + 1
    found = plain()
    assert (found.line, found.bound, found.function) == (line, True, "plain")


def test_a_modules_variable_is_everybodys():
    source = "CONN = given\nfound = here()\n"
    space: dict[str, Any] = {"given": CONN, "here": here}
    exec(source, space)
    assert not space["found"].kept


def test_where_there_is_no_source_nothing_is_kept():
    source = "def ask():\n    with block() as conn:\n        return here(), conn\n"
    space: dict[str, Any] = {"block": block, "here": here}
    exec(compile(source, "nowhere.py", "exec"), space)
    found, _ = space["ask"]()
    assert not found.kept


def test_a_frame_whose_variables_cannot_be_read_is_passed_over():
    class Odd(dict):
        def items(self) -> Any:
            raise RuntimeError

    with block() as conn:
        space: dict[str, Any] = Odd(here=here)
        exec("found = here()", {}, space)
    assert conn is CONN
    assert space["found"].kept
