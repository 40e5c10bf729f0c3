"""The figures that errors carry: counts, and who has the connections.

It must not know: errors, pools. No lock: values do not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a pool's slots were doing, and how many borrowers were queued.

    Attributes:
        opening: connections being opened.
        idle: connections ready to be lent.
        in_use: connections lent.
        pinging: connections being asked whether they live.
        closing: connections being closed.
        max_size: how many the pool may have in all.
        waiting: borrowers in the queue, the one that gets this error not among them.
    """

    opening: int = 0
    idle: int = 0
    in_use: int = 0
    pinging: int = 0
    closing: int = 0
    max_size: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who has a connection, and where that thread stood when the error was raised.

    Attributes:
        seconds: how long it has had the connection.
        thread: the thread's, task's or greenlet's name.
        kind: which of the three it is.
        file: path of the source file it was in, or None if it is not running any more.
        line: line number in that file.
        function: the function's qualified name.
        activity: what the session was doing ("idle in transaction", ...), or None if unknown.
        query: the last statement, if the runtime knows it. Statements can hold secrets, so it is
            in no text and no repr: look at the attribute.
    """

    seconds: float
    thread: str
    file: str | None = None
    line: int | None = None
    function: str | None = None
    activity: str | None = None
    query: str | None = field(default=None, repr=False)
    kind: str = "thread"

    def __str__(self) -> str:
        place = (
            "not running any more" if self.file is None else f"at {short(self.file)}:{self.line}"
        )
        text = f'{self.seconds:.1f} s in {self.kind} "{self.thread}" {place}'
        return f"{text}, {self.activity}" if self.activity else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One lease as `holder_report` wants it: everything about a `Holder` but where it stands.

    Attributes:
        ident: the thread's ident (`threading.get_ident()`), or another key of `frames`.
        seconds: how long it has had the connection.
        thread: the thread's name, if whoever lends knows it; else it is looked up.
        kind: "thread", "task" or "greenlet".
        activity: what the session was doing, or None.
        query: the last statement, or None.
    """

    ident: int
    seconds: float
    thread: str | None = None
    activity: str | None = None
    query: str | None = field(default=None, repr=False)
    kind: str = "thread"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnHold:
    """A connection that the borrower itself held when it got no other.

    Attributes:
        seconds: how long it had had it.
        kind: what the borrower is: "thread", "task" or "greenlet".
        file: path of the source file that `line` is in; None: where it was borrowed is not known.
        line: where it was borrowed; else where a function stands that has it in a variable.
        function: that function's qualified name; None: `line` is where it was borrowed.
        by_getconn: it was borrowed by getconn(), so that another one may give it back.
    """

    seconds: float
    kind: str = "thread"
    file: str | None = None
    line: int | None = None
    function: str | None = None
    by_getconn: bool = False

    def __str__(self) -> str:
        text = f"since {self.seconds:.1f} s, "
        if self.file is None:
            door = "by getconn() " if self.by_getconn else ""
            return f"{text}borrowed {door}at a place that was not noted"
        place = f"{short(self.file)}:{self.line}"
        if self.function is None:
            return f"{text}borrowed at {place}"
        owner = "the module" if self.function == "<module>" else f"{self.function}()"
        return f"{text}in a variable of {owner} at {place}"


def written(counts: Counts) -> str:
    """The counts, as errors' texts have them."""
    parts = [f"{counts.in_use} of {counts.max_size} in use", f"{counts.waiting} waiting"]
    parts.append(f"{counts.opening or 'none'} being opened")
    parts += [f"{counts.idle} idle"] if counts.idle else []
    parts += [f"{counts.pinging} being pinged"] if counts.pinging else []
    parts += [f"{counts.closing} being closed"] if counts.closing else []
    return ", ".join(parts)


def short(path: str) -> str:
    """The last two parts: enough to find the file, and the same on every machine."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])
