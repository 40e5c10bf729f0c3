"""What the program does with its pool while others borrow from it."""

from __future__ import annotations

import gc


async def resized(w, b):
    for _ in range(b.rng.randint(1, 3)):
        most = b.rng.randint(2, 8)
        least = b.rng.randint(0, most)
        w.tell(f"resize({least}, {most})")
        result = w.pool.resize(least, most)
        if result is not None:
            await result
        w.options |= {"min_size": least, "max_size": most}
        await w.pause(b.rng.uniform(0.0, 0.3))


async def drained(w, b):
    w.tell("drain()")
    for _ in range(b.rng.randint(1, 3)):
        result = w.pool.drain()
        if result is not None:
            await result
        await w.pause(b.rng.uniform(0.0, 0.3))


async def closed_and_opened_again(w, b):
    w.tell("close(), and open()")
    await w.pool.close(timeout=b.rng.choice((0.0, 0.5)))
    await w.pause(b.rng.uniform(0.0, 0.2))
    await w.pool.open()
    w.tell("it is open")


async def garbage_collected(w, b):
    w.tell("gc.collect(), often")
    for _ in range(10):
        gc.collect()
        await w.pause(b.rng.uniform(0.0, 0.03))


async def looked_at(w, b):
    """What monitoring does."""
    w.tell("stats(), health() and repr(), often")
    for _ in range(50):
        w.pool.stats()
        w.pool.health()
        repr(w.pool)
        await w.pause(0.002)


ALL = (resized, drained, closed_and_opened_again, garbage_collected, looked_at)
HARMLESS = (resized, drained, garbage_collected, looked_at)
