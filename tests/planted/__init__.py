"""Faults planted in the pool's own code, and the tests that notice them: `python -m tests.planted`."""
