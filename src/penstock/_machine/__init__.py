"""FLOOR 0: the pool as a pure state machine: no I/O, no threads, no clock, no randomness."""
