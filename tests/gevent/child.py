"""A process of its own that runs scenes on gevent: `python -m tests.gevent.child MODE DRIVER SEED SCENE...`.

The conninfo comes on standard input. For each scene one line of JSON: its name, and the traceback if
it failed. MODE is when gevent patches:

* first: before all imports;
* late: after penstock and the driver were imported and the scenes' pools made;
* used: as late, but gevent was imported before, and the pools were used before it patches;
* forked: as late, but a pool was opened and used in a parent, too, which has forked.
"""

import sys

MODE, DRIVER, SEED, *SCENES = sys.argv[1:]

if MODE == "first":
    from gevent import monkey

    monkey.patch_all()

# ruff: noqa: E402  patching comes first

import json
import os
import traceback
from contextlib import nullcontext

from tests.gevent import scenes
from tests.gevent.bench import Bench

#: Seconds for one scene: a failure's price.
PATIENCE = 60.0


def main():
    dsn = sys.stdin.read()
    wanted = [(name, getattr(scenes, name)) for name in SCENES]
    benches = [Bench(dsn, DRIVER, f"{SEED} {name}") for name in SCENES]
    made = [
        bench.make(**getattr(scene, "options", {}))
        for bench, (_, scene) in zip(benches, wanted, strict=True)
    ]
    if MODE == "used":
        use(made)
    if MODE == "forked":
        in_child_of(made[0])
    if MODE != "first":
        from gevent import monkey

        monkey.patch_all()
    for bench, pool, (name, scene) in zip(benches, made, wanted, strict=True):
        print(json.dumps({"scene": name, "failure": run(scene, bench, pool)}), flush=True)
        bench.close()


def use(pools):
    import gevent.monkey  # noqa: F401  as gunicorn's master does: imported, not patched

    for pool in pools:
        with pool.connection() as conn:
            conn.cursor().execute("select 1")


def run(scene, bench, pool):
    import gevent

    gevent.get_hub().exception_stream = None  # scenes look at what their greenlets raised
    lasts = nullcontext() if getattr(scene, "destroys_the_hub", False) else gevent.Timeout(PATIENCE)
    try:
        with lasts:
            scene(bench, pool)
    except BaseException:
        return traceback.format_exc()
    return ""


def in_child_of(pool):
    """Go on in a forked child; the parent has a session, which is there when the child has gone."""
    with pool.connection() as conn:
        conn.cursor().execute("select 1")
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with pool.connection() as conn:
            conn.cursor().execute("select 1")
        assert not pool.stats().closed, "the parent's session was ended by its child"
        pool.close()
        sys.exit(code)


if __name__ == "__main__":
    main()
