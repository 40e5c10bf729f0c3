"""Settings, URLs and conninfo strings, turned into one another without a driver: docs/configuration.md."""

from penstock.config.conninfo import is_url, parse, to_conninfo, to_url

__all__ = ["is_url", "parse", "to_conninfo", "to_url"]
