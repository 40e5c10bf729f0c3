"""What the bank has to do wherever it runs: the same answers, and the same few sessions for ever.

It must not know what it runs on.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from tests.integrations.bank_app import WORKERS

if TYPE_CHECKING:
    from tests.integrations.bank_app import BankApp


def check_sessions(bank: BankApp) -> None:
    """One named session per worker; after 1,000 requests, the same ones."""
    before = bank.sessions_of_all_workers()
    assert len(before) == WORKERS
    owners = {session.name for session in before}
    assert len(owners) == WORKERS
    assert all(re.fullmatch(r"gunicorn/bank\.\w+/\d+", owner) for owner in owners)
    answers = list(bank.ask_for_balances(1000))
    assert all(answer.status == 200 for _, answer in answers), bank.log()
    assert all(answer.content["nonce"] == nonce for nonce, answer in answers)
    assert bank.sessions() == before


def check_answers(bank: BankApp) -> None:
    """Money moves, history tells, dates and decimals are texts that keep what they are."""
    order = {"nonce": "a", "id": "first", "aid": 7, "tid": 3, "bid": 1, "delta": 25}
    made = bank.ask("POST", "/transfer", order)
    assert (made.status, made.content) == (200, {"nonce": "a", "id": "first", "balance": 25})
    told = bank.ask("GET", "/history/7?nonce=b").content
    assert (told["nonce"], told["aid"]) == ("b", 7)
    (line,) = told["lines"]
    assert datetime.fromisoformat(line.pop("made_at")).tzinfo is not None
    assert line == {"id": "first", "tid": 3, "bid": 1, "delta": 25}
    (branch,) = bank.ask("GET", "/branches").content
    assert Decimal(branch["per_teller"]) == Decimal("2.50")
    assert str(date.fromisoformat(branch["as_of"])) == branch["as_of"]
    assert bank.ask("GET", "/balance/7?nonce=c").content == {"nonce": "c", "aid": 7, "balance": 25}


def check_refusals(bank: BankApp) -> None:
    """What is wrong is refused, and what fails half way is undone."""
    assert bank.ask("GET", "/balance/7").status == 400
    assert bank.ask("GET", "/balance/999999999?nonce=d").status == 404
    too_much = {"nonce": "e", "id": "no", "aid": 8, "tid": 3, "bid": 1, "delta": 2**40}
    assert bank.ask("POST", "/transfer", too_much).status == 500
    late = {"nonce": "f", "id": "x" * 22, "aid": 8, "tid": 3, "bid": 1, "delta": 2**31 - 1}
    # the teller's and the branch's balances overflow when the account's has been moved already
    assert bank.ask("POST", "/transfer", late).status == 500
    assert bank.ask("GET", "/balance/8?nonce=g").content["balance"] == 0
