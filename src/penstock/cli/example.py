"""Where the example application is: in the checkout, or beside this file in an installed wheel.

It must not know what is in it.
"""

from __future__ import annotations

from pathlib import Path

# The wheel has it from the build (pyproject.toml): there is one bank, in examples/bank.
INSTALLED = Path(__file__).parent / "_example"
IN_CHECKOUT = Path(__file__).parents[3] / "examples" / "bank"


def folder_of_the_bank() -> Path:
    """The folder that has the package `bank`."""
    return INSTALLED if INSTALLED.is_dir() else IN_CHECKOUT
