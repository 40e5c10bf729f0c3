"""An account's balance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Balance:
    """What an account holds, and the nonce of whoever asked."""

    nonce: str
    aid: int
    balance: int
