"""Is a frame inside the body of a `with`? Asked from every place of a body that users write."""

from __future__ import annotations

import contextlib
import sys

import pytest

from penstock.with_blocks import is_inside_with


def here() -> bool:
    return is_inside_with(sys._getframe(1))


@contextlib.contextmanager
def block():
    yield


def plain():
    with block():
        return here()


def in_a_try():
    with block():
        try:
            return here()
        except ValueError:
            return None


def in_an_except():
    with block():
        try:
            raise ValueError
        except ValueError:
            return here()


def in_a_finally():
    with block():
        try:
            pass
        finally:
            found = here()
    return found


def in_a_loop_in_two_tries():
    with block():
        try:
            for _ in range(1):
                try:
                    found = here()
                except KeyError:
                    raise
        except (ValueError, OSError):
            return None
    return found


def in_a_generator():
    def inner():
        with block():
            try:
                yield here()
            finally:
                pass

    return next(inner())


def in_an_inner_with():
    with block(), block():
        return here()


def before():
    found = here()
    with block():
        pass
    return found


def after():
    with block():
        pass
    return here()


def in_a_try_whose_except_has_one():
    try:
        return here()
    except ValueError:
        with block():
            return None


def in_a_try_whose_finally_has_one():
    try:
        found = here()
    finally:
        with block():
            pass
    return found


def in_a_try_beside_one():
    with block():
        pass
    try:
        return here()
    except ValueError:
        return None


INSIDE = (
    plain,
    in_a_try,
    in_an_except,
    in_a_finally,
    in_a_loop_in_two_tries,
    in_a_generator,
    in_an_inner_with,
)
OUTSIDE = (
    before,
    after,
    in_a_try_whose_except_has_one,
    in_a_try_whose_finally_has_one,
    in_a_try_beside_one,
)


@pytest.mark.parametrize("place", INSIDE, ids=lambda place: place.__name__)
def test_inside(place):
    assert place() is True


@pytest.mark.parametrize("place", OUTSIDE, ids=lambda place: place.__name__)
def test_outside(place):
    assert place() is False
