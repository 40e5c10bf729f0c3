"""The hot path is written out in `PgconnLease` and `ClassLease` once more: all texts must say the same.

Compared are the syntax trees, with the names of one place put for the names of the other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import penstock._machine.machine
import penstock._pool.sync.lease

SRC = Path(penstock.__file__).parent
LEASE = ast.parse((SRC / "_pool/sync/lease.py").read_text())
MACHINE = ast.parse((SRC / "_machine" / "machine.py").read_text())
DRIVER = ast.parse((SRC / "_drivers/psycopg3/link.py").read_text())
PSYCOPG2 = ast.parse((SRC / "_drivers/psycopg2/link.py").read_text())

each_lease = pytest.mark.parametrize("written", ["PgconnLease", "ClassLease"])


def method(tree, cls, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == name:
                    return part
    raise AssertionError(f"no {cls}.{name}")


def said(node, **names):
    """The text of a piece of code, with some names replaced."""
    text = ast.unparse(node)
    for old, new in names.items():
        text = text.replace(f"{old}.", f"{new}.")
    return text


def fit_test(function):
    """The `if` that asks whether a slot is fit to be lent."""
    return next(
        node
        for node in ast.walk(function)
        if isinstance(node, ast.If) and "retire_at" in ast.unparse(node.test)
    )


@each_lease
def test_a_slot_is_judged_the_same_in_the_lease_as_in_take(written):
    take = fit_test(method(MACHINE, "Machine", "take"))
    lease = fit_test(method(LEASE, written, "__enter__"))
    assert said(take.test, self="machine") == said(lease.test)


@each_lease
def test_a_slot_is_taken_the_same_in_the_lease_as_in_take(written):
    take = fit_test(method(MACHINE, "Machine", "take"))
    lease = fit_test(method(LEASE, written, "__enter__"))
    taken = [said(line) for line in take.body if isinstance(line, ast.Assign)]
    written_out = [said(line).replace("threading.get_ident()", "holder") for line in lease.body]
    assert taken == written_out[: len(taken)]
    # and then it is stored, where nobody else is inside
    assert said(lease.body[len(taken)]).startswith("if self._slot is not None:")
    assert written_out[len(taken) + 1] == "self._slot = slot"


@each_lease
def test_an_unfit_slot_is_put_aside_in_both(written):
    take = ast.unparse(method(MACHINE, "Machine", "take"))
    enter = method(LEASE, written, "__enter__")
    fit = fit_test(enter)
    assert isinstance(fit.body[-1], ast.Return)
    ((_, unfit, forget),) = [
        node.orelse for node in ast.walk(enter) if isinstance(node, ast.Try) and fit in node.orelse
    ]
    assert "self.aside.append(slot)" in take
    assert [said(unfit), said(forget)] == ["machine.aside.append(slot)", "slot = None"]


@each_lease
def test_a_slot_is_put_back_the_same_in_the_lease_as_in_put(written):
    put = method(MACHINE, "Machine", "put")
    refusal = next(node for node in put.body if isinstance(node, ast.If))
    clean = next(
        node
        for node in ast.walk(method(LEASE, written, "__exit__"))
        if isinstance(node, ast.If) and "epoch" in ast.unparse(node.test)
    )
    assert isinstance(refusal.test, ast.BoolOp)
    assert isinstance(clean.test, ast.UnaryOp)
    assert isinstance(clean.test.operand, ast.BoolOp)
    reasons = [said(reason, self="machine") for reason in refusal.test.values]
    written_out = [said(reason) for reason in clean.test.operand.values]
    assert written_out[-len(reasons) :] == reasons
    steps = [said(line, self="machine") for line in put.body[2:5]]
    assert [said(line) for line in clean.body[:3]] == steps
    looks_again = put.body[5]
    assert isinstance(looks_again, ast.If)
    assert isinstance(clean.body[3], ast.If)
    assert said(clean.body[3].test) == said(looks_again.test, self="machine")


def test_the_connection_is_lent_and_parked_the_same_in_the_lease_as_in_the_link():
    enter = ast.unparse(method(LEASE, "PgconnLease", "__enter__"))
    leave = ast.unparse(method(LEASE, "PgconnLease", "__exit__"))
    lend = said(method(DRIVER, "PgconnLink", "lend").body[-1], self="link")
    assert lend in enter
    park = method(DRIVER, "PgconnLink", "park")
    swap = said(park.body[1], self="link").replace("DEAD", "link.dead")
    assert swap in leave
    judged = next(node for node in park.body if isinstance(node, ast.If))
    for reason in said(judged.test, self="link").split(" or "):
        assert reason in leave


def test_a_psycopg2_connection_is_lent_and_parked_the_same_in_the_lease_as_in_the_link():
    enter = ast.unparse(method(LEASE, "ClassLease", "__enter__"))
    leave = ast.unparse(method(LEASE, "ClassLease", "__exit__"))
    (lend,) = method(PSYCOPG2, "Psycopg2Link", "lend").body[1:]
    assert said(lend, self="link") in enter
    _, conn, swap, judged = method(PSYCOPG2, "Psycopg2Link", "park").body[:4]
    assert said(conn, self="link") in leave
    assert said(swap, self="link") in leave
    assert isinstance(judged, ast.If)
    for reason in said(judged.test, self="link").split(" or "):
        assert reason in leave
