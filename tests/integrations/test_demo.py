"""The demo judges rightly: green for penstock, red for pools that mix up answers; and it cleans up."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from demo import __main__ as command_line
from demo import acts, bank_pools, bank_service, ledger, plan
from demo.bank_tables import create_bank
from demo.example import ROOT
from demo.ledger import Findings, Transfer
from demo.load import Outcome, Tally, Trouble
from demo.verdict import NOTICE, Permit, complaints
from demo.worker_report import WorkerReport

from pytest_penstock.postgres import Server

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc"
)


class DemoRun:
    """`make demo` in a temporary folder and a process group of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.mark = f"PENSTOCK_TEST_{secrets.token_hex(8)}"
        self.output = folder.with_suffix(".out")
        self.account = folder.with_suffix(".json")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "demo", f"--json={self.account}", *arguments],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(folder), self.mark: "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, timeout: float) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        return self.output.read_text()

    def left_behind(self) -> list[str]:
        """Files in the temporary folder, and processes that came from this run."""
        # os.walk, because it does not mind when folders go while it looks.
        walk = os.walk(self.folder)
        files = [f"{folder}/{name}" for folder, folders, names in walk for name in folders + names]
        return files + [f"process {pid}" for pid in self._processes()]

    def _processes(self) -> Iterator[str]:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                # PostgreSQL overwrites its environment with its title, but works in its folder.
                ours = (
                    self.mark.encode() in (process / "environ").read_bytes()
                    or str(self.folder) in str((process / "cwd").readlink())
                    or str(self.folder).encode() in (process / "cmdline").read_bytes()
                )
            except OSError:  # it ended while we looked, or it is a zombie or somebody else's
                continue
            if ours:
                yield process.name


StartDemo = Callable[..., DemoRun]


@pytest.fixture
def demo_in_folder() -> Iterator[StartDemo]:
    # Not tmp_path: a unix socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="pst") as outside:
        folder = Path(outside) / "t"
        folder.mkdir()
        runs: list[DemoRun] = []

        def start(*arguments: str) -> DemoRun:
            runs.append(DemoRun(folder, *arguments))
            return runs[-1]

        yield start
        for run in runs:
            run.process.kill()
            run.process.wait()


def account_of(run: DemoRun, timeout: float) -> dict[str, Any]:
    """Let it finish; its JSON account, with the exit status in it."""
    status = run.finish(timeout)
    text = run.said()
    assert status in (0, 1), text
    assert "\x1b" not in text, "control codes, but the output is no terminal"
    assert run.left_behind() == []
    account: dict[str, Any] = json.loads(run.account.read_text())
    assert (status == 0) is account["ok"], text
    return account


def in_all_acts(account: dict[str, Any], what: str) -> int:
    return sum(act[what] for act in account["acts"])


def test_where_workers_wait_for_the_processor_a_pool_has_longer_to_hear_of_an_end() -> None:
    def notice(*late: float) -> float:
        reports = [
            WorkerReport(0.0, pid, 1, 0, 0, 0, 0.0, 0.0, (), each) for pid, each in enumerate(late)
        ]
        return acts.notice_in(reports)

    assert notice() == notice(0.001, 0.004) == NOTICE
    assert notice(0.001, 0.2) == pytest.approx(0.4)


@needs_proc
@pytest.mark.parametrize(
    ("mode", "service"), [*zip(["--no-preload", "--preload"], command_line.SERVICES, strict=True)]
)
def test_with_penstock_nothing_is_wrong_or_lost_in_any_act(
    demo_in_folder: StartDemo, mode: str, service: str
) -> None:
    account = account_of(demo_in_folder(mode, f"--service={service}", "--seconds=1"), timeout=90)
    assert account["ok"], json.dumps(account, indent=1)
    assert in_all_acts(account, "wrong") == in_all_acts(account, "lost") == 0
    assert len(account["acts"]) == 5


@needs_proc
def test_psycopg_pool_used_before_the_fork_is_seen_to_give_wrong_answers(
    demo_in_folder: StartDemo,
) -> None:
    pytest.importorskip("psycopg_pool")
    arguments = ("--pool=psycopg_pool", "--service=flask", "--preload", "--act=calm")
    # Whose answer comes to whom is chance; now and then everybody hangs before anybody is answered.
    for _ in range(3):
        account = account_of(demo_in_folder(*arguments, "--seconds=1.5"), timeout=90)
        assert not account["ok"]
        if in_all_acts(account, "wrong") > 0:
            return
    pytest.fail(f"no wrong answer in three runs: {account}")


@needs_proc
def test_psycopg2s_pool_is_seen_to_lend_sessions_that_have_ended(demo_in_folder: StartDemo) -> None:
    pytest.importorskip("psycopg2")
    flask = ("--pool=psycopg2", "--service=flask")
    run = demo_in_folder(*flask, "--no-preload", "--act=idle", "--seconds=1")
    account = account_of(run, timeout=60)
    assert not account["ok"]
    assert in_all_acts(account, "failed") > 0
    assert in_all_acts(account, "wrong") == in_all_acts(account, "lost") == 0


SEED = int(os.environ.get("PENSTOCK_TEST_SEED", "20261121"))
# Early (imports), initdb and server, tables and gunicorn, acts.
SPANS = [(0.05, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 6.0)]


@needs_proc
@pytest.mark.parametrize("span", SPANS, ids=lambda span: f"{span[0]}-{span[1]}s")
def test_an_interrupted_demo_leaves_no_process_socket_or_folder(
    demo_in_folder: StartDemo, span: tuple[float, float]
) -> None:
    chance = random.Random(f"{SEED}/{span}")
    moment, signum = chance.uniform(*span), chance.choice([signal.SIGINT, signal.SIGTERM])
    # Ctrl-C at a terminal goes to the whole group, `kill` to the process alone.
    send = os.killpg if chance.random() < 0.5 else os.kill
    print(f"seed {SEED}: {signum.name} by {send.__name__} after {moment:.3f} s")
    run = demo_in_folder("--pool=psycopg_pool", "--no-preload", "--seconds=3")
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(moment)
    send(run.process.pid, signum)
    assert run.finish(timeout=15) != 0, run.said()
    assert run.left_behind() == []


@needs_proc
def test_a_demo_that_is_killed_leaves_nothing_either(demo_in_folder: StartDemo) -> None:
    run = demo_in_folder("--pool=psycopg2", "--no-preload", "--seconds=60")
    until(lambda: any(run.folder.glob("penstock-*/demo/reports*/*.json")))
    run.process.kill()
    until(lambda: not run.left_behind())


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what nobody announces."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_line_offers_what_there_is() -> None:
    assert tuple(act.name for act in acts.ACTS) == command_line.ACTS
    assert tuple(bank_pools.KINDS) == command_line.POOLS
    assert tuple(bank_service.APPLICATIONS) == tuple(plan.SERVICES) == command_line.SERVICES


# The ledger, on a real server.


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def bank(server: Server) -> str:
    """The conninfo of a fresh bank whose tables are made by SQL."""
    name = f"bank_{secrets.token_hex(4)}"
    conninfo = server.conninfo(dbname=name)
    create_bank(server.conninfo(), conninfo, name, 1, None)
    return conninfo


def transfers(count: int) -> list[Transfer]:
    return [Transfer(f"{number:022}", number + 1, 1, 1, 10 * number) for number in range(count)]


def apply(conninfo: str, transfer: Transfer) -> None:
    _, aid, tid, bid, delta = transfer
    with psycopg.connect(conninfo) as conn:
        conn.execute(
            "update pgbench_accounts set abalance = abalance + %s where aid = %s", (delta, aid)
        )
        conn.execute(
            "update pgbench_tellers set tbalance = tbalance + %s where tid = %s", (delta, tid)
        )
        conn.execute(
            "update pgbench_branches set bbalance = bbalance + %s where bid = %s", (delta, bid)
        )
        conn.execute(
            "insert into pgbench_history (filler, aid, tid, bid, delta) values (%s, %s, %s, %s, %s)",
            transfer,
        )


def audit(conninfo: str, asked: list[Transfer], acknowledged: list[Transfer]) -> Findings:
    return ledger.audit(
        {transfer.id: transfer for transfer in asked},
        [transfer.id for transfer in acknowledged],
        ledger.read_books(conninfo),
    )


def test_the_money_adds_up_also_when_a_transfer_was_done_but_not_acknowledged(bank: str) -> None:
    done, unacknowledged, never_done = transfers(3)
    apply(bank, done)
    apply(bank, unacknowledged)
    findings = audit(bank, [done, unacknowledged, never_done], [done])
    assert findings.adds_up
    assert findings.lost == 0
    assert findings.describe() == "adds up"


def test_a_lost_transfer_is_noticed(bank: str) -> None:
    done, lost = transfers(2)
    apply(bank, done)
    findings = audit(bank, [done, lost], [done, lost])
    assert findings.missing == {lost.id}
    assert findings.lost == 1


@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_replayed_transfer_is_noticed_though_the_sums_agree(
    bank: str, acknowledged: bool
) -> None:
    _, transfer = transfers(2)
    apply(bank, transfer)
    apply(bank, transfer)
    findings = audit(bank, [transfer], [transfer] if acknowledged else [])
    assert findings.imbalance == (0, 0, 0)
    assert findings.repeated == {transfer.id}
    assert not findings.adds_up
    assert findings.lost == int(acknowledged)


def test_an_altered_and_an_unknown_transfer_are_noticed(bank: str) -> None:
    asked, unknown = transfers(2)
    apply(bank, asked._replace(delta=asked.delta + 1))
    apply(bank, unknown)
    findings = audit(bank, [asked], [asked])
    assert findings.altered == {asked.id}
    assert findings.unknown == {unknown.id}
    assert findings.lost == 1
    assert not findings.adds_up


@pytest.mark.parametrize("table", ["accounts", "tellers", "branches"])
def test_a_sum_that_is_off_is_noticed_and_held_against_one_act_only(bank: str, table: str) -> None:
    column = f"{table[0]}balance"
    with psycopg.connect(bank) as conn:
        conn.execute(f"update pgbench_{table} set {column} = {column} + 7 where {table[0]}id = 1")
    findings = audit(bank, [], [])
    assert not findings.adds_up
    assert findings.describe() == f"{table} off by +7"
    assert findings.since(findings).adds_up


def test_the_tables_made_by_sql_are_pgbenchs(server: Server, bank: str) -> None:
    pgbench = server.binaries.pgbench
    if pgbench is None:
        pytest.skip("this PostgreSQL has no pgbench to compare with")
    create_bank(server.conninfo(), server.conninfo(dbname="by_pgbench"), "by_pgbench", 1, pgbench)
    question = """select table_name, column_name, data_type, character_maximum_length, is_nullable
                  from information_schema.columns where table_schema = 'public'
                  union all
                  select tablename, indexname, '', 0, '' from pg_indexes where schemaname = 'public'
                  union all
                  select 'rows', 'accounts', '', count(*)::int, '' from pgbench_accounts
                  order by 1, 2"""
    with psycopg.connect(bank) as conn, psycopg.connect(bank, dbname="by_pgbench") as other:
        assert conn.execute(question).fetchall() == other.execute(question).fetchall()


# The judge, without any server: a session of server process 7 was seen to be gone at 100.0 s.

PERMIT = Permit(over_at=100.0, gone={7: 100.0}, notice=0.02)


def failure(backend: int | None, lent_at: float | None) -> Trouble:
    status = 503 if backend is None else 500
    return Trouble(Outcome.FAILED, status, "", 1, backend, lent_at, 101.0)


def judged(*troubles: Trouble, permit: Permit = PERMIT) -> tuple[str, ...]:
    return complaints(Tally(troubles=list(troubles), served_at=[200.0]), Findings(), permit)


def test_a_request_that_held_a_session_when_it_ended_may_fail_once() -> None:
    assert judged(failure(7, 99.9)) == ()
    (complaint,) = judged(failure(7, 99.8), failure(7, 99.9))
    assert "had failed somebody else already" in complaint


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (failure(7, 100.5), "lent a session that had ended before"),
        (failure(8, 99.9), "nobody had ended"),
        (failure(None, None), "gave no connection"),
        (Trouble(Outcome.FAILED, None, "", 1), "not answered in time"),
        (Trouble(Outcome.CUT, None, "", 1), "cut off by a worker nobody killed"),
    ],
)
def test_any_other_failure_is_complained_about(trouble: Trouble, words: str) -> None:
    (complaint,) = judged(trouble)
    assert words in complaint


def test_whom_the_killed_worker_served_may_be_cut_off_and_nobody_else() -> None:
    permit = Permit(over_at=100.0, killed_worker=1)
    assert judged(Trouble(Outcome.CUT, None, "", 1), permit=permit) == ()
    assert judged(Trouble(Outcome.CUT, None, "", None), permit=permit) == ()
    assert judged(Trouble(Outcome.CUT, None, "", 2), permit=permit) != ()


def test_a_service_that_does_not_come_back_is_complained_about() -> None:
    assert complaints(Tally(served_at=[99.0]), Findings(), PERMIT) == (
        "nobody was served afterwards",
    )
