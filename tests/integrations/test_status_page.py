"""`make demo ARGS=--serve`: the status page, looked at in a real browser; and nothing left behind.

The picture in the docs is made here: PENSTOCK_TEST_PICTURE=docs/status-page.png.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from demo.example import ROOT
from tests.integrations.chromium import Chromium, find_chromium

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKERS = 4
WIDE, NARROW = (1180, 760), (390, 844)
ROWS = """[...document.querySelectorAll('{} tbody tr')].map(
    row => [...row.children].map(cell => cell.innerText.trim()))"""


class Served:
    """`make demo ARGS=--serve` in a folder and a process group of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.mark = f"PENSTOCK_TEST_{secrets.token_hex(8)}"
        command = [sys.executable, "-m", "demo", "--serve", f"--workers={WORKERS}"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(folder), self.mark: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if "Ctrl-C" in line:
                break
        self.bank = self._address("the bank")
        self.status = self._address("its status")
        self.port = int(self.bank.split(":")[2].partition("/")[0])

    def _address(self, what: str) -> str:
        found = re.search(rf"{what}: +(\S+)", self.said)
        assert found, self.said
        return found[1]

    def end(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=30)
        return self.process.returncode

    @property
    def conninfo(self) -> str:
        """How the bank's database is reached."""
        ini = next(self.folder.glob("penstock-*/demo/config.ini")).read_text()
        values = dict(re.findall(r"(?m)^(\w+) = ?(.*)$", ini))
        return f"host={values['URL']} port={values['PORT']} user={values['USER']} dbname={values['DB']}"

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any, int]:
        """Ask the bank: status, answer, and the worker that gave it."""
        http = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            text = None if body is None else json.dumps(body)
            http.request(method, path, text, {"Content-Type": "application/json"} if text else {})
            answer = http.getresponse()
            return answer.status, json.loads(answer.read()), int(answer.headers["X-Worker"])
        finally:
            http.close()

    def left_behind(self) -> list[str]:
        """Files in its folder, and processes that came from it."""
        found = [str(path) for path in self.folder.rglob("*")]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.mark.encode() in (process / "environ").read_bytes()
                ours |= str(self.folder).encode() in (process / "cmdline").read_bytes()
            except OSError:
                continue
            found += [f"process {process.name}"] if ours else []
        return found


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    # Not tmp_path: a unix socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="pst") as folder:
        served = Served(Path(folder), *arguments)
        try:
            yield served
        finally:
            if served.process.poll() is None:
                assert served.end() == 0
        assert served.left_behind() == []


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def browser(served: Served) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Chromium(program) as browser:
        browser.resize(*WIDE)
        browser.prefer("light")
        yield browser


@pytest.fixture
def page(browser: Chromium, served: Served) -> Chromium:
    """The status page, freshly opened, with its first figures."""
    browser.complaints.clear()
    browser.open(served.status)
    browser.wait_for("document.body && Number(document.body.dataset.shown) > 0")
    return browser


def use_every_worker(served: Served) -> set[int]:
    """Ask until each worker has answered; their pids."""
    workers: set[int] = set()
    deadline = time.monotonic() + 60
    while len(workers) < WORKERS:
        assert time.monotonic() < deadline
        workers.add(served.request("GET", "/balance/42?nonce=x")[2])
    return workers


@contextmanager
def transfer_waiting_for_a_lock(served: Served) -> Iterator[None]:
    """A transfer that holds its connection: somebody else has locked the account's row."""
    order = {"nonce": "n", "id": secrets.token_hex(8), "aid": 7, "tid": 1, "bid": 1, "delta": 1}
    with psycopg.connect(served.conninfo, application_name="somebody else") as conn:
        conn.execute("select from pgbench_accounts where aid = 7 for update")
        answers: list[tuple[int, Any, int]] = []
        asking = threading.Thread(
            target=lambda: answers.append(served.request("POST", "/transfer", order))
        )
        asking.start()
        try:
            yield
        finally:
            conn.rollback()
            asking.join(30)
    assert answers[0][0] == 200
    assert answers[0][1]["id"] == order["id"]


def test_the_page_shows_the_workers_and_the_servers_sessions_beside_them(page, served):
    pids = use_every_worker(served)
    shown = page.wait_for(
        f"(rows => rows.every(row => row[5] !== '0') && rows)({ROWS.format('#workers')})"
    )
    assert {int(row[0]) for row in shown} == pids
    names = {f"gunicorn/bank/{pid}" for pid in pids}
    sessions = page.wait_for(
        f"(rows => rows.length === {WORKERS} && rows)({ROWS.format('#sessions')})"
    )
    assert {row[0] for row in sessions} == names
    with psycopg.connect(served.conninfo, application_name="penstock demo") as conn:
        counted = conn.execute(
            "select application_name, count(*) from pg_stat_activity"
            " where application_name like 'gunicorn/bank/%' group by 1"
        ).fetchall()
    assert {row[0]: int(row[1]) for row in sessions} == dict(counted)
    assert page.ask("document.querySelector('#f-workers b').innerText") == str(WORKERS)
    assert page.ask("document.querySelector('#f-sessions small').innerText") == "as the pools say"
    assert page.complaints == []


def test_a_held_connection_is_shown_with_its_request_place_and_session(page, served, tmp_path):
    with transfer_waiting_for_a_lock(served):
        (row,) = page.wait_for(
            f"(rows => rows.length === 1 && rows[0][0].endsWith(' s') && rows)({ROWS.format('#held')})"
        )
        _, request, place, activity, thread, worker, session = row
        with psycopg.connect(served.conninfo) as conn:
            waiting = conn.execute(
                "select pid, application_name from pg_stat_activity where wait_event_type = 'Lock'"
            ).fetchone()
        picture(page, served, tmp_path)
    assert request == "POST /transfer"
    assert re.fullmatch(r"controllers/transfer_controller\.py:\d+ in make_transfer", place)
    assert activity == "active"
    assert thread
    assert (int(session), f"gunicorn/bank/{worker}") == waiting
    assert page.wait_for(f"{ROWS.format('#held')}[0][0] === 'Nobody does at this moment.'")
    assert page.complaints == []


def picture(page: Chromium, served: Served, tmp_path: Path) -> None:
    """For the docs: something is going on, and one request has hung for a while."""
    path = tmp_path / "page.png"
    wanted = os.environ.get("PENSTOCK_TEST_PICTURE")
    if not wanted:
        page.shoot(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    with a_few_clients(served):
        page.wait_for(f"parseFloat({ROWS.format('#held')}[0][0]) > 6")
        page.resize(WIDE[0], page.ask("document.body.offsetHeight"), 1.25)
        page.shoot(path)
    page.resize(*WIDE)
    shutil.copy(path, wanted)


@contextmanager
def a_few_clients(served: Served) -> Iterator[None]:
    ended = threading.Event()

    def ask(number: int) -> None:
        order = {"nonce": "n", "aid": 100 + number, "tid": number + 2, "bid": 2, "delta": number}
        while not ended.wait(0.02):
            served.request("GET", f"/balance/{number}?nonce=n")
            served.request("POST", "/transfer", {**order, "id": secrets.token_hex(8)})

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(1, 11)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        ended.set()
        for client in clients:
            client.join(30)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_page_fits_its_window_and_can_be_read_by_day_and_night(page, size, scheme):
    page.resize(*size)
    page.prefer(scheme)
    overflowing = """[...document.querySelectorAll('section, figure, table, td')].filter(
        each => each.getBoundingClientRect().right > innerWidth + 0.5).map(each => each.outerHTML)"""
    assert page.ask(overflowing) == []
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    ground, text = (
        sum(map(int, re.findall(r"\d+", page.ask(f"getComputedStyle(document.body).{what}"))[:3]))
        for what in ("backgroundColor", "color")
    )
    assert (ground > 600 and text < 150) if scheme == "light" else (ground < 150 and text > 600)
    page.resize(*WIDE)
    page.prefer("light")


def test_the_page_needs_nothing_from_elsewhere_and_tells_no_secret(page, served):
    loaded = page.ask("performance.getEntriesByType('resource').map(each => each.name)")
    assert set(loaded) == {served.status + ".json"}
    told = page.ask("document.documentElement.outerHTML")
    port = re.search(r"port=(\d+)", served.conninfo)
    assert port
    assert not [secret for secret in (str(served.folder), port[1], "update ") if secret in told]


def test_the_page_says_so_when_nobody_answers_any_more(browser):
    with serving("--service=flask", "--preload") as served:
        browser.open(served.status)
        browser.wait_for("document.body && Number(document.body.dataset.shown) > 1")
        assert served.end() == 0
        assert "No answer" in browser.wait_for(
            "!document.querySelector('#away').hidden && document.querySelector('#away').innerText"
        )


def test_the_api_has_its_own_page(browser, served):
    browser.complaints.clear()
    browser.open(served.bank)
    browser.wait_for("document.body && document.body.innerText.includes('/balance/{aid}')")
    assert browser.ask("document.querySelector('h2.title, .title').innerText").startswith(
        "The Bank"
    )
    assert browser.complaints == []
