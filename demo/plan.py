"""What was asked for on the command line, and what a service needs to be served.

It must not know what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServiceKind:
    """One way to serve the bank.

    Attributes:
        title: what people call it.
        worker_class: gunicorn's.
        packages: what it needs besides Flask.
        page: the path to look at first.
    """

    title: str
    worker_class: str
    packages: tuple[str, ...]
    page: str


SERVICES = {
    "connexion": ServiceKind("Connexion 3", "asgi", ("connexion", "swagger_ui_bundle"), "/ui/"),
    "flask": ServiceKind("Flask", "gthread", (), "/branches"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    pool: str
    service: str
    workers: int
    preloads: tuple[bool, ...]
    seconds: float
    acts: tuple[str, ...]
    clients: int
    seed: int
    json_path: Path | None

    @property
    def kind(self) -> ServiceKind:
        """The service that was asked for."""
        return SERVICES[self.service]

    @property
    def title(self) -> str:
        """What the bank runs on, for people."""
        return f"pool {self.pool} on {self.kind.title}, {self.workers} workers"

    def require_packages(self) -> None:
        """Refuse if one is missing: the demo's own processes could only fail on it.

        Raises:
            ModuleNotFoundError: naming the package.
        """
        for package in ("flask", "gunicorn", "psycopg", *self.kind.packages, self.pool):
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
