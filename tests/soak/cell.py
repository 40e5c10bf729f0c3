"""One combination in a process of its own: `python -m tests.soak.cell COMBINATION SEED SECONDS FIRST [FAULT...]`.

Its one job: patch first where gevent is wanted, soak, and print one line of JSON per step. It ends with whoever
started it, and what it started ends with it: the server has a supervisor, the proxy hears the hang-up.
"""

import sys

if sys.argv[1].startswith("gevent"):
    from gevent import monkey

    monkey.patch_all()


import ctypes
import importlib
import json
import logging
import signal
from contextlib import suppress

from tests.faults.stage import Stage
from tests.soak.steps import soak
from tests.soak.world import World

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent():
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def import_diagnosing_driver():
    """With psycopg2 a refused connect is diagnosed by psycopg 3: imported late, it would look like a leak."""
    importlib.import_module("psycopg")


def tell(**said):
    print(json.dumps(said), flush=True)


def main():
    end_with_parent()
    import_diagnosing_driver()
    logging.getLogger("penstock").addHandler(logging.NullHandler())
    name, seed, seconds, first, *only = sys.argv[1:]
    stage = Stage(name, seed=seed)

    async def play(_stage):
        world = World(stage, seed, float(seconds))
        await soak(world, float(seconds), int(first), only, tell)

    stage.play(play)


if __name__ == "__main__":
    main()
