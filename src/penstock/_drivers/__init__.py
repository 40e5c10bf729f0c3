"""FLOOR 1: one file per driver; nothing here knows of pools."""
