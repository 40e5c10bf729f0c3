"""The example's bank on Connexion 2.14 with WSGI workers, in an environment of its own.

Connexion 2.14 needs Flask 2.2, and the tests' own environment has a newer one: a new environment is made
from the package index. Where there is none, there is nothing to test with.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.integrations.bank_app import ORIGIN, ROOT, BankApp
from tests.integrations.bank_checks import check_answers, check_refusals, check_sessions
from tests.old_libraries import python_with

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_penstock.postgres import Server

PACKAGES = ("connexion[flask,swagger-ui]==2.14.*", "flask-cors", "gunicorn")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has Connexion 2.14, its Flask, and penstock from this checkout."""
    folder = tmp_path_factory.mktemp("connexion2")
    return python_with(folder, *PACKAGES, f"{ROOT}[psycopg-binary]")


@pytest.fixture(scope="module", params=["sync", "gthread"])
def bank(
    server: Server,
    python: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[BankApp]:
    arguments = {"sync": ("bank.wsgi",), "gthread": ("--threads=8", "--preload", "bank.wsgi")}
    folder = tmp_path_factory.mktemp("bank")
    with BankApp(server, folder, str(python), *arguments[request.param]) as bank:
        yield bank


def test_it_is_the_old_connexion_on_the_old_flask(python):
    asked = "from importlib.metadata import version as v; print(v('connexion'), v('flask'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    connexion, flask = done.stdout.split()
    assert connexion.startswith("2.14.")
    assert flask.startswith("2.2.")


def test_four_workers_have_four_named_sessions_and_the_same_ones_after_1000_requests(bank):
    check_sessions(bank)


def test_answers_are_right_and_dates_and_decimals_are_texts(bank):
    check_answers(bank)


def test_what_is_wrong_is_refused_and_what_fails_half_way_is_undone(bank):
    check_refusals(bank)


def test_other_origins_may_ask_and_the_api_has_a_page(bank):
    assert bank.ask("GET", "/branches").headers["Access-Control-Allow-Origin"] in {"*", ORIGIN}
    page = bank.ask("GET", "/ui/")
    assert page.status == 200
    assert b"swagger" in page.content.lower()
