"""For tests, penstock's and yours: the outside world as a test wants it.

* `FakeServer`, `FakeDriver`, `FakeClock`, ...: no database at all (`fakes.py`), and `AsyncFakeDriver`
  for asyncio (`async_fakes.py`);
* `penstock.testing.conformance`: the tests that a driver has to pass.

Pools on a real database, where nothing stays, are in the distribution pytest-penstock.

One job: the names. Importing it needs neither pytest nor a driver.
"""

from penstock.testing.async_fakes import (
    AsyncFakeConnection,
    AsyncFakeCursor,
    AsyncFakeDriver,
    AsyncFakeLink,
)
from penstock.testing.fakes import (
    DoubleUse,
    FakeClock,
    FakeConnection,
    FakeCursor,
    FakeDriver,
    FakeError,
    FakeInterfaceError,
    FakeLink,
    FakeOperationalError,
    FakeServer,
    Mode,
)

__all__ = [
    "AsyncFakeConnection",
    "AsyncFakeCursor",
    "AsyncFakeDriver",
    "AsyncFakeLink",
    "DoubleUse",
    "FakeClock",
    "FakeConnection",
    "FakeCursor",
    "FakeDriver",
    "FakeError",
    "FakeInterfaceError",
    "FakeLink",
    "FakeOperationalError",
    "FakeServer",
    "Mode",
]
