"""What each guard of the hot path costs: a borrow and return with it, and with it taken out.

    python bench/guards.py [--json FILE] [--rounds N]

Each guard is taken out of the code that runs (the functions are parsed, the lines of that guard left out, and
the rest compiled in their place), so what is measured is the path itself and no model of it. Rounds are
interleaved; a cost is the difference between the best tenth of all rounds of the whole path and of the path
without that guard, in CPU time of the borrowing thread (a minimum is one lucky round, where differences are
a few nanoseconds); beside it stands the middle half of the differences within a round. The instructions that are saved are counted, too: they depend on the
interpreter alone. A guard whose lines are not found is an error: then this file is out of date.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import statistics
import textwrap
import time
from collections import deque
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_hot_path import instructions as async_instructions
from hot_path import instructions
from report import environment, heading, options, save, table

from penstock import AsyncConnectionPool, ConfigError, ConnectionPool
from penstock._drivers.asyncpg.link import AsyncpgLink
from penstock._drivers.psycopg3.link import PgconnLink
from penstock._machine.machine import Machine
from penstock._pool.aio.lease import AsyncLease
from penstock._pool.sync.lease import ClassLease, PgconnLease
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BORROWS = 500  # in one round of one path: about 0.5 ms

Function = tuple[type[Any], str]


@dataclass(frozen=True)
class Guard:
    """Lines to take out.

    Attributes:
        name: for people.
        drop: statements, and operands of `and` and `or`, as `ast.unparse` writes them.
        instead: expressions, and what stands in their place.
        unguarded: take the `except BaseException:` away from round the rest.
        spellings: the lines are one thing in several functions: it is enough to find one of them.
    """

    name: str
    drop: tuple[str, ...] = ()
    instead: dict[str, str] = field(default_factory=dict)
    unguarded: bool = False
    spellings: bool = False

    def is_taken_out(self, found: set[str]) -> bool:
        """Whether what was found of it is what there should be."""
        wanted = {*self.drop, *self.instead, *([UNGUARDED] if self.unguarded else [])}
        return bool(found) if self.spellings else found == wanted


UNGUARDED = "except BaseException"


EPOCH = Guard(
    "drained, flagged dead by the watcher, condemned, suspect, closed: one comparison, twice",
    (
        *("slot.epoch == machine.epoch", "slot.epoch != machine.epoch"),
        *("slot.epoch == self.epoch", "slot.epoch != self.epoch"),
    ),
    spellings=True,
)
AGE = Guard("too old (max_lifetime)", ("now < slot.retire_at",))
IDLE_LONG = Guard(
    "idle for long (ping_after)",
    ("now - slot.borrowed_at < machine.ping_after", "now - slot.borrowed_at < self.ping_after"),
    spellings=True,
)
CLOCK = Guard(
    "the clock that these two and overdue_after read",
    ("slot.borrowed_at = now",),
    {"clock()": "0.0"},
)
WAITERS = Guard(
    "nobody is overtaken: a look for waiters before the append, and one after",
    (
        *("machine.waiters", "if machine.waiters:\n    self._pool._look_again()"),
        *("self.waiters", "if self.waiters:\n    return LOOK_AGAIN"),
    ),
    spellings=True,
)
COUNT = Guard("state and count, for stats() and errors", (
    "slot.state = IN_USE", "slot.state = IDLE", "slot.ref.borrows += 1"))  # fmt: skip
ORPHANS = Guard("interrupts: nothing is lost (except BaseException)", unguarded=True)
FORK = Guard("forked since (the page that a fork wipes)", (), {"page[0]": "True"})
HOLDER = Guard(
    "who has it, for overdue_after, PoolTimeout and self-deadlock",
    ("slot.holder = threading.get_ident()",),
)
TOUCHED = Guard(
    "settings that the borrower changed", ("link.touched", "self.touched"), spellings=True
)

#: For each driver: the functions of its path, and its guards.
PSYCOPG: list[Function] = [(PgconnLease, "__enter__"), (PgconnLease, "__exit__")]
PSYCOPG2: list[Function] = [(ClassLease, "__enter__"), (ClassLease, "__exit__")]
ON_ASYNCIO: list[Function] = [
    *((AsyncLease, "__aenter__"), (AsyncLease, "__aexit__")),
    *((Machine, "take"), (Machine, "put")),
]
ASYNC_PSYCOPG: list[Function] = [*ON_ASYNCIO, (PgconnLink, "lend"), (PgconnLink, "park")]
ASYNCPG: list[Function] = [*ON_ASYNCIO, (AsyncpgLink, "lend"), (AsyncpgLink, "park")]

OF_ALL = [EPOCH, AGE, IDLE_LONG, CLOCK, WAITERS, COUNT, ORPHANS, FORK, TOUCHED]
OF_ASYNCIO = [
    Guard("the pool's own loop and thread", ("get_ident() == pool._thread",)),
    Guard("who has it (the task), as above", ("slot.holder = holder",),
          {"current_task(pool._loop)": "pool"}),
]  # fmt: skip
GUARDS: dict[str, tuple[list[Function], list[Guard]]] = {
    "psycopg 3": (PSYCOPG, [
        Guard("dead handle while returned: put in and out",
              ("link.attributes['pgconn'] = link.handle", "link.attributes['pgconn'] = link.dead")),
        Guard("transaction status", ("handle.transaction_status",)),
        Guard("pipeline status", ("handle.pipeline_status",)),
        *OF_ALL, HOLDER,
    ]),
    "psycopg2": (PSYCOPG2, [
        Guard("dead class while returned: put on and off",
              ("link.real.__class__ = link.live", "conn.__class__ = link.dead")),
        Guard("transaction status, libpq's and psycopg2's", ("link.status()", "conn.status != 1")),
        Guard("types that were registered on it", ("link.odd_types",)),
        *OF_ALL, HOLDER,
    ]),
    "psycopg 3, asyncio": (ASYNC_PSYCOPG, [
        Guard("dead handle while returned: put in and out",
              ("self.attributes['pgconn'] = self.handle", "self.attributes['pgconn'] = DEAD")),
        Guard("transaction status", ("handle.transaction_status",)),
        Guard("pipeline status", ("handle.pipeline_status",)),
        *OF_ALL, *OF_ASYNCIO,
    ]),
    "asyncpg": (ASYNCPG, [
        Guard("dead protocol while returned: put in and out",
              ("self.real._protocol = self.lent", "conn._protocol = DEAD")),
        Guard("old statements and cursors (asyncpg's count of releases)",
              ("conn._pool_release_ctr += 1",)),
        Guard("transaction status", ("self.protocol.is_in_transaction()", "conn._top_xact is not None")),
        Guard("a statement under way (references to the protocol)",
              ("getrefcount(self.protocol) != self._references",)),
        *OF_ALL, *OF_ASYNCIO,
    ]),
}  # fmt: skip


# -- taking a guard out ---------------------------------------------------------------------------


class Without(ast.NodeTransformer):
    """A function without a guard's lines; `found` are those that it had."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.found: set[str] = set()

    def _drops(self, node: ast.AST) -> bool:
        text = ast.unparse(node)
        if text not in self.guard.drop:
            return False
        self.found.add(text)
        return True

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and self._drops(node):
            return ast.Pass()
        if isinstance(node, ast.expr) and (text := ast.unparse(node)) in self.guard.instead:
            self.found.add(text)
            return ast.parse(self.guard.instead[text], mode="eval").body
        return super().visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        left = [value for value in node.values if not self._drops(value)]
        node.values = left
        self.generic_visit(node)
        return node if len(left) > 1 else left[0]

    def visit_Try(self, node: ast.Try) -> Any:
        self.generic_visit(node)
        if self.guard.unguarded and ast.unparse(node.handlers[0].type or node) == "BaseException":
            self.found.add(UNGUARDED)
            return node.body
        return node


def without(function: Any, guard: Guard) -> tuple[Any, set[str]]:
    """The function compiled anew without the guard, and which of its lines were there."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    cut = Without(guard)
    made = ast.fix_missing_locations(cut.visit(tree))
    scope: dict[str, Any] = {}
    exec(compile(made, "<without>", "exec"), function.__globals__, scope)
    return scope[function.__name__], cut.found


@dataclass
class Path:
    """The hot path as it is, or without one guard."""

    name: str
    functions: dict[Function, Any]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        former = {place: vars(place[0])[place[1]] for place in self.functions}
        for (owner, name), function in self.functions.items():
            setattr(owner, name, function)
        try:
            yield
        finally:
            for (owner, name), function in former.items():
                setattr(owner, name, function)


WHOLE = "the whole"


def paths(functions: list[Function], guards: list[Guard]) -> list[Path]:
    """The whole path, compiled in the same way, and one without each guard.

    Raises:
        LookupError: a guard has nothing that could be taken out.
    """
    found = [Path(WHOLE, {place: _cut(place, Guard(WHOLE))[0] for place in functions})]
    for guard in guards:
        cut = {place: _cut(place, guard) for place in functions}
        if not guard.is_taken_out(set().union(*(lines for _, lines in cut.values()))):
            raise LookupError(f"{guard.name}: its lines are not in the code any more")
        found.append(Path(guard.name, {place: made for place, (made, _) in cut.items()}))
    return found


def _cut(place: Function, guard: Guard) -> tuple[Any, set[str]]:
    owner, name = place
    return without(vars(owner)[name], guard)


# -- measuring ------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A pool over one driver, and how to borrow from it."""

    borrow: Callable[[], Any]
    run: Callable[[Any], Any] | None = None  # of a loop, for asyncio

    def loop(self, times: int) -> float:
        """Nanoseconds for each borrow and return."""
        if self.run is not None:
            taken: float = self.run(_async_loop(self.borrow, times))
            return taken
        borrow = self.borrow
        began = time.thread_time_ns()
        for _ in range(times):
            with borrow():
                pass
        return (time.thread_time_ns() - began) / times

    def count(self) -> int:
        """Instructions of one borrow and return."""
        if self.run is None:
            return instructions(self._once)
        return int(self.run(_async_count(self)))

    def _once(self) -> None:
        with self.borrow():
            pass

    async def once(self) -> None:
        async with self.borrow():
            pass


async def _async_loop(borrow: Callable[[], Any], times: int) -> float:
    began = time.thread_time_ns()
    for _ in range(times):
        async with borrow():
            pass
    return (time.thread_time_ns() - began) / times


async def _async_count(subject: Any) -> int:
    return async_instructions(subject)


def floor(times: int) -> float:
    """Nanoseconds of a deque's pop and append: what no pool can do without."""
    idle = deque([object()])
    pop, append = idle.pop, idle.append
    began = time.thread_time_ns()
    for _ in range(times):
        append(pop())
    return (time.thread_time_ns() - began) / times


FLOOR = "floor: a deque's pop and append"


def measure(
    subject: Subject, found: list[Path], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    times: dict[str, list[float]] = {FLOOR: []}
    counts: dict[str, int] = {}
    for path in found:
        with path.in_place():
            subject.loop(BORROWS)
            counts[path.name] = subject.count()
        times[path.name] = []
    for number in range(rounds):
        times[FLOOR].append(floor(BORROWS))
        at = number % len(found)
        for path in found[at:] + found[:at]:  # nobody is always behind the same one
            with path.in_place():
                subject.loop(50)  # new functions: the interpreter has to learn them
                times[path.name].append(subject.loop(BORROWS))
    return times, counts


def costs(times: dict[str, list[float]], counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """For each guard what the whole costs more than the path without it."""
    whole = times[WHOLE]
    found: dict[str, dict[str, float]] = {
        FLOOR: {"ns": best_tenth(times[FLOOR])},
        WHOLE: {"ns": best_tenth(whole), "instructions": counts[WHOLE]},
    }
    for name, each in times.items():
        if name not in found:
            low, high = middle_half([a - b for a, b in zip(whole, each, strict=True)])
            found[name] = {
                "ns": best_tenth(whole) - best_tenth(each),
                "low": low,
                "high": high,
                "instructions": counts[WHOLE] - counts[name],
            }
    return found


def best_tenth(figures: list[float]) -> float:
    return sorted(figures)[len(figures) // 10]


def middle_half(figures: list[float]) -> tuple[float, float]:
    if len(figures) < 2:
        return figures[0], figures[0]
    low, _, high = statistics.quantiles(figures, n=4)
    return low, high


# -- what is off by default -----------------------------------------------------------------------

LIMITED = "the same, with statement_timeout_client"
CAREFUL = "the careful way (timeout= of one borrow, ...)"
GUARDED = "the careful way with guard=True, nobody holds the last object"
HELD = "the careful way with guard=True, somebody does"


def extras(ways: dict[str, Subject], rounds: int) -> dict[str, dict[str, float]]:
    """Whole borrows and returns by ways that somebody has to ask for."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.loop(BORROWS // 5)
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way.loop(BORROWS // 5))
    return {name: {"ns": best_tenth(each)} for name, each in times.items()}


class Holding:
    """Borrows as a program does that still has the last connection in a variable."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._last: Any = None

    def __call__(self) -> Holding:
        self._lease = self._pool.connection()
        return self

    def __enter__(self) -> None:
        self._last = self._lease.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._lease.__exit__(*exception)

    async def __aenter__(self) -> None:
        self._last = await self._lease.__aenter__()

    async def __aexit__(self, *exception: object) -> None:
        await self._lease.__aexit__(*exception)


def pools_of(make: Callable[..., Any]) -> tuple[list[Any], dict[str, Callable[[], Any]]]:
    """The pools of one driver, the plain one first, and the ways that are not the default."""
    plain, guarded = make(), make(guard=True)
    ways: dict[str, Callable[[], Any]] = {}
    pools = [plain, guarded]
    try:
        pools.append(make(statement_timeout_client=60.0))
        ways[LIMITED] = pools[-1].connection
    except ConfigError:
        pass  # not over this driver
    ways |= {CAREFUL: lambda: plain.connection(5.0), GUARDED: guarded.connection}
    if getattr(guarded._driver, "renews_in_place", False):  # else it would be a connect each time
        ways[HELD] = Holding(guarded)
    return pools, ways


# -- report ---------------------------------------------------------------------------------------


def one_driver(title: str, dsn: str, rounds: int) -> dict[str, dict[str, float]]:
    functions, guards = GUARDS[title]
    found = paths(functions, guards)
    driver = "psycopg" if title.startswith("psycopg 3") else title
    if functions in (PSYCOPG, PSYCOPG2):
        with ExitStack() as closing:
            made, ways = pools_of(
                lambda **more: closing.enter_context(ConnectionPool(dsn, driver=driver, **more))
            )
            for pool in made:
                pool.open(wait=True)
            result = costs(*measure(Subject(made[0].connection), found, rounds))
            return result | extras({name: Subject(way) for name, way in ways.items()}, rounds)
    with asyncio.Runner() as runner:
        figures: dict[str, dict[str, float]] = _on_asyncio(runner, dsn, driver, found, rounds)
        return figures


def _on_asyncio(
    runner: asyncio.Runner, dsn: str, driver: Any, found: list[Path], rounds: int
) -> Any:
    closing = AsyncExitStack()
    made, ways = pools_of(lambda **more: AsyncConnectionPool(dsn, driver=driver, **more))

    async def open_all() -> None:
        for pool in made:
            await closing.enter_async_context(pool)
            await pool.open(wait=True)

    runner.run(open_all())
    try:
        subject = Subject(made[0].connection, runner.run)
        result = costs(*measure(subject, found, rounds))
        more = {name: Subject(way, runner.run) for name, way in ways.items()}
        return {**result, **extras(more, rounds)}
    finally:
        runner.run(closing.aclose())


def print_figures(title: str, figures: dict[str, dict[str, float]]) -> None:
    whole = figures[WHOLE]["ns"]
    rows = [
        [
            name,
            f"{one['ns']:,.0f}",
            f"{one['low']:,.0f} to {one['high']:,.0f}" if "low" in one else "",
            f"{one['ns'] / whole:.0%}",
            f"{one.get('instructions', '')}",
        ]
        for name, one in figures.items()
    ]
    table([title, "ns", "middle half", "of the whole", "instructions"], rows)


def main() -> None:
    parser = options("what each guard of the hot path costs")
    parser.add_argument("--rounds", type=int, default=300)
    asked = parser.parse_args()
    around = environment()
    heading("borrow + return, no SQL: what each guard costs, ns of CPU time", around)
    figures = {}
    with Server() as server:
        for title in GUARDS:
            figures[title] = one_driver(title, server.conninfo(over="unix"), asked.rounds)
            print_figures(title, figures[title])
    save(asked.json, "guards", around, figures)


if __name__ == "__main__":
    main()
