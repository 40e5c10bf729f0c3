"""The soak: a seeded mixture of all faults over all runtimes and drivers, checked after each step.

`make soak` runs it (`python -m tests.soak`); docs/faults/soak.md says what it is for. In the order in which they
build on each other:

* `ledger.py` and `levels.py` are pure: what was acknowledged against what is there; what may not grow.
* `world.py` is one process's world: server, proxy, pool, journal, and who borrows.
* `work.py` is what well-behaved borrowers do, `faults/` what befalls them.
* `checks.py` looks when all is at rest; `steps.py` plays one step after the other.
* `cell.py` is one combination of runtime and driver in a process of its own, `__main__.py` the command.
"""
