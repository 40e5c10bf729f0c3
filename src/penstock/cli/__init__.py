"""The entry point `penstock`: starts the command line, or says which extra it needs.

It must not import click or anything else of the demo extra before it can catch their absence: the
library itself has no dependency, and its command must say so kindly instead of with a traceback.
"""

from __future__ import annotations

import sys

EXTRA = "pip install 'penstock[demo]'"

PLAIN_HELP = f"""\
Usage: penstock [OPTIONS] COMMAND [ARGS]...

  PostgreSQL connection pools for Python web workers.

Commands:
  demo  A Flask bank under gunicorn on a real PostgreSQL, under load and faults.

The commands need packages which the library does not: {EXTRA}
"""


def main() -> None:
    """Run the command line; without the demo extra, help still works and a command names the extra."""
    try:
        from penstock.cli.command_line import penstock  # noqa: PLC0415  (needs click)

        penstock()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "penstock":
            raise
        if set(sys.argv[1:]) <= {"-h", "--help"}:
            print(PLAIN_HELP, end="")
            return
        sys.exit(f"penstock: Python package {missing.name!r} is not installed. Install it: {EXTRA}")
