"""Tests on a real PostgreSQL that leave nothing in it.

* pytest fixtures: a temporary server, a database of the session's own, a pool that is undone (`plugin.py`);
* `undone`: a pool on a real database, where nothing stays (`undone.py`);
* `pytest_penstock.postgres`: PostgreSQL servers to start, kill, pause and restart.

One job: the names. Importing it needs neither pytest nor a driver.
"""

from pytest_penstock.undone import Undone, undone

__all__ = ["Undone", "undone"]
