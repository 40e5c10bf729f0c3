"""The extended query protocol: Parse, Bind, Describe, Execute, Close, up to a Sync or a Flush.

One job: gather what a client sends up to a Sync, pass on what the server may have as it is, under
names of the client's own, and hand what rules transactions to the dialog.

It must not know: how transactions are ended, who waits for whom. It belongs to the dialog's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from pytest_penstock._stand_in import messages as say
from pytest_penstock._stand_in.messages import first_text
from pytest_penstock._stand_in.statements import Kind, Statement, statement

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_penstock._stand_in.messages import Message
    from pytest_penstock._stand_in.session import Answer

_SYNC: Final = say.message(b"S")
_RULES: Final = frozenset(Kind) - {Kind.OTHER, Kind.EMPTY, Kind.IN_BLOCK}


class Asker(Protocol):
    """What a batch calls of the dialog that it belongs to."""

    @property
    def transaction(self) -> object: ...

    def do(self, request: Callable[[], None], *, ends: bool = True) -> bool: ...
    def say(self, *data: bytes) -> None: ...
    def flush(self, *, ready: bool) -> None: ...
    def carry_out(self, part: Statement) -> None: ...
    def copy_in(self, answer: Answer) -> None: ...
    def swallow_sync(self) -> None: ...
    def pass_on(
        self,
        request: bytes,
        executed: list[tuple[Statement, list[bytes | None]]],
        on_copy: Callable[[Answer], None],
    ) -> None: ...


class Batch:
    """What a client has sent since its last Sync.

    Args:
        dialog: carries out what rules transactions.
        prefix: put before the names of the client's prepared statements: the session is shared.
    """

    def __init__(self, dialog: Asker, prefix: bytes) -> None:
        self._dialog = dialog
        self._prefix = prefix
        self._gathered: list[Message] = []
        self._skipping = False  # after an error, up to the next Sync
        #: By the client's names: of prepared statements, and of portals.
        self._statements: dict[bytes, Statement] = {}
        self._portals: dict[bytes, tuple[Statement, list[bytes | None]]] = {}
        #: The messages that go to the server together.
        self._run: list[bytes] = []
        self._executed: list[tuple[Statement, list[bytes | None]]] = []

    def add(self, heard: Message) -> None:
        """Take a message; at a Sync or a Flush, carry out what was gathered."""
        if self._skipping and heard.kind != b"S":
            return
        self._gathered.append(heard)
        if heard.kind in b"SH":
            self._carry_out(synced=heard.kind == b"S")

    def own_names(self, name: bytes | None) -> list[bytes]:
        """Forget a prepared statement of the client's, or all; what they are called at the server."""
        names = [each for each in self._statements if each and name in {None, each}]
        for each in names:
            del self._statements[each]
        return [self._prefix + each for each in names]

    # -- a batch ----------------------------------------------------------------------------------

    def _carry_out(self, *, synced: bool) -> None:
        gathered, self._gathered = self._gathered, []
        # A Sync alone has nothing to do, and waits for nobody.
        needed = len(gathered) > 1 or self._dialog.transaction is not None
        if not self._skipping and needed:
            done = self._dialog.do(lambda: self._take_all(gathered), ends=synced)
            self._skipping = not done
            self._run.clear()
            self._executed.clear()
        if synced:
            self._skipping = False
            self._portals.clear()
        self._dialog.flush(ready=synced)

    def _take_all(self, gathered: list[Message]) -> None:
        take = {
            b"P": self._take_parse,
            b"B": self._take_bind,
            b"D": self._take_describe,
            b"E": self._take_execute,
            b"C": self._take_close,
        }
        for heard in gathered:
            if heard.kind in take:
                take[heard.kind](heard)
        self._send_run()

    def _take_parse(self, heard: Message) -> None:
        name, rest = first_text(heard.body)
        sql, types = first_text(rest)
        parsed = self._statements[name] = statement(sql)
        if parsed.kind in _RULES:
            self._answer(say.message(b"1"))
        else:
            self._run.append(say.message(b"P", say.text(self._renamed(name), sql) + types))

    def _take_bind(self, heard: Message) -> None:
        portal, rest = first_text(heard.body)
        name, values = first_text(rest)
        bound = self._statements.get(name, Statement(b""))
        self._portals[portal] = (bound, _params(values))
        if bound.kind in _RULES:
            self._answer(say.message(b"2"))
        else:
            self._run.append(say.message(b"B", say.text(portal, self._renamed(name)) + values))

    def _take_describe(self, heard: Message) -> None:
        what, name = heard.body[:1], first_text(heard.body[1:])[0]
        if self._named(what, name).kind in _RULES:
            described = say.message(b"t", b"\0\0") if what == b"S" else b""
            self._answer(described + say.message(b"n"))
        elif what == b"S":
            self._run.append(say.message(b"D", what + say.text(self._renamed(name))))
        else:
            self._run.append(heard.raw)

    def _take_execute(self, heard: Message) -> None:
        portal = first_text(heard.body)[0]
        bound, params = self._portals.get(portal, (Statement(b""), []))
        if bound.kind in _RULES:
            self._send_run()
            self._dialog.carry_out(bound)
        else:
            self._run.append(heard.raw)
            self._executed.append((bound, params))

    def _take_close(self, heard: Message) -> None:
        what, name = heard.body[:1], first_text(heard.body[1:])[0]
        closed = self._named(what, name)
        if what == b"S":
            self._statements.pop(name, None)
        if closed.kind in _RULES:
            self._answer(say.message(b"3"))
        elif what == b"S":
            self._run.append(say.message(b"C", what + say.text(self._renamed(name))))
        else:
            self._run.append(heard.raw)

    def _named(self, what: bytes, name: bytes) -> Statement:
        if what == b"S":
            return self._statements.get(name, Statement(b""))
        return self._portals.get(name, (Statement(b""), []))[0]

    def _renamed(self, name: bytes) -> bytes:
        return self._prefix + name if name else name

    def _answer(self, data: bytes) -> None:
        """Answer in the server's place, after what it has to answer itself."""
        self._send_run()
        self._dialog.say(data)

    def _send_run(self) -> None:
        if not self._run:
            return
        run, self._run = b"".join(self._run) + _SYNC, []
        executed, self._executed = self._executed, []
        self._dialog.pass_on(run, executed, self._on_copy)

    def _on_copy(self, answer: Answer) -> None:
        self._dialog.copy_in(answer)
        # The server skips the Sync that came before the data, and wants the one after them.
        self._dialog.swallow_sync()


def _params(values: bytes) -> list[bytes | None]:
    """The parameters in what follows the names of a Bind."""
    formats = int.from_bytes(values[:2], "big")
    at = 2 + 2 * formats
    count = int.from_bytes(values[at : at + 2], "big")
    at += 2
    found: list[bytes | None] = []
    for _ in range(count):
        length = int.from_bytes(values[at : at + 4], "big", signed=True)
        at += 4
        found.append(values[at : at + length] if length >= 0 else None)
        at += max(length, 0)
    return found
