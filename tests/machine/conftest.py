"""Options of the pure tests: how many schedules, and from which seed."""

import random

import pytest


@pytest.fixture
def seeds(request):
    """The seeds of this run: a fixed part that everybody shares, and a part that is new each time."""
    count = request.config.getoption("--seeds")
    start = request.config.getoption("--first-seed")
    if start is None:
        start = random.SystemRandom().randrange(1_000_000)
        print(f"seeds: {count // 2} from 0, {count - count // 2} from {start}")
        return [*range(count // 2), *range(start, start + count - count // 2)]
    return list(range(start, start + count))
