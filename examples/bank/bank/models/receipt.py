"""A transfer's receipt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Receipt:
    """A transfer that was made: its id, and what the account holds now."""

    nonce: str
    id: str
    balance: int
