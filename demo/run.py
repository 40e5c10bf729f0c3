"""The demo as a whole: sets the stage, runs the acts without and with preload, judges, cleans up.

It must not know how anything is done: each part has a file of its own beside this one.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import TYPE_CHECKING

from demo import ledger
from demo.acts import ACTS, Act, Scene
from demo.gunicorn_process import ServiceDidNotStartError
from demo.interruption import InterruptedBySignal, Interruption
from demo.load import Load
from demo.screen import Screen, summary_line
from demo.server_sessions import OBSERVER
from demo.stage import DATABASE, Service, Stage, open_service, set_stage
from demo.verdict import ActResult, complaints, latest_lend, unexcused
from pytest_penstock.postgres import LauncherError, Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from demo.plan import Plan


def run(plan: Plan) -> int:
    """Run the demo; the exit status."""
    plan.require_packages()
    # A moment is to be noted when it happens, not when sixteen busy clients have had their turns.
    sys.setswitchinterval(0.0005)
    screen = Screen(len(plan.preloads) * len(plan.acts))
    try:
        with Interruption() as interruption, screen:
            results = Demo(plan, screen, interruption).perform()
    except InterruptedBySignal as signalled:
        screen.say(f"penstock demo: {signalled}: everything ended and removed")
        return 128 + signalled.signum
    except ServiceDidNotStartError as error:
        screen.say(f"penstock demo: the service did not start; its last words:\n{error}")
        return 1
    except LauncherError as error:
        screen.say(f"penstock demo: {error}")
        return 1
    screen.conclude(summary_line(results))
    if plan.json_path:
        plan.json_path.write_text(json.dumps(_account(plan, results), indent=2) + "\n")
    return 0 if all(result.ok for result in results) else 1


def _account(plan: Plan, results: Sequence[ActResult]) -> dict[str, object]:
    return {
        "pool": plan.pool,
        "service": plan.service,
        "seed": plan.seed,
        "workers": plan.workers,
        "clients": plan.clients,
        "ok": all(result.ok for result in results),
        "summary": summary_line(results),
        "acts": [result.as_dict() for result in results],
    }


class Demo:
    """One demo: one stage, one ledger, and one service per mode, which lives through all acts."""

    def __init__(self, plan: Plan, screen: Screen, interruption: Interruption) -> None:
        self._plan = plan
        self._screen = screen
        self._interruption = interruption
        self._ledger = ledger.Ledger()
        self._known = ledger.Findings()

    def perform(self) -> list[ActResult]:
        """Set up, run all acts in all modes, and take everything down again."""
        plan = self._plan
        self._screen.say(f"penstock demo: {plan.title}, seed {plan.seed}")
        with set_stage(self._interruption, self._screen.say) as stage:
            return [
                result
                for preload in plan.preloads
                for result in self._perform_mode(stage, preload=preload)
            ]

    def _perform_mode(self, stage: Stage, *, preload: bool) -> list[ActResult]:
        plan = self._plan
        acts = [act for act in ACTS if act.name in plan.acts]
        with open_service(stage, plan, self._interruption, preload=preload) as service:
            self._screen.watch(service.workers, lambda: stage.watch.groups)
            results = [self._perform_act(act, stage, service) for act in acts]
            self._screen.show_workers()
            self._screen.unwatch()
        return results

    def _perform_act(self, act: Act, stage: Stage, service: Service) -> ActResult:
        plan = self._plan
        seed = f"{plan.seed}/{act.name}/{service.preload}"
        self._screen.begin(act.title, preload=service.preload, seconds=plan.seconds)
        begun = time.monotonic()
        with Load(service.port, stage.bank, self._ledger, clients=plan.clients, seed=seed) as load:
            permit = act.perform(
                Scene(
                    server=stage.server,
                    conninfo=stage.conninfo,
                    load=load,
                    seconds=plan.seconds,
                    chance=random.Random(seed),
                    workers=service.workers,
                    wait=self._interruption.wait,
                )
            )
            load.finish(self._interruption.wait)
        ended = time.monotonic()
        tally, findings = load.tally(), self._audit(stage.server)
        result = ActResult(
            title=act.title,
            preload=service.preload,
            seconds=ended - begun,
            tally=tally,
            findings=findings,
            note=permit.note,
            silence=tally.longest_silence(begun, ended),
            latest_lend=latest_lend(tally, permit),
            complaints=complaints(tally, findings, permit),
            unexcused=unexcused(tally, permit),
        )
        self._screen.finish(result)
        return result

    def _audit(self, server: Server) -> ledger.Findings:
        """What is wrong with the books now and was not before this act."""
        books = ledger.read_books(server.conninfo(dbname=DATABASE, application_name=OBSERVER))
        found = ledger.audit(self._ledger.asked, self._ledger.acknowledged, books)
        fresh, self._known = found.since(self._known), found
        return fresh
