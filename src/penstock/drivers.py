"""The driver protocol, for those who bring a driver of their own.

A pool knows its database library through two small protocols: a `Driver` opens `Link`s, and a link is
the library's own connection together with what has to be remembered about it. For asyncio they are
`AsyncDriver` and `AsyncLink`. Hand an object that has these methods to a pool::

    pool = ConnectionPool("postgresql://app@db/shop", driver=MyDriver())

`penstock.testing.conformance` holds the tests that a driver has to pass; docs/drivers.md explains both.

It must not know: any driver.
"""

from penstock._drivers.adopting import NotAdopted
from penstock._drivers.protocol import (
    Activity,
    Adopts,
    AsyncAdopts,
    AsyncDriver,
    AsyncLink,
    Diagnosis,
    Driver,
    Link,
    Outdated,
    Recipe,
    Remembering,
    Renewable,
    Reply,
    StatementLimit,
    UnfitOption,
)

__all__ = [
    "Activity",
    "Adopts",
    "AsyncAdopts",
    "AsyncDriver",
    "AsyncLink",
    "Diagnosis",
    "Driver",
    "Link",
    "NotAdopted",
    "Outdated",
    "Recipe",
    "Remembering",
    "Renewable",
    "Reply",
    "StatementLimit",
    "UnfitOption",
]
