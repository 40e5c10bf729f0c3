"""One contract for all: each scenario on each runtime and through each driver that it fits.

One job: make a test of every pair, and fetch those of gevent from a process of their own, since
patching the standard library is for a whole process.
"""

from __future__ import annotations

import pytest

from tests.conftest import SEED
from tests.contract.gevent_runs import GeventRuns
from tests.contract.runtimes import Gevent
from tests.contract.scenarios import load
from tests.contract.world import COMBINATIONS, play

SCENARIOS = load()


def pairs():
    for combination in COMBINATIONS:
        missing = combination.missing()
        if missing:  # one line for all of them
            yield pytest.param(
                combination, None, marks=pytest.mark.skip(reason=missing), id=combination.name
            )
            continue
        for scenario in SCENARIOS.values():
            if scenario.fits(combination):
                yield pytest.param(combination, scenario, id=f"{combination.name}-{scenario.name}")


def seed_of(combination, scenario):
    return f"{SEED} {combination.name} {scenario.name}"


@pytest.fixture(scope="session")
def gevent_runs(request):
    """The child process, which runs what was selected of gevent's."""
    with GeventRuns() as runs:
        for item in request.session.items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            combination, scenario = params.get("combination"), params.get("scenario")
            if combination and scenario and combination.runtime is Gevent:
                runs.want(combination, scenario, seed_of(combination, scenario))
        runs.start(lambda: request.getfixturevalue("server").conninfo(over="unix"))
        yield runs


@pytest.mark.parametrize(("combination", "scenario"), list(pairs()))
def test_it_holds_that(combination, scenario, request):
    if combination.runtime is Gevent:
        runs = request.getfixturevalue("gevent_runs")
        runs.expect_good(combination, scenario)
        return
    conninfo = None
    if not combination.fake:
        conninfo = request.getfixturevalue("server").conninfo(over="unix")
    play(combination, scenario.play, conninfo, seed_of(combination, scenario))


def test_every_scenario_is_a_sentence_of_its_own():
    assert len(SCENARIOS) > 80
    assert all("_" in name for name in SCENARIOS)
