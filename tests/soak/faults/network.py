"""What a network, a host or a balancer does; the proxy does it."""

from __future__ import annotations

from contextlib import closing
from socket import socket

from tests.soak.world import ADDRESSES


async def latency(w, b):
    seconds = b.rng.uniform(0.001, 0.03)
    w.tell(f"each round trip is {seconds * 1000:.0f} ms longer")
    w.proxy.delay(seconds)
    await w.pause(0.6)


async def frozen(w, b):
    """The host's kernel acknowledges, and nobody answers."""
    old, new = b.rng.choice(((True, True), (True, False), (False, True)))
    w.tell(f"frozen, acknowledging; old={old} new={new}")
    w.proxy.hold(old=old, new=new)
    await w.pause(b.rng.uniform(0.1, 1.5))


async def silent(w, b):
    """Nothing is acknowledged, not even a SYN."""
    old, new = b.rng.choice(((True, True), (True, False), (False, True)))
    w.tell(f"silent; old={old} new={new}")
    w.proxy.silence(old=old, new=new)
    await w.pause(b.rng.uniform(0.1, 1.5))


async def frozen_and_cut(w, b):
    """What was held never arrives."""
    w.tell("frozen, then cut")
    w.proxy.hold()
    await w.pause(b.rng.uniform(0.1, 1.0))
    w.proxy.cut(b.rng.choice(("rst", "fin")))


async def cut(w, b):
    for _ in range(b.rng.randint(1, 5)):
        how = b.rng.choice(("rst", "fin"))
        w.tell(f"{w.proxy.cut(how)} connections cut with {how.upper()}")
        await w.pause(b.rng.uniform(0.0, 0.3))


async def refused(w, b):
    w.tell("refused, what there is is cut")
    w.proxy.refuse()
    w.proxy.cut(b.rng.choice(("rst", "fin")))
    await w.pause(b.rng.uniform(0.1, 1.5))


async def accepted_in_vain(w, b):
    """New connections are accepted and hear nothing."""
    w.tell("accepted, and nobody says anything")
    w.proxy.say_nothing()
    w.proxy.cut("rst")
    await w.pause(b.rng.uniform(0.1, 1.5))


async def slow_connects(w, b):
    seconds = b.rng.uniform(0.05, 0.4)
    w.tell(f"a connect takes {seconds:.2f} s longer")
    w.proxy.slow_connect(seconds)
    w.proxy.cut("fin")
    await w.pause(0.8)


async def moved(w, b):
    """The server is at another address; what was there is cut."""
    w.address = 1 - w.address
    w.tell(f"the server moves to {ADDRESSES[w.address]}")
    w.proxy.upstream(ADDRESSES[w.address], w.server.port)
    w.proxy.cut(b.rng.choice(("rst", "fin")))
    await w.pause(0.3)


async def moved_to_nowhere(w, b):
    """A balancer whose server is not there accepts, and hangs up."""
    w.tell("what is accepted is hung up on")
    w.proxy.upstream(ADDRESSES[w.address], closed_port())
    w.proxy.cut("rst")
    await w.pause(b.rng.uniform(0.1, 1.0))
    w.proxy.upstream(ADDRESSES[w.address], w.server.port)


def closed_port():
    with closing(socket()) as taken:
        taken.bind((ADDRESSES[0], 0))
        return taken.getsockname()[1]


ALL = (
    latency,
    frozen,
    silent,
    frozen_and_cut,
    cut,
    refused,
    accepted_in_vain,
    slow_connects,
    moved,
    moved_to_nowhere,
)
HARMLESS = (latency,)
