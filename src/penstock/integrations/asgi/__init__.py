"""ASGI (Starlette, FastAPI, Quart, Connexion's AsyncApp): docs/asgi.md."""

from penstock.integrations.asgi.middleware import Database, Penstock

__all__ = ["Database", "Penstock"]
