"""An account's history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Line:
    """One transfer."""

    id: str
    made_at: datetime
    tid: int
    bid: int
    delta: int


@dataclass(frozen=True, slots=True)
class History:
    """An account's last transfers, the newest first."""

    nonce: str
    aid: int
    lines: list[Line]
