"""A login that ends without a refusal is no wrong password, wherever it is cut, and whatever asks for the password.

libpq gives no code for a failed connect, and ends one without a code also after a login that succeeded: at a
standby where target_session_attrs asks for a primary. Whoever waits for a promotion must not be refused then. A
wrong password must be, at once.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
from tests.faults.logins import STEPS, LoginCutter
from tests.faults.stage import COMBINATIONS, Stage

from penstock.drivers import Diagnosis, Recipe
from penstock.errors import ServerUnavailable
from pytest_penstock.postgres import Server, TlsUnavailable

METHODS = tuple(STEPS)
PASSWORD = "pw"


@pytest.fixture(scope="module")
def strict():
    """A server with a role for each method, which is named like it."""
    hba = [f'host all "{method}" 127.0.0.1/32 {method}' for method in METHODS]
    others = ("local all postgres trust", "local all all peer", "host replication all all trust")
    with Server(hba=(*hba, *others, "host all barred 127.0.0.1/32 reject")) as running:
        for method in METHODS:
            way = "md5" if method == "md5" else "scram-sha-256"
            running.execute(
                f"set password_encryption = '{way}'; "
                f"create role \"{method}\" login password '{PASSWORD}'"
            )
        running.execute("create role barred login")
        yield running


@pytest.fixture(scope="module")
def standby(strict):
    with strict.standby() as running:
        yield running


@pytest.fixture(scope="module")
def with_certificates():
    """A server that asks clients for one; its own stands for the authority."""
    hba = ["local all all trust", "hostssl all all 127.0.0.1/32 cert"]
    try:
        with Server(tls=True, hba=hba, settings={"ssl_ca_file": "../server.crt"}) as running:
            yield running
    except TlsUnavailable as reason:
        pytest.skip(str(reason))


def conninfo(*ports, **words):
    words = {"user": "scram-sha-256", "password": PASSWORD, "dbname": "postgres", **words}
    words = {"sslmode": "disable", "connect_timeout": 10, **words}
    text = " ".join(f"{key}={value}" for key, value in words.items() if value is not None)
    return f"{text} host={','.join(['127.0.0.1'] * len(ports))} port={','.join(map(str, ports))}"


# -- drivers: what they make of a failure ------------------------------------------------------------


def psycopg(text):
    pytest.importorskip("psycopg")
    from penstock._drivers.psycopg3.driver import Psycopg3Driver

    return in_a_call(Psycopg3Driver(), text)


def psycopg_on_a_loop(text):
    pytest.importorskip("psycopg")
    from penstock._drivers.psycopg3.aio_driver import AsyncPsycopg3Driver

    return asyncio.run(on_a_loop(AsyncPsycopg3Driver(), text))


def psycopg2(text):
    pytest.importorskip("psycopg2")
    from penstock._drivers.psycopg2.driver import Psycopg2Driver

    return in_a_call(Psycopg2Driver(), text)


def psycopg2_alone(text):
    """Where psycopg 3 is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "psycopg", None)
        return psycopg2(text)


def psycopg2_deaf(text):
    """And where its libpq cannot be reached by ctypes either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock._drivers.libpq_codes.library", lambda _path: None)
        return psycopg2_alone(text)


def asyncpg(text):
    pytest.importorskip("asyncpg")
    from penstock._drivers.asyncpg.driver import AsyncpgDriver

    return asyncio.run(on_a_loop(AsyncpgDriver(), text))


def in_a_call(driver, text):
    recipe = Recipe(conninfo=text)
    try:
        link = driver.open(recipe, 10.0)
    except Exception as error:
        return driver.diagnose(error, recipe, 5.0)
    link.close()
    return None


async def on_a_loop(driver, text):
    recipe = Recipe(conninfo=text)
    try:
        link = await driver.open(recipe, 10.0)
    except Exception as error:
        return await driver.diagnose(error, recipe, 5.0)
    await link.close()
    return None


HEARING = (psycopg, psycopg_on_a_loop, psycopg2, psycopg2_alone, asyncpg)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ask", HEARING)
def test_a_login_that_was_cut_is_tried_again_wherever_it_was_cut(ask, method, strict):
    for how in ("fin", "rst"):
        for step in STEPS[method]:
            with LoginCutter(strict.port, step, how) as proxy:
                found = ask(conninfo(proxy.port, user=method))
            print(how, step, found)
            assert proxy.cuts
            assert found.heals, (how, step, found)
            assert found.sqlstate is None


@pytest.mark.parametrize("method", METHODS)
def test_where_no_code_can_be_heard_a_cut_after_the_login_is_known_all_the_same(method, strict):
    steps = STEPS[method]
    for step in steps[steps.index("ok") :]:
        with LoginCutter(strict.port, step) as proxy:
            found = psycopg2_deaf(conninfo(proxy.port, user=method))
        assert found.heals, (step, found)
    if method != "trust":  # and what a server does not let in is refused
        found = psycopg2_deaf(conninfo(strict.port, user=method, password="wrong"))
        assert not found.heals
        assert "password" in (found.next_step or "")


@pytest.mark.parametrize("ask", HEARING)
def test_what_the_server_refuses_is_refused_by_its_code(ask, strict):
    for method in METHODS[1:]:
        found = ask(conninfo(strict.port, user=method, password="wrong"))
        assert (found.sqlstate, found.heals) == ("28P01", False), (method, found)
    found = ask(conninfo(strict.port, user="barred"))
    assert (found.sqlstate, found.heals) == ("28000", False)
    found = ask(conninfo(strict.port, dbname="nowhere"))
    assert (found.sqlstate, found.heals) == ("3D000", False)
    if strict.socket_dir is not None:  # the operating system's user is not this role
        peer = f"host={strict.socket_dir} port={strict.port} user=barred dbname=postgres"
        found = ask(peer)
        assert (found.sqlstate, found.heals) == ("28000", False)


@pytest.mark.parametrize("ask", HEARING)
def test_a_password_that_is_missing_is_refused_and_said(ask, strict, monkeypatch, tmp_path):
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    monkeypatch.delenv("PGPASSWORD", raising=False)
    for method in METHODS[1:]:
        found = ask(conninfo(strict.port, user=method, password=None))
        assert not found.heals
        assert found.sqlstate == "28P01" or "check user and password" in (found.next_step or "")


@pytest.mark.parametrize("ask", HEARING)
def test_a_certificate_that_is_missing_or_anothers_is_refused_by_its_code(ask, with_certificates):
    with warnings.catch_warnings():
        # Over TLS asyncpg leaves the transport of a refused login to the collector.
        warnings.simplefilter("ignore", ResourceWarning)
        found = ask(conninfo(with_certificates.port, user="postgres", sslmode="require"))
        gc.collect()
    assert (found.sqlstate, found.heals) == ("28000", False)


# -- several hosts -----------------------------------------------------------------------------------

ATTRS = ("read-write", "primary")
NOBODY = 9  # the port of a host that is down


@pytest.mark.parametrize("ask", [*HEARING, psycopg2_deaf])
def test_a_standby_where_a_primary_is_asked_for_is_waited_for(ask, strict, standby):
    places = ((standby.port,), (NOBODY, standby.port), (standby.port, NOBODY))
    for attrs in ATTRS:
        for ports in places:
            for balance in ("disable", "random"):
                text = conninfo(*ports, target_session_attrs=attrs, load_balance_hosts=balance)
                found = ask(text)
                assert found.heals, (ports, attrs, found)
                if ports == (standby.port,):
                    assert "target_session_attrs" in found.next_step
    for attrs in ("standby", "read-only"):
        found = ask(conninfo(strict.port, target_session_attrs=attrs))
        assert found.heals
        assert "target_session_attrs" in found.next_step


@pytest.mark.parametrize("ask", HEARING)
def test_a_wrong_password_is_refused_at_several_hosts_whether_or_not_one_is_down(
    ask, strict, standby
):
    places = ((strict.port, standby.port), (NOBODY, standby.port), (strict.port, NOBODY))
    for ports in places:
        for attrs in ("any", *ATTRS, "prefer-standby"):
            found = ask(conninfo(*ports, password="wrong", target_session_attrs=attrs))
            assert (found.sqlstate, found.heals) == ("28P01", False), (ports, attrs, found)


def test_a_server_that_lets_the_diagnosing_attempt_in_is_no_refusal(strict, standby):
    """Of two, one refuses the password and the other one is up again by now."""
    pytest.importorskip("psycopg")
    import psycopg as library

    from penstock._drivers.psycopg3 import diagnose as psycopg3_diagnose

    with LoginCutter(strict.port, "nothing") as refuses_nobody:
        refuses_nobody.last = None
        words = conninfo(strict.port, refuses_nobody.port)
        recipe = Recipe(conninfo=words)
        found = psycopg3_diagnose.diagnose(library.OperationalError("gone"), recipe, 5.0)
    assert found.heals


def test_psycopg_over_an_older_libpq_hears_the_same(strict, standby):
    """The Python implementation takes the system's libpq, which may trace no login."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs psycopg")
    with LoginCutter(strict.port, "sasl continue") as proxy:
        asked = {
            "wrong password": conninfo(strict.port, password="wrong"),
            "barred": conninfo(strict.port, user="barred"),
            "standby": conninfo(standby.port, target_session_attrs="read-write"),
            "cut": conninfo(proxy.port),
        }
        script = (
            "import sys; from tests.faults.test_logins_cut_short import psycopg\n"
            "for text in sys.argv[1:]:\n"
            "    found = psycopg(text); print(found.sqlstate, found.heals)"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, *asked.values()],
            env=os.environ | {"PSYCOPG_IMPL": "python", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    if "no pq wrapper available" in run.stderr or "libpq library not found" in run.stderr:
        pytest.skip("needs a libpq of the system's")
    assert run.stdout.splitlines() == ["28P01 False", "28000 False", "None True", "None True"], (
        run.stderr
    )


# -- pools: who waits is served ----------------------------------------------------------------------


@pytest.mark.parametrize("step", ["sasl continue", "ok", "key"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_who_waits_while_logins_are_cut_is_served_when_they_are_not(name, step, strict):
    needed(name)

    async def play(w):
        with LoginCutter(strict.port, step) as proxy:
            pool = w.pool(conninfo(proxy.port), timeout=60, name="cut")
            waiting = [w.spawn(w.borrow(pool, "select 1")) for _ in range(3)]
            await w.until(lambda: pool.stats().open_failures >= 3, "it was tried again")
            assert not any(each.done for each in waiting), pool
            proxy.last = None
            await served(pool, waiting)

    Stage(name).play(play)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_words_that_went_with_a_refusal_are_no_refusal_once_it_is_over(name, strict):
    """A cut login whose diagnosis met a wrong password; the password is right by now, and a login is cut again."""
    needed(name)
    attempts = []

    def explained(_error):
        attempts.append(1)
        refused = len(attempts) == 1
        return Diagnosis(sqlstate="28P01" if refused else None, heals=not refused, text="cut")

    async def aside(error):
        return explained(error)

    async def play(w):
        with LoginCutter(strict.port, "ok") as proxy:
            pool = w.pool(conninfo(proxy.port), min_size=0, timeout=60, name="again")
            with pytest.MonkeyPatch.context() as patch:
                found = aside if w.runtime.asynchronous else explained
                patch.setattr(pool._opener, "_diagnosis", found)
                this = await w.borrow(pool, "select 1")
                assert this.error.sqlstate == "28P01"
                proxy.last = None
                while not (this := await w.borrow(pool, "select 1")).good:
                    await w.pause(0.05)
                proxy.last = "ok"
                await pool.drain()
                waiting = [w.spawn(w.borrow(pool, "select 1"))]
                await w.until(lambda: len(attempts) > 1, "it was diagnosed anew")
                proxy.last = None
                await served(pool, waiting)

    Stage(name).play(play)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_who_waits_until_a_server_takes_writes_is_served_then_also_with_a_password(name, strict):
    needed(name)

    async def play(w):
        strict.execute('alter role "scram-sha-256" set default_transaction_read_only = on')
        text = conninfo(NOBODY, strict.port, target_session_attrs="read-write")
        pool = w.pool(text, max_size=4, timeout=60, name="read-only")
        waiting = [w.spawn(w.borrow(pool, "select 1")) for _ in range(6)]
        await w.until(lambda: pool.stats().open_failures >= 3, "it was tried again")
        assert not any(each.done for each in waiting), pool
        strict.execute('alter role "scram-sha-256" reset default_transaction_read_only')
        await served(pool, waiting)

    Stage(name).play(play)


@pytest.mark.parametrize("name", ["threads-psycopg", "threads-psycopg2", "asyncio-asyncpg"])
def test_who_waits_for_a_promotion_is_served_after_it_also_with_a_password(name):
    needed(name)
    hba = ("local all postgres trust", "host replication all 127.0.0.1/32 trust")

    async def play(w):
        old = w.fresh_server(hba=(*hba, "host all all 127.0.0.1/32 scram-sha-256"))
        old.execute(f"create role app login password '{PASSWORD}'")
        new = w.owns(await w.aside(old.standby))
        text = conninfo(old.port, new.port, user="app", target_session_attrs="primary")
        pool = w.pool(text, max_size=4, timeout=60, name="hosts")
        assert (await w.borrow(pool, "select 1")).good
        await w.aside(old.stop)
        waiting = [w.spawn(w.borrow(pool, "select 1")) for _ in range(6)]
        await w.until(lambda: pool.stats().open_failures >= 3, "it was tried again")
        assert not any(each.done for each in waiting), pool
        await w.aside(new.promote)
        await served(pool, waiting)

    Stage(name).play(play)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_wrong_password_at_two_hosts_is_told_at_once_to_everybody(name, strict, standby):
    needed(name)

    async def play(w):
        text = conninfo(
            standby.port, strict.port, password="wrong", target_session_attrs="read-write"
        )
        pool = w.pool(text, timeout=60, name="wrong")
        waiting = [w.spawn(w.borrow(pool, "select 1")) for _ in range(3)]
        for each in waiting:
            await each.join()
            error = each.result.error
            assert isinstance(error, ServerUnavailable)
            assert (error.sqlstate, error.heals) == ("28P01", False)
            assert each.result.took < 30

    Stage(name).play(play)


def needed(name):
    for each in COMBINATIONS[name].needs:
        pytest.importorskip(each)


async def served(pool, waiting):
    refused = pool.stats().refused
    for each in waiting:
        await each.join()
        assert each.result.error is None
    assert pool.stats().refused == refused
