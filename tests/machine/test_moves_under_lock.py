"""The pool's lock: every slow move of the machine is made under it. Read from the source.

Two threads in one slow move is a race that needs a switch between two particular instructions: no storm
finds it reliably. That the lock is there can be read.
"""

from __future__ import annotations

import ast
import inspect

import pytest

from penstock._machine.locked import LockedMachine
from penstock._machine.machine import SLOWLY, Machine
from penstock._machine.orders import Open
from penstock._machine.policy import Limits
from penstock._machine.slot import SlotState
from penstock._pool.sync import borrowing, executor, pool

# What runs without the lock, by design: the hot moves, a note of who asks, what only reads, and the child's side of a fork,
# where no other thread is.
WITHOUT = {"take", "put", "ask", "slots", "count", "waiting", "borrows", "stats", "has", "held_by"}
IN_A_CHILD = {"inherited", "forked"}
MOVES = {
    name
    for name, method in inspect.getmembers(Machine, inspect.isfunction)
    if not name.startswith("_") and name not in WITHOUT | IN_A_CHILD
}


def called(tree):
    """Each use of `self._machine.<move>`, with the nodes that it stands in, outermost first."""

    def visit(node, above):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in MOVES
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "_machine"
        ):
            yield node, above
        for child in ast.iter_child_nodes(node):
            yield from visit(child, [*above, node])

    return list(visit(tree, []))


def is_locked(above):
    """In a `with self._lock`, in a `try` that releases it, or handed to `_move`, which takes it."""
    return any(
        is_released(node)
        or (
            isinstance(node, ast.With) and any(is_self(i.context_expr, "_lock") for i in node.items)
        )
        or (isinstance(node, ast.Call) and is_self(node.func, "_move"))
        for node in above
    )


RELEASES = ["lock.release()"]


def is_self(node, name):
    return ast.unparse(node) == f"self.{name}"


@pytest.mark.parametrize("module", [borrowing, pool, executor])
def test_every_slow_move_is_made_under_the_pools_lock(module):
    found = called(ast.parse(inspect.getsource(module)))
    assert found, "the check looks for nothing"
    bare = [f"line {node.lineno}: {node.attr}" for node, above in found if not is_locked(above)]
    assert not bare, bare


def test_what_takes_a_move_takes_the_lock_for_it():
    source = ast.unparse(ast.parse(inspect.getsource(executor)))
    assert (
        "            try:\n                orders = decide(clock())\n            finally:" in source
    )


@pytest.mark.parametrize("module", [borrowing, pool, executor])
def test_nothing_stands_between_the_taking_of_a_lock_and_the_try_that_releases_it(module):
    """What strikes there would leave it held."""
    taken = 0
    for body in bodies(ast.parse(inspect.getsource(module))):
        for at, node in enumerate(body):
            if isinstance(node, ast.Assign) and "_take_lock(" in ast.unparse(node):
                taken += 1
                following = body[at + 1] if at + 1 < len(body) else None
                assert ast.unparse(node.targets[0]) == "lock"
                assert following is None or is_released(following), ast.unparse(node)
    assert taken or module is pool


def bodies(tree):
    return [
        body
        for node in ast.walk(tree)
        for name in ("body", "orelse", "finalbody")
        if isinstance(body := getattr(node, name, None), list)
    ]


def is_released(node):
    return isinstance(node, ast.Try) and [ast.unparse(n) for n in node.finalbody] == RELEASES


class Lock:
    """Counts how often it was taken."""

    taken = 0
    free = True

    def take(self, seconds):
        self.taken += self.free
        return self.free

    def release(self):
        assert self.free


def test_where_there_is_no_global_lock_the_hot_moves_take_the_pools():
    lock = Lock()
    machine = LockedMachine(lock, Limits(), orphans=[].append, random=lambda: 0.5)
    opened = machine.open(0.0)[0]
    assert isinstance(opened, Open)
    machine.opened(opened.slot, object(), 0.0)
    lock.taken = 0
    slot = machine.take(0.0, 1)
    assert slot is opened.slot and lock.taken == 1
    machine.put(slot)
    assert lock.taken == 2
    assert machine.waiting() == [] and lock.taken == 3


def test_where_that_lock_is_not_free_the_hot_moves_leave_it_to_the_slow_ones():
    lock = Lock()
    machine = LockedMachine(lock, Limits(), orphans=[].append, random=lambda: 0.5)
    opened = machine.open(0.0)[0]
    assert isinstance(opened, Open)
    machine.opened(opened.slot, object(), 0.0)
    lock.free = False
    assert machine.take(0.0, 1) is None
    lock.free = True
    slot = machine.take(0.0, 1)
    assert slot is opened.slot
    lock.free = False
    assert machine.put(slot) == SLOWLY and slot.state is SlotState.IN_USE
