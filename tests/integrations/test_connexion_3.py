"""The example's bank on Connexion 3 under three kinds of workers, and on Flask alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from tests.integrations.bank_app import ORIGIN, BankApp
from tests.integrations.bank_checks import check_answers, check_refusals, check_sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_penstock.postgres import Server

A2WSGI = "from a2wsgi import ASGIMiddleware\nfrom bank.asgi import application as asgi\n"
A2WSGI += "application = ASGIMiddleware(asgi)\n"

WAYS = {
    "asgi worker": ("--worker-class=asgi", "bank.asgi"),
    "asgi worker, preload": ("--worker-class=asgi", "--preload", "bank.asgi"),
    "uvicorn's worker": ("--worker-class=uvicorn_worker.UvicornWorker", "bank.asgi"),
    "a2wsgi on gthread": ("--threads=4", "through_a2wsgi"),
    "Flask on sync": ("bank.plain",),
    "Flask on gthread": ("--threads=4", "--preload", "bank.plain"),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bank(server: Server, way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BankApp]:
    folder = tmp_path_factory.mktemp("bank")
    (folder / "through_a2wsgi.py").write_text(A2WSGI)
    with BankApp(server, folder, sys.executable, *WAYS[way]) as bank:
        yield bank


def test_four_workers_have_four_named_sessions_and_the_same_ones_after_1000_requests(bank):
    check_sessions(bank)


def test_answers_are_right_and_dates_and_decimals_are_texts(bank):
    check_answers(bank)


def test_what_is_wrong_is_refused_and_what_fails_half_way_is_undone(bank):
    check_refusals(bank)


def test_other_origins_may_ask_and_the_api_has_a_page(bank, way):
    page = bank.ask("GET", "/ui/")
    if way.startswith("Flask"):
        assert page.status == 404  # Connexion brings it
        return
    assert page.status == 200
    assert b"swagger" in page.content.lower()
    assert bank.ask("GET", "/branches").headers["Access-Control-Allow-Origin"] in {"*", ORIGIN}
