"""The process in which gevent's scenarios run: patched before anything else is imported."""

# ruff: noqa: E402  patching comes first

from gevent import monkey

monkey.patch_all()

import json
import sys
import traceback

import gevent

from tests.contract.gevent_runs import PER_SCENARIO
from tests.contract.scenarios import load
from tests.contract.world import COMBINATIONS, play


def main():
    request = json.load(sys.stdin)
    scenarios = load()
    combinations = {each.name: each for each in COMBINATIONS}
    for name, scenario, seed in request["wanted"]:
        failure = run(combinations[name], scenarios[scenario].play, request["conninfo"], seed)
        print(json.dumps({"pair": f"{name} {scenario}", "failure": failure}), flush=True)


def run(combination, scenario, conninfo, seed):
    """Nothing, or the traceback."""
    try:
        with gevent.Timeout(PER_SCENARIO - 10):
            play(combination, scenario, conninfo, seed)
    except BaseException:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main()
