"""Where the example application is.

It must not know what is in it.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def folder_of_the_bank() -> Path:
    """The folder that has the package `bank`."""
    return ROOT / "examples" / "bank"
