"""Named pools of one kind, whichever: what does not have to wait.

One job: make pools of configurations and find them by name. It must not know: threads, loops. No lock: the
mapping does not change.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from penstock.config import loaders
from penstock.config.pool_config import PoolConfig
from penstock.config.secret import Hidden
from penstock.errors import MisuseError

if TYPE_CHECKING:
    from pathlib import Path

    from penstock._machine.stats import Stats
    from penstock._pool.reporter import Health


class OnePool(Protocol):
    """What is asked of each pool."""

    def stats(self) -> Stats: ...
    def health(self) -> Health: ...


PoolT = TypeVar("PoolT", bound=OnePool)


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


def _again(cls: type[NamedPools[Any]], pools: dict[str, Any]) -> NamedPools[Any]:
    found = cls.__new__(cls)
    found._pools = pools
    return found
