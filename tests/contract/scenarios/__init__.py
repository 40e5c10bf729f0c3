"""What every pool promises, on every runtime and through every driver: one text for all.

One job: the list of scenarios. A scenario is a coroutine function that takes a `World`; its name is
the sentence that it proves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_MODULES = (
    "borrowing",
    "ending",
    "hanging",
    "life",
    "migrations",
    "misuse",
    "self_deadlock",
    "server",
    "trouble",
)


class Scenario(NamedTuple):
    play: Callable[..., Any]
    fake: bool  # needs a server that does as it is told

    @property
    def name(self):
        return self.play.__name__

    def fits(self, combination):
        return combination.fake or not self.fake


SCENARIOS: dict[str, Scenario] = {}


def scenario(play):
    """For every combination."""
    assert play.__name__ not in SCENARIOS, play.__name__
    SCENARIOS[play.__name__] = Scenario(play, fake=False)
    return play


def fake_scenario(play):
    """For fake servers only."""
    scenario(play)
    SCENARIOS[play.__name__] = Scenario(play, fake=True)
    return play


def load():
    """All of them, by name."""
    for name in _MODULES:
        importlib.import_module(f"{__name__}.{name}")
    return SCENARIOS
