"""What the bank answers, one class per schema of the OpenAPI file."""

from __future__ import annotations

from bank.models.balance import Balance
from bank.models.branch import Branch
from bank.models.history import History, Line
from bank.models.receipt import Receipt

__all__ = ["Balance", "Branch", "History", "Line", "Receipt"]
