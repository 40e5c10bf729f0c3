"""Every worker class of gunicorn, with and without --preload: the bank from its first request to its end.

One start each, and everything is looked at on the way: right answers while workers are replaced because
of max_requests and SIGHUP, the sessions of the living and of nobody else, and none after SIGTERM.
"""

from __future__ import annotations

import secrets
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import RemoteDisconnected
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.forks import until
from tests.integrations.bank_app import BankApp

if TYPE_CHECKING:
    from pytest_penstock.postgres import Server

# The pool is used while the application is loaded: with --preload by the master, before it forks.
SERVICES = {
    "WSGI": "from bank.plain import application, db\n"
    "with application.app_context():\n    db.execute('select 1')\n",
    "ASGI": "from bank.asgi import application, db\n"
    "with application.app.app_context():\n    db.execute('select 1')\n",
}
HOOKS = "from penstock.integrations.gunicorn import child_exit, post_worker_init, worker_exit\n"

CLASSES = {
    "sync": "WSGI",
    "gthread": "WSGI",
    "gevent": "WSGI",
    "tornado": "WSGI",
    "asgi": "ASGI",
    "uvicorn_worker.UvicornWorker": "ASGI",
}
RUNTIMES = {"gevent": "on gevent"}  # the others: on threads
# uvicorn, when it ends, closes connections whose request it has not read yet: their clients ask again.
CUTS = {"uvicorn_worker.UvicornWorker"}
NO_EXIT_HOOK = {"uvicorn_worker.UvicornWorker"}  # on SIGTERM
WORKERS = 2
MOST = 25  # requests of a worker


@pytest.mark.parametrize("kind", CLASSES)
def test_a_bank_goes_on_while_its_workers_come_and_go_and_leaves_nothing_behind(
    kind: str, server: Server, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as both:  # side by side: gunicorn sleeps most of the time
        runs = [both.submit(live, kind, preload, server, tmp_path) for preload in (False, True)]
    for run in runs:
        run.result()


def live(kind: str, preload: bool, server: Server, folder: Path) -> None:
    folder = folder / ("preload" if preload else "each")
    folder.mkdir()
    (folder / "service.py").write_text(SERVICES[CLASSES[kind]])
    (folder / "gunicorn.conf.py").write_text(HOOKS)
    options = [f"--worker-class={kind}", f"--workers={WORKERS}", f"--max-requests={MOST}"]
    options += ["--threads=4"] * (kind == "gthread") + ["--preload"] * preload
    with BankApp(server, folder, sys.executable, *options, "service") as bank:
        try:
            check_a_life(bank, kind, preload)
        except BaseException:
            print(f"{kind}, {preload=}:\n{bank.log()}")
            raise


def check_a_life(bank: BankApp, kind: str, preload: bool) -> None:
    master = bank._process.pid
    ask = partial(check_balances, bank, cuts=kind in CUTS)
    check_balances(bank, MOST - 4)  # nobody is replaced yet
    first = sessions(bank)
    kept = {one for one in first.items() if one[0] == master}
    assert bool(kept) == preload

    ask(WORKERS * MOST)  # so that one is replaced at least
    until(partial(only_the_living, bank), f"{kind}: the sessions of replaced workers are gone")

    until(partial(all_have_booted, bank), f"{kind}: all workers have booted")
    before = workers(bank)
    bank._process.send_signal(signal.SIGHUP)
    ask(10)
    until(lambda: workers(bank) and not workers(bank) & before, f"{kind}: all workers are new")
    ask(10)
    until(partial(only_the_living, bank), f"{kind}: the sessions before SIGHUP are gone")
    assert kept <= set(sessions(bank).items())  # the master's, through all that

    until(partial(all_have_booted, bank), f"{kind}: all workers have booted again")
    bank._process.terminate()
    assert bank._process.wait(60) == 0
    until(lambda: not bank.sessions(), f"{kind}: nothing is left")
    assert f"penstock: {RUNTIMES.get(kind, 'on threads')}: pool 'bank." in bank.log()
    assert "Traceback" not in bank.log()
    if kind not in NO_EXIT_HOOK:
        assert "ended without closing its pools" not in bank.log()


def check_balances(bank: BankApp, count: int, *, cuts: bool = False) -> None:
    """Right answers, each over a connection of its own, from four clients."""
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(partial(balance, bank, cuts), range(count)))
    assert [status for status, _, _ in answers] == [200] * count
    assert all(found == wanted for _, found, wanted in answers)


def balance(bank: BankApp, cuts: bool, number: int) -> tuple[int, Any, str]:
    nonce = secrets.token_urlsafe(8)
    while True:
        try:
            answer = bank.ask("GET", f"/balance/{number % 1000 + 1}?nonce={nonce}")
        except (ConnectionResetError, RemoteDisconnected):
            if not cuts:
                raise
        else:
            return answer.status, answer.content["nonce"], nonce


def sessions(bank: BankApp) -> dict[int, Any]:
    """Each process's session, by its pid, which is in the session's name."""
    # One that is just logging in has no name yet.
    return {int(one.name.rpartition("/")[2]): one for one in bank.sessions() if one.name}


def workers(bank: BankApp) -> set[int]:
    master = bank._process.pid
    return set(map(int, Path(f"/proc/{master}/task/{master}/children").read_text().split()))


def all_have_booted(bank: BankApp) -> bool:
    """gunicorn loses a SIGTERM that a worker gets before."""
    log = bank.log()
    return len(workers(bank)) == WORKERS and all(
        f"[{one}] [INFO] penstock: on " in log for one in workers(bank)
    )


def only_the_living(bank: BankApp) -> bool:
    owners = set(sessions(bank))  # first: whoever is there now may be gone in a moment
    return owners <= workers(bank) | {bank._process.pid}
