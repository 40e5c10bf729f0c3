"""The demo: a bank under gunicorn on a real PostgreSQL, under load and faults, its money counted.

`make demo` runs it. It is in no wheel: it needs this checkout, and the dependency group `demo`.
"""
