"""The database. Importing this opens nothing; the first request in each worker does."""

from __future__ import annotations

from penstock.integrations.flask import Penstock

db = Penstock()
