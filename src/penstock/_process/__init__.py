"""What a process has once, whatever pools it has: its forks, its watcher, its keeper, its kind of threads.

It must not know: pools, slots, drivers. Standard library only.
"""
