"""A branch of the bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import date
    from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Branch:
    """What a branch holds; per teller, that is seldom a whole number."""

    bid: int
    balance: int
    tellers: int
    per_teller: Decimal
    as_of: date
