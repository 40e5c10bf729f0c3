"""Options of the whole test suite."""


def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, default=120, help="schedules to try in the interleaver")
    parser.addoption("--first-seed", type=int, default=None, help="the first of them")
