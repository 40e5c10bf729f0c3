"""Flask, and Connexion over it: docs/flask.md."""

from penstock.integrations.flask.extension import Database, Penstock

__all__ = ["Database", "Penstock"]
