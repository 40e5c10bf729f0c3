"""One row in a process of its own: `python -m tests.faults.run COMBINATION ROW FUNCTION [--long]`.

Its one job: patch first where gevent is wanted, run the row's function (`play`, or `worker` for rows of
several processes) with the JSON object from standard input as its arguments, and print one line of JSON: the
figures, or what the worker gave.
"""

import sys

if sys.argv[1].startswith("gevent"):
    from gevent import monkey

    monkey.patch_all()


import json
import logging
from dataclasses import asdict

from tests.faults.rows import load
from tests.faults.stage import Stage


def main():
    logging.getLogger("penstock").addHandler(logging.NullHandler())
    name, row, function, *flags = sys.argv[1:]
    stage = Stage(name, long="--long" in flags, seed=row)
    given = json.loads(sys.stdin.read() or "{}")
    plainly = function == "worker" and stage.runtime.asynchronous
    result = stage.play(getattr(load()[row], function), plainly=plainly, **given)
    told = [asdict(figure) for figure in stage.figures] if function == "play" else result
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
