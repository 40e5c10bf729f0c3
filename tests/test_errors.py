"""Errors say why and what next, are caught under the driver's names too, and tell no secret."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import traceback
from typing import Any

import pytest

from penstock._drivers import load
from penstock._pool.reporter import holder_report
from penstock.errors import (
    ConfigError,
    ErrorSource,
    MisuseError,
    PenstockError,
    PoolClosed,
    PoolTimeout,
    ServerUnavailable,
    StatementTimeout,
    TooManyRequests,
    flavoured,
)
from penstock.errors.figures import (
    Counts,
    Hold,
    Holder,
    OwnHold,
)

FULL = Counts(in_use=10, max_size=10, waiting=4)
REPORT = Holder(
    seconds=31.24,
    thread="worker-3",
    file="/srv/shop/app/report.py",
    line=42,
    function="Report.rows",
    activity="idle in transaction",
    query="alter role app password 'hunter2'",
)


class FakeError(Exception):
    """As DB-API drivers have them."""


class FakeOperationalError(FakeError):
    pass


class FakeInterfaceError(FakeError):
    pass


class FakeDriver:
    name = "fake"
    operational_error: type[Exception] = FakeOperationalError
    interface_error: type[Exception] = FakeInterfaceError


class MessageMeta(type):
    """asyncpg's errors have a metaclass."""


class WantsMessage(Exception, metaclass=MessageMeta):
    """asyncpg's InterfaceError cannot be made without a message."""

    def __init__(self, msg: str, *, detail: str | None = None) -> None:
        self.detail = detail
        super().__init__(msg)

    def __str__(self) -> str:
        return f"{self.args[0]}, not ours"


class AwkwardDriver:
    name = "awkward"
    operational_error: type[Exception] = WantsMessage
    interface_error: type[Exception] = WantsMessage


ALL: list[tuple[type[PenstockError], dict[str, Any]]] = [
    (PoolTimeout, {"timeout": 5.0, "waited": 5.01, "counts": FULL, "holders": [REPORT]}),
    (PoolTimeout, {"counts": FULL, "own": [OwnHold(seconds=0.44)], "loop": "asyncio"}),
    (ServerUnavailable, {"attempts": 7, "down_seconds": 12.34, "sqlstate": "28P01"}),
    (StatementTimeout, {"seconds": 1.5}),
    (TooManyRequests, {"max_waiting": 4, "counts": FULL}),
    (PoolClosed, {"closed_seconds": 3.21}),
    (MisuseError, {"what": "the connection was returned twice", "where": "app/views.py:7"}),
    (ConfigError, {"key": "max_size", "given": "0", "allowed": "1 or more"}),
]


def test_a_timeout_says_who_holds_what_since_when_and_where() -> None:
    error = PoolTimeout(pool="shop", timeout=5.0, waited=5.01, counts=FULL, holders=[REPORT])
    assert str(error) == (
        "no connection within 5.0 s from pool 'shop': 10 of 10 in use, 4 waiting, "
        "none being opened.\n"
        '  held longest: 31.2 s in thread "worker-3" at app/report.py:42, idle in transaction\n'
        "  next step: end transactions before slow work that needs no database (the places are "
        "above); else raise max_size or timeout\n"
        "  help: penstock's docs/errors/pool-timeout.md"
    )
    assert error.holders[0].query is not None  # for those who look; in no text


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            [OwnHold(seconds=0.44, file="/srv/shop/app/views.py", line=123)],
            "this thread itself holds one of them, since 0.4 s, borrowed at app/views.py:123",
        ),
        (
            [OwnHold(seconds=2, kind="task", file="/srv/shop/app.py", line=7, function="Job.run")]
            * 2,
            "this task itself holds 2 of them, since 2.0 s, in a variable of Job.run() at shop/app.py:7",
        ),
        (
            [OwnHold(seconds=0.04, kind="greenlet")],
            "this greenlet itself holds one of them, since 0.0 s, borrowed at a place that was not noted",
        ),
    ],
)
def test_a_timeout_says_first_what_the_borrower_itself_holds(own: list[OwnHold], line: str) -> None:
    text = str(PoolTimeout(pool="shop", timeout=5, counts=FULL, holders=[REPORT], own=own))
    assert text.splitlines()[1] == f"  {line}"
    step = "use the connection that it has, or give it back first, or raise max_size"
    assert f"next step: {step}" in text


@pytest.mark.parametrize(
    ("loop", "step"),
    [
        (
            "asyncio",
            "use AsyncConnectionPool in `async def`, or call this pool by asyncio.to_thread()",
        ),
        ("trio", "call this pool in a thread: trio.to_thread.run_sync()"),
    ],
)
def test_a_timeout_in_an_event_loops_thread_names_the_way_out(loop: str, step: str) -> None:
    text = str(
        PoolTimeout(pool="shop", timeout=5, counts=FULL, own=[OwnHold(seconds=1)], loop=loop)
    )
    assert f"this thread runs an event loop ({loop}), which stood still" in text
    assert f"next step: {step}" in text


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (FULL, "raise max_size or timeout"),
        (Counts(in_use=1, opening=9, max_size=10), "opening takes longer"),
        (Counts(in_use=1, pinging=9, max_size=10), "answers slowly"),
    ],
)
def test_a_timeouts_next_step_depends_on_what_the_slots_did(counts: Counts, words: str) -> None:
    assert words in str(PoolTimeout(pool="shop", timeout=1, waited=1, counts=counts))


def test_a_statement_that_was_given_up_names_the_option_its_time_and_the_pool() -> None:
    text = str(StatementTimeout(pool="shop", seconds=1.5))
    assert text.startswith("no answer within 1.5 s (statement_timeout_client)")
    assert "of pool 'shop'" in text
    assert "next step: " in text
    assert "penstock's docs/errors/statement-timeout.md" in text


def test_a_timeout_of_zero_did_not_wait() -> None:
    assert str(PoolTimeout(pool="shop", counts=FULL)).startswith(
        "no connection free at once from pool 'shop': "
    )


@pytest.mark.parametrize(
    ("sqlstate", "words"),
    [
        ("28P01", "check user and password"),
        ("28000", "pg_hba.conf"),
        ("3D000", "check dbname"),
        ("53300", "max_connections"),
        ("57P03", "comes back by itself"),
        ("08006", "host and port"),
        (None, "host and port"),
        ("XX000", "look this SQLSTATE up"),
    ],
)
def test_a_server_that_is_down_gives_the_next_step_by_code(
    sqlstate: str | None, words: str
) -> None:
    error = ServerUnavailable(pool="shop", attempts=7, down_seconds=12.34, sqlstate=sqlstate)
    text = str(error)
    assert text.startswith("pool 'shop' cannot open a connection: 7 attempts, down for 12.3 s.\n")
    assert words in text
    assert (sqlstate is None) or f"(SQLSTATE {sqlstate})" in text
    assert error.sqlstate == sqlstate


def test_a_cause_without_diagnosis_is_named_and_not_quoted() -> None:
    cause = FakeOperationalError('missing "=" after "hunter2" in connection info string')
    with pytest.raises(ServerUnavailable) as caught:
        raise ServerUnavailable(pool="shop") from cause
    assert "last error: FakeOperationalError\n" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is cause
    assert "refused" in str(ServerUnavailable(pool="shop", reason="connection refused"))


def test_the_others_say_what_and_what_next() -> None:
    refused = str(TooManyRequests(pool="shop", max_waiting=4, counts=FULL))
    assert "4 are waiting already (max_waiting=4); 10 of 10 in use" in refused
    assert "pool 'shop' was closed 3.2 s ago" in str(PoolClosed(pool="shop", closed_seconds=3.2))
    assert "call open()" in str(PoolClosed(pool="shop"))
    misuse = MisuseError("returned twice", pool="shop", where="a.py:7", next_step="do not")
    assert str(misuse) == (
        "pool 'shop': returned twice, at a.py:7.\n  next step: do not\n"
        "  help: penstock's docs/errors/misuse-error.md"
    )
    assert str(ConfigError("timeout", "'5'", "a number")) == (
        "option 'timeout' must be a number, not '5'\n  help: penstock's docs/errors/config-error.md"
    )
    assert issubclass(ConfigError, ValueError)


def test_tracebacks_show_the_public_name() -> None:
    for base, arguments in ALL:
        for cls in (base, flavoured(base, FakeDriver())):
            shown = traceback.format_exception_only(cls(pool="shop", **arguments))[0]
            assert shown.startswith(f"penstock.{base.__name__}: ")


def test_no_text_and_no_repr_holds_the_statement() -> None:
    error = PoolTimeout(pool="shop", holders=[REPORT], counts=FULL)
    for text in (str(error), repr(error), repr(error.holders), repr(REPORT), str(REPORT)):
        assert "hunter2" not in text


@pytest.mark.parametrize("driver", [FakeDriver(), AwkwardDriver()], ids=["plain", "awkward"])
@pytest.mark.parametrize(("base", "arguments"), ALL)
def test_flavoured_errors_are_both(
    base: type[PenstockError], arguments: dict[str, Any], driver: ErrorSource
) -> None:
    cls = flavoured(base, driver)
    assert cls is flavoured(base, driver)
    if base is ConfigError:
        assert cls is base  # no driver has a part in it
        return
    error = cls(pool="shop", **arguments)
    second = driver.interface_error if base is MisuseError else driver.operational_error
    other = driver.operational_error if base is MisuseError else driver.interface_error
    with pytest.raises(base):
        raise error
    with pytest.raises(second):
        raise error
    assert second is other or not isinstance(error, other)
    assert str(error) == str(base(pool="shop", **arguments))


@pytest.mark.parametrize("module", ["psycopg", "psycopg2"])
def test_real_drivers_errors_catch_ours(module: str) -> None:
    real = pytest.importorskip(module)

    class Driver:
        name = module
        operational_error: type[Exception] = real.OperationalError
        interface_error: type[Exception] = real.InterfaceError

    for base, arguments in ALL[:-1]:  # all but ConfigError
        error = flavoured(base, Driver())(pool="shop", **arguments)
        expected = real.InterfaceError if base is MisuseError else real.OperationalError
        assert isinstance(error, (base, real.Error))
        assert isinstance(error, expected)
        assert error.diag.sqlstate is None  # the driver's own attributes work
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)


class OwnOSError(PoolTimeout, OSError):
    """Laid out in memory in another way than KeyError's kin."""


def test_a_driver_whose_error_cannot_be_combined_gives_the_plain_one() -> None:
    class Driver(FakeDriver):
        name = "odd"
        operational_error: type[Exception] = KeyError  # fine: builtins will do
        interface_error: type[Exception] = MisuseError  # nothing to add

    assert issubclass(flavoured(PoolTimeout, Driver()), KeyError)
    assert flavoured(MisuseError, Driver()) is MisuseError

    class Impossible(FakeDriver):
        name = "impossible"
        operational_error: type[Exception] = UnicodeDecodeError

    assert flavoured(OwnOSError, Impossible()) is OwnOSError


@pytest.mark.parametrize("flavour", [None, FakeDriver(), AwkwardDriver()])
@pytest.mark.parametrize(("base", "arguments"), ALL)
def test_errors_survive_pickling_and_copying(
    base: type[PenstockError], arguments: dict[str, Any], flavour: ErrorSource | None
) -> None:
    error = (base if flavour is None else flavoured(base, flavour))(pool="shop", **arguments)
    error.add_note("seen in worker 3")
    for again in (
        *(pickle.loads(pickle.dumps(error, protocol)) for protocol in range(2, 6)),
        copy.copy(error),
    ):
        assert isinstance(again, base)
        assert str(again) == str(error)
        assert again.__notes__ == ["seen in worker 3"]
        assert again.pool == "shop"


def every_error_class() -> list[type[PenstockError]]:
    """Ours, wherever they are defined, but for those that were made with a driver's."""
    found: list[type[PenstockError]] = [PenstockError]
    for each in found:  # it grows
        found += [
            one
            for one in each.__subclasses__()
            if one.__module__.partition(".")[0] == "penstock" and not hasattr(one, "_flavour_of")
        ]
    return list(dict.fromkeys(found))


def test_the_errors_that_are_tried_here_are_all_that_there_are() -> None:
    assert set(every_error_class()) == {PenstockError, *(base for base, _ in ALL)}


class DriversWrapper(Exception):
    """What Django's database wrapper and others put in the place of an error: `Other(*e.args)`."""


@pytest.mark.parametrize("flavour", [None, FakeDriver(), AwkwardDriver()])
@pytest.mark.parametrize(("base", "arguments"), [*ALL, (PenstockError, {})])
def test_what_copies_an_error_by_its_args_has_the_text(
    base: type[PenstockError], arguments: dict[str, Any], flavour: ErrorSource | None
) -> None:
    error = (base if flavour is None else flavoured(base, flavour))(pool="shop", **arguments)
    assert error.args == (str(error),)
    assert str(DriversWrapper(*error.args)) == str(error)
    again = type(error)(*error.args)  # as Celery does, out of JSON
    assert type(again) is type(error)
    copies = [again, copy.copy(again), copy.deepcopy(error), pickle.loads(pickle.dumps(again))]
    for one in copies:
        assert (str(one), repr(one), one.args) == (str(error), repr(error), error.args)


@pytest.mark.parametrize("module", ["psycopg", "psycopg2", "asyncpg"])
def test_args_have_the_text_with_each_drivers_own_errors(module: str) -> None:
    pytest.importorskip(module)
    driver = load(module, asynchronous=module == "asyncpg")
    for base, arguments in ALL:
        error = flavoured(base, driver)(pool="shop", **arguments)
        assert error.args == (str(error),)
        again = type(error)(*error.args)
        for one in (again, copy.deepcopy(error), pickle.loads(pickle.dumps(again))):
            assert (type(one), str(one), one.args) == (type(error), str(error), error.args)


def test_args_that_somebody_has_changed_are_the_text() -> None:
    error = PoolTimeout(pool="shop", counts=FULL)
    error.args = (f"job 7: {error.args[0]}",)
    for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(one).startswith("job 7: no connection free at once")
        assert one.counts == FULL


def test_a_figure_that_changes_afterwards_changes_args_too() -> None:
    error = PoolTimeout(pool="shop", timeout=0.0, counts=FULL)
    error.timeout = 3.0
    assert "within 3.0 s" in error.args[0]


def test_a_cause_that_stays_behind_is_named_all_the_same() -> None:
    error = ServerUnavailable(pool="shop")
    error.__cause__ = FakeOperationalError("hunter2")
    for one in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert str(one) == str(error)
        assert "last error: FakeOperationalError\n" in str(one)


def test_args_hold_no_statement() -> None:
    assert "hunter2" not in repr(PoolTimeout(holders=[REPORT], counts=FULL).args)


class OwnTimeout(PoolTimeout):
    """A user's own."""


def test_a_users_own_subclass_survives_pickling() -> None:
    # by reference, as pickle always does; importlib mode gives this module a name of its own
    sys.modules.setdefault(OwnTimeout.__module__, sys.modules[__name__])
    again = pickle.loads(pickle.dumps(OwnTimeout(pool="shop", counts=FULL)))
    assert type(again) is OwnTimeout


def test_an_error_unpickles_where_its_driver_is_missing() -> None:
    pytest.importorskip("psycopg")
    import psycopg

    class Driver:
        name = "psycopg"
        operational_error: type[Exception] = psycopg.OperationalError
        interface_error: type[Exception] = psycopg.InterfaceError

    error = flavoured(PoolTimeout, Driver())(pool="shop", timeout=5.0, counts=FULL)
    script = (
        "import pickle, sys; sys.modules['psycopg'] = None\n"
        "error = pickle.load(sys.stdin.buffer)\n"
        "print(type(error).__mro__[1].__name__, error.pool, error.counts.in_use)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(error), capture_output=True, check=False
    )
    assert (done.stdout, done.stderr) == (b"PenstockError shop 10\n", b"")


# -- where holders stand ----------------------------------------------------------------------------


def waiting_in(inside: threading.Event, go_on: threading.Event) -> None:
    inside.set()
    go_on.wait(10)


def test_the_report_finds_the_users_line_below_the_plumbing() -> None:
    inside, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=waiting_in, args=(inside, go_on), name="worker-3")
    thread.start()
    try:
        assert inside.wait(10)
        assert thread.ident is not None
        short = Hold(ident=threading.get_ident(), seconds=0.5)
        long = Hold(ident=thread.ident, seconds=31.2, activity="active", query="select 1")
        first, second = holder_report([short, long])
    finally:
        go_on.set()
        thread.join()
    assert (first.thread, first.seconds, first.activity) == ("worker-3", 31.2, "active")
    assert (first.file, first.function) == (__file__, "waiting_in")
    assert first.query == "select 1"
    assert second.file == __file__
    assert second.function == test_the_report_finds_the_users_line_below_the_plumbing.__qualname__


def test_the_report_names_the_longest_and_keeps_to_its_limit() -> None:
    holds = [Hold(ident=0, seconds=float(n), thread=f"t{n}") for n in range(10)]
    assert [holder.thread for holder in holder_report(holds, limit=2)] == ["t9", "t8"]


def test_a_thread_that_ended_is_reported_as_such() -> None:
    (holder,) = holder_report([Hold(ident=0, seconds=1.0, thread="gone")])
    assert str(holder) == '1.0 s in thread "gone" not running any more'


def test_a_holder_that_is_a_task_or_a_greenlet_is_called_so():
    (holder,) = holder_report([Hold(ident=1, seconds=1.0, thread="request-7", kind="task")])
    assert str(holder) == '1.0 s in task "request-7" not running any more'


def test_the_report_never_raises() -> None:
    assert holder_report(None) == []  # type: ignore[arg-type]
    assert holder_report([object()]) == []  # type: ignore[list-item]


def test_a_runtime_can_hand_in_its_own_frames() -> None:
    (holder,) = holder_report(
        [Hold(ident=7, seconds=1.0, thread="Task-7")], frames={7: sys._getframe()}
    )
    assert holder.file == __file__
