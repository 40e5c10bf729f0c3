"""How the bank's answers become JSON: models as objects, dates as ISO 8601, decimals as texts.

Decimals are texts because a JSON number is read as a float, and a float is not what was asked for.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from decimal import Decimal
from typing import Any


class JSONEncoder(json.JSONEncoder):
    """For Connexion's and Flask's own, in their place."""

    def default(self, o: Any) -> Any:
        """Answer with what JSON has a form for."""
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return {field.name: getattr(o, field.name) for field in dataclasses.fields(o)}
        if isinstance(o, date):  # a datetime is one, too
            return o.isoformat()
        if isinstance(o, Decimal):
            return str(o)
        return super().default(o)
