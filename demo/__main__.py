"""The demo's options, as click declares them: `python -m demo --help`.

It must not import what the demo needs to run: `--help` answers at once.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import click

SERVICES = ("connexion", "flask")
POOLS = ("penstock", "psycopg_pool", "psycopg2")
ACTS = ("calm", "worker", "idle", "sessions", "restart")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--pool",
    type=click.Choice(POOLS),
    default="penstock",
    show_default=True,
    help="The pool that the bank uses: ours, or a peer in the same acts.",
)
@click.option(
    "--service",
    type=click.Choice(SERVICES),
    default="connexion",
    show_default=True,
    help="What serves the bank: Connexion 3 on gunicorn's asgi workers, or Flask alone on gthread.",
)
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 16))
@click.option(
    "--preload/--no-preload",
    default=None,
    help="Load the application before the fork, its pool already used in the master; or not."
    "  [default: first without, then with]",
)
@click.option(
    "--seconds",
    default=4.0,
    show_default=True,
    type=click.FloatRange(0.5, 60.0),
    help="How long each act lasts.",
)
@click.option(
    "--act",
    "acts",
    type=click.Choice(ACTS),
    multiple=True,
    help="Only this act; may be given several times.  [default: all]",
)
@click.option("--clients", default=16, show_default=True, type=click.IntRange(1, 64))
@click.option("--seed", type=int, help="Repeat the choices of an earlier run.")
@click.option(
    "--serve",
    is_flag=True,
    help="No acts: leave the bank up and print its address and its status page's, until Ctrl-C.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the account to this file, too.",
)
def demo(
    *,
    pool: str,
    service: str,
    workers: int,
    preload: bool | None,
    seconds: float,
    acts: tuple[str, ...],
    clients: int,
    seed: int | None,
    serve: bool,
    json_path: Path | None,
) -> None:
    """Run a bank under load and faults, and count its money.

    A temporary PostgreSQL, pgbench's tables, a Connexion service under gunicorn. Then, under load: a
    worker killed, every session terminated, the database restarted; without --preload and with.
    Exit status 0: nothing was wrong or lost, and only what had to fail did.
    """
    from demo.plan import Plan  # noqa: PLC0415  (as said above)

    plan = Plan(
        pool=pool,
        service=service,
        workers=workers,
        preloads=(False, True) if preload is None else (preload,),
        seconds=seconds,
        acts=acts or ACTS,
        clients=clients,
        seed=secrets.randbelow(1_000_000) if seed is None else seed,
        json_path=json_path,
    )
    if serve:
        from demo import serve as serving  # noqa: PLC0415  (the same)

        sys.exit(serving.serve(plan))
    from demo.run import run  # noqa: PLC0415  (the same)

    sys.exit(run(plan))


if __name__ == "__main__":
    demo(prog_name="python -m demo")
