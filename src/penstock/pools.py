"""Pools: many named pools from one configuration.

One job: make a `ConnectionPool` of each `PoolConfig`, and do to all of them what is done to one:
open, close, report. `NamedPools` is what asyncio's (`_pool/aio/pools.py`) have in common with them.

It must not know: how a pool works, what configuration looks like.

No lock: the pools are chosen when this is made and never change; each has its own lock.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from penstock._pool.sync.pool import ConnectionPool
from penstock._process import fork
from penstock._process.clock import clock
from penstock.config import loaders
from penstock.config.pool_config import PoolConfig
from penstock.config.secret import Hidden
from penstock.errors import MisuseError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from penstock._machine.stats import Stats
    from penstock._pool.aio.pool import AsyncConnectionPool
    from penstock._pool.reporter import Health


PoolT = TypeVar("PoolT", bound="ConnectionPool[Any] | AsyncConnectionPool[Any]")


class NamedPools(Mapping[str, PoolT], Generic[PoolT]):
    """Named pools of one kind: what does not have to wait.

    Args:
        configs: the pools' names and options. A pool without a name of its own gets this one.

    Raises:
        DriverNotFoundError: a driver's library is not installed.
    """

    def __init__(self, configs: Mapping[str, PoolConfig]) -> None:
        self._pools: dict[str, PoolT] = {
            name: self._made_of(config if config.name else config.replace(name=name))
            for name, config in configs.items()
        }

    @staticmethod
    @abstractmethod
    def _made_of(config: PoolConfig) -> PoolT:
        """A pool of these options."""

    @classmethod
    def from_file(cls, path: str | Path, *sections: str) -> Self:
        """Read a TOML or INI file: several sections are several databases.

        Args:
            path: the suffix decides: ``.toml``; ``.ini``, ``.cfg``, ``.conf``.
            *sections: the ones to read, where the file has others, too; none: all.

        Raises:
            ConfigError: naming key, file and line.
        """
        return cls(loaders.many_from_file(path, sections, PoolConfig))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Read a mapping of names to mappings, or to `PoolConfig`; or the mapping of one database.

        Args:
            mapping: keys beside the mappings in it are in all of them, unless they have their own.

        Raises:
            ConfigError: naming the key.
        """
        given = Hidden(mapping)
        del mapping
        return cls(loaders.many_from_mapping(given, PoolConfig))

    @classmethod
    def from_env(cls, prefix: str = "PENSTOCK_") -> Self:
        """Read environment variables; ``PENSTOCK_ORDERS__URL`` is about the database "orders".

        Args:
            prefix: what the variables' names begin with.

        Raises:
            ConfigError: naming the variable.
        """
        return cls(loaders.many_from_env(prefix, PoolConfig))

    # -- which pools ------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> PoolT:
        pool = self._pools.get(name)
        if pool is None:
            raise KeyError(f"no pool {name!r}: there are {', '.join(map(repr, self._pools))}")
        return pool

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    def __eq__(self, other: object) -> bool:
        return self is other  # a Mapping's would compare pools

    def __hash__(self) -> int:
        return id(self)

    @property
    def default(self) -> PoolT:
        """The only pool, or the one that is named "default".

        Raises:
            MisuseError: there are several, and none has this name.
        """
        if len(self._pools) == 1:
            return next(iter(self._pools.values()))
        pool = self._pools.get(loaders.DEFAULT)
        if pool is None:
            names = ", ".join(map(repr, self._pools)) or "none"
            raise MisuseError(
                f"which pool is the default one? There are {names}",
                next_step='take one by its name, or call one of them "default"',
            )
        return pool

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self._pools)  # each pool travels as its options

    # -- what can be read -------------------------------------------------------------------------

    def stats(self) -> dict[str, Stats]:
        """Each pool's figures, by its name here."""
        return {name: pool.stats() for name, pool in self._pools.items()}

    def health(self) -> dict[str, Health]:
        """Each pool's health, by its name here."""
        return {name: pool.health() for name, pool in self._pools.items()}

    def __repr__(self) -> str:
        # none, if a traceback shows one that could not be made
        pools: dict[str, PoolT] = vars(self).get("_pools", {})
        inner = ", ".join(f"{name!r}: {pool!r}" for name, pool in pools.items())
        return f"<{type(self).__name__} {{{inner}}}>"


class Pools(NamedPools[ConnectionPool[Any]]):
    """Named pools. Making them opens nothing: each opens at its first borrow, or by `open`.

    Args:
        configs: the pools' names and options. A pool without a name of its own gets this one.

    Raises:
        DriverNotFoundError: a driver's library is not installed.
    """

    @staticmethod
    def _made_of(config: PoolConfig) -> ConnectionPool[Any]:
        return ConnectionPool.from_config(config)

    # -- their life -------------------------------------------------------------------------------

    def open(self, wait: bool = False, timeout: float | None = None) -> None:
        """Open all pools. If one cannot be opened, those that this call opened are closed again.

        Args:
            wait: return only when each has its `min_size` connections, as `ConnectionPool.open`.
            timeout: seconds to wait at most, for all together; None: each as long as its own.

        Raises:
            ServerUnavailable: with `wait`, a pool could not open a connection.
            PoolTimeout: with `wait`, not all connections could be opened in time.
        """
        deadline = None if timeout is None else clock() + timeout
        opened: list[ConnectionPool[Any]] = []
        try:
            self._open_each(opened, wait, deadline)
        except BaseException:
            _close_each(opened, clock())
            raise

    def _open_each(
        self, opened: list[ConnectionPool[Any]], wait: bool, deadline: float | None
    ) -> None:
        for pool in self._pools.values():
            if not pool.opened:
                opened.append(pool)
            left = None if deadline is None else max(0.0, deadline - clock())
            pool.open(wait, left)

    def close(self, timeout: float | None = 5.0) -> None:
        """Close all pools, also when one of them raises.

        Args:
            timeout: seconds to wait for lent connections, for all pools together; None: as long
                as it takes.
        """
        failures = _close_each(self._pools.values(), None if timeout is None else clock() + timeout)
        if failures:
            raise failures[0]

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def close_all(timeout: float | None = 5.0) -> None:
    """Close every open `ConnectionPool` of this process, wherever it was made, before it ends.

    asyncio's pools are closed by their own loop only, so they are left alone; the end of the
    process ends their sessions.

    Args:
        timeout: seconds to wait for lent connections, for all pools together; None: as long as it
            takes.

    Raises:
        Exception: what a pool's close has raised; the others were closed all the same.
    """
    if not fork.page[0]:
        fork.noticed()  # else it would end the parent's sessions
    pools = [one for one in fork.registered() if isinstance(one, ConnectionPool) and one.opened]
    failures = _close_each(pools, None if timeout is None else clock() + timeout)
    if failures:
        raise failures[0]


def _close_each(pools: Any, deadline: float | None) -> list[BaseException]:
    """Close them one after the other; gives what was raised."""
    failures: list[BaseException] = []
    for pool in pools:
        try:
            pool.close(None if deadline is None else max(0.0, deadline - clock()))
        except BaseException as error:  # noqa: BLE001  the others are closed all the same
            failures.append(error)
    return failures


def _again(cls: type[NamedPools[Any]], pools: dict[str, Any]) -> NamedPools[Any]:
    found = cls.__new__(cls)
    found._pools = pools  # noqa: SLF001  what __init__ sets
    return found
