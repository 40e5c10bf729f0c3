"""What befalls the pool: one function per fault, `async def fault(w, b)`, written for all runtimes and drivers.

`w` is the world, `b` a borrower whose randomness the fault uses. A fault does its harm, lasts, and may leave healing
what is common (`World.heal`) to the step. Faults of one module are never drawn together. A module may have

* `HARMLESS`: functions during which well-behaved borrowers get no error;
* `ONLY`: the runtime that a function is for, by function;
* `QUIET = True`: nobody else borrows meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.soak.faults import borrowers, idling, network, pools, processes, servers, strikes

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from typing import Any

MODULES: tuple[Any, ...] = (network, servers, borrowers, strikes, pools, processes, idling)


@dataclass(frozen=True)
class Fault:
    """One of them, and what is known about it."""

    name: str
    realm: str
    play: Callable[..., Any]
    harmless: bool
    quiet: bool
    only: str | None


def _of(module: Any) -> list[Fault]:
    realm = module.__name__.rpartition(".")[2]
    return [
        Fault(
            name=each.__name__,
            realm=realm,
            play=each,
            harmless=each in getattr(module, "HARMLESS", ()),
            quiet=getattr(module, "QUIET", False),
            only=getattr(module, "ONLY", {}).get(each),
        )
        for each in module.ALL
    ]


FAULTS = {each.name: each for module in MODULES for each in _of(module)}


def fit(runtime: str) -> list[Fault]:
    """Those for a runtime."""
    return [each for each in FAULTS.values() if each.only in (None, runtime)]


def drawn(rng: random.Random, runtime: str) -> list[Fault]:
    """The faults of one step: one, or two of different kinds at once."""
    choice = fit(runtime)
    first = rng.choice(choice)
    others = [each for each in choice if each.realm != first.realm and not each.quiet]
    # Signals strike the main thread, where the first fault runs. A fault's greenlet would run on in a fork.
    others = [each for each in others if each.only != "threads"]
    if runtime == "gevent":
        others = [each for each in others if each.realm != "processes"]
    alone = first.quiet or (runtime == "gevent" and first.realm == "processes")
    return [first] if rng.random() < 0.6 or alone else [first, rng.choice(others)]
