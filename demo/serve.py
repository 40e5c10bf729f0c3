"""The bank, left up to be looked at: the service without a load, and the status page beside it.

It must not know how anything is done: each part has a file of its own beside this one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from demo.gunicorn_process import ServiceDidNotStartError
from demo.interruption import InterruptedBySignal, Interruption
from demo.stage import open_service, set_stage
from demo.status_page import Observed, StatusPage
from pytest_penstock.postgres import LauncherError

if TYPE_CHECKING:
    from demo.plan import Plan


def serve(plan: Plan) -> int:
    """Serve until somebody ends it; the exit status."""
    plan.require_packages()
    try:
        with Interruption() as interruption:
            _serve(plan, interruption)
    except InterruptedBySignal:
        say("penstock demo: everything ended and removed")
        return 0
    except (ServiceDidNotStartError, LauncherError) as error:
        say(f"penstock demo: {error}")
        return 1
    say("penstock demo: gunicorn has ended by itself; everything removed")
    return 1


def say(text: str) -> None:
    """One line, now, also into a pipe."""
    print(text)
    sys.stdout.flush()


def _serve(plan: Plan, interruption: Interruption) -> None:
    say(f"penstock demo: {plan.title}")
    with (
        set_stage(interruption, say) as stage,
        open_service(stage, plan, interruption, preload=plan.preloads[0]) as service,
    ):
        address = f"http://127.0.0.1:{service.port}"
        observed = Observed(
            title=plan.title,
            service=address + plan.kind.page,
            workers=service.workers,
            sessions=lambda: stage.watch.groups,
        )
        with StatusPage(observed) as page:
            say(f"the bank:    {address}{plan.kind.page}")
            say(f"its status:  {page.address}")
            say("Ctrl-C ends it and removes everything.")
            while service.gunicorn.runs:
                interruption.wait(0.2)
