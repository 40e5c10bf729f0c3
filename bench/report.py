"""What all benches share: where the figures come from, a table, a JSON file.

It must not know: pools, what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = ("penstock", "psycopg", "psycopg-pool", "psycopg2-binary", "asyncpg", "SQLAlchemy")


def options(purpose: str) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def environment() -> dict[str, Any]:
    """What the figures depend on; nothing that tells which machine it was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "load": None if load is None else round(load, 1),
        "packages": {name: found for name in _SHOWN if (found := _version(name))},
    }


def heading(title: str, around: dict[str, Any]) -> None:
    """Say what is measured, and with what."""
    packages = ", ".join(f"{name} {found}" for name, found in around["packages"].items())
    print(
        f"{title}\n{around['implementation']} {around['python']}, {around['processors']} processors"
    )
    print(packages)
    load = around["load"]
    if load is not None and load > 1:
        print(f"the machine is busy (load {load}): trust ratios and counts, not the figures")
    print()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, all others are figures."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]))
    print()


def save(where: Path | None, name: str, around: dict[str, Any], figures: Any) -> None:
    """Write the figures as JSON, if that was asked for."""
    if where is None:
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    content = {"bench": name, "environment": around, "figures": figures}
    where.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {where}", file=sys.stderr)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
