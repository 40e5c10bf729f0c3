"""The load: clients that ask the bank, check each answer against the question, and never ask twice.

Each client is a thread with one keep-alive connection and a seeded generator of its own. http.client
instead of httpx: it costs 33 us of processor time per request, httpx 216 (measured against a server
that does nothing), and the two cores are the bank's and the database's, too. It also never sends
anything twice by itself.

It must not know which pool is behind the bank, what is done to it, or what may fail.
"""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from http.client import HTTPConnection, HTTPException
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from demo.ledger import Ledger, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from demo.bank_tables import Bank

TRANSFERS = 0.3  # the rest reads balances
# A client comes back over a new connection now and then: connections spread over the workers, also
# over one that has just been started.
HANG_UPS = 1 / 30
# Longer than the pool's patience: what the service has to say about it arrives in time.
PATIENCE = 8.0


class Outcome(Enum):
    """How one request ended."""

    SERVED = "served"
    WRONG = "wrong"  # an answer, but not to the question
    FAILED = "failed"  # the service answered with an error, or not within the client's patience
    CUT = "cut"  # the connection ended without an answer: whoever served it died


@dataclass(frozen=True, slots=True)
class Trouble:
    """One request that was not served.

    Attributes:
        outcome: how it ended.
        status: the HTTP status; None if there was no answer.
        text: what the service said.
        worker: the pid that answered this client before; None on a new connection.
        backend: the pid of the server process whose connection the request had.
        lent_at: when it got that (`time.monotonic`).
        at: when it ended.
    """

    outcome: Outcome
    status: int | None
    text: str
    worker: int | None
    backend: int | None = None
    lent_at: float | None = None
    at: float = 0.0


@dataclass(slots=True)
class Tally:
    """What came of all requests of one load."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    troubles: list[Trouble] = field(default_factory=list)
    served_at: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in another client's tally."""
        self.counts.update(other.counts)
        self.troubles.extend(other.troubles)
        self.served_at.extend(other.served_at)

    def longest_silence(self, begun: float, ended: float) -> float:
        """Seconds of the longest time in which no client at all was served."""
        moments = [begun, *sorted(self.served_at), ended]
        return max(later - earlier for earlier, later in pairwise(moments))


class Gate:
    """Lets clients through one request at a time, or holds them between two requests."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._closed = False
        self._inside = 0

    def enter(self) -> bool:
        """Wait while held; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._held)
            if not self._closed:
                self._inside += 1
            return not self._closed

    def leave(self) -> None:
        """The request is over."""
        with self._changed:
            self._inside -= 1

    def hold(self) -> None:
        """Let nobody in; who is inside finishes what they asked."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        """Let them in again."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def inside(self) -> int:
        """How many requests are under way."""
        return self._inside


class Load:
    """Clients at work from entry to exit of the `with` block."""

    def __init__(self, port: int, bank: Bank, ledger: Ledger, *, clients: int, seed: str) -> None:
        self.gate = Gate()
        self._clients = [
            Client(f"{seed}/{number}", port, bank, ledger, self.gate) for number in range(clients)
        ]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error nobody waits for their answers; the threads are daemons.
        self.gate.close()

    def tally(self) -> Tally:
        """All that happened so far."""
        total = Tally()
        for client in self._clients:
            total.add(client.tally)
        return total

    def clients_of(self, worker: int) -> int:
        """How many clients are connected to that worker, or not yet known to be to another."""
        return sum(client.worker in (worker, None) for client in self._clients)

    def in_use_of(self, workers: list[int]) -> list[int]:
        """Those workers which a client is connected to."""
        connected = {client.worker for client in self._clients}
        return [worker for worker in workers if worker in connected]

    def finish(self, wait: Callable[[float], None]) -> None:
        """Let the clients finish what they asked, and go; `wait` may raise to give up."""
        self.gate.close()
        while any(client.is_alive() for client in self._clients):
            wait(0.005)


class Client(threading.Thread):
    """One customer: asks, waits for the answer, looks at it, asks the next thing."""

    def __init__(self, seed: str, port: int, bank: Bank, ledger: Ledger, gate: Gate) -> None:
        super().__init__(name=f"client {seed}", daemon=True)
        self.tally = Tally()
        self.worker: int | None = None
        self._random = random.Random(seed)
        self._http = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self._bank = bank
        self._ledger = ledger
        self._gate = gate

    def run(self) -> None:
        """Ask until the gate closes."""
        while self._gate.enter():
            try:
                self._ask_something()
            finally:
                self._gate.leave()
            if self._random.random() < HANG_UPS:
                self._hang_up()
        self._hang_up()

    def _ask_something(self) -> None:
        if self._random.random() < TRANSFERS:
            self._transfer()
        else:
            self._read_balance()

    def _read_balance(self) -> None:
        aid, nonce = self._random.randint(1, self._bank.accounts), self._new_id()
        self._ask("GET", f"/balance/{aid}?nonce={nonce}", None, {"nonce": nonce, "aid": aid})

    def _transfer(self) -> None:
        transfer = Transfer(
            self._new_id(),
            self._random.randint(1, self._bank.accounts),
            self._random.randint(1, self._bank.tellers),
            self._random.randint(1, self._bank.branches),
            self._random.randint(-5000, 5000),
        )
        nonce = self._new_id()
        self._ledger.ask(transfer)
        self._ask(
            "POST",
            "/transfer",
            {**transfer._asdict(), "nonce": nonce},
            {"nonce": nonce, "id": transfer.id},
            # Whatever the answer says: a 200 means that the service believes it was done.
            answered=lambda: self._ledger.acknowledge(transfer),
        )

    def _new_id(self) -> str:
        # 128 bits in 22 characters without '/' or '+': pgbench_history's filler has 22.
        raw = self._random.getrandbits(128).to_bytes(16, "big")
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        expected: dict[str, Any],
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """One question, sent once: what is cut or fails is never sent again."""
        text = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            self._http.request(method, path, text, headers)
            answer = self._http.getresponse()
            content = answer.read()
        except TimeoutError:
            self._note_no_answer(Outcome.FAILED, f"no answer within {PATIENCE:g} s")
            return
        except (OSError, HTTPException) as error:
            self._note_no_answer(Outcome.CUT, repr(error))
            return
        self.worker = int(answer.headers["X-Worker"] or 0)
        if answer.status != 200:
            self._note_error(answer.status, content)
            return
        answered()
        self._compare(json.loads(content), expected)

    def _note_no_answer(self, outcome: Outcome, text: str) -> None:
        self.tally.counts[outcome] += 1
        self.tally.troubles.append(Trouble(outcome, None, text, self.worker, at=time.monotonic()))
        self._hang_up()

    def _note_error(self, status: int, content: bytes) -> None:
        try:
            said: dict[str, Any] = json.loads(content)
        except ValueError:  # gunicorn's own error page
            said = {"error": "HTTP", "text": content.decode(errors="replace")}
        self.tally.counts[Outcome.FAILED] += 1
        self.tally.troubles.append(
            Trouble(
                Outcome.FAILED,
                status,
                f"{said.get('error')}: {said.get('text')}",
                self.worker,
                said.get("backend"),
                said.get("lent_at"),
                time.monotonic(),
            )
        )

    def _compare(self, answer: dict[str, Any], expected: dict[str, Any]) -> None:
        if answer.items() >= expected.items():
            self.tally.counts[Outcome.SERVED] += 1
            self.tally.served_at.append(time.monotonic())
            return
        self.tally.counts[Outcome.WRONG] += 1
        text = f"asked for {expected}, answered {answer}"
        self.tally.troubles.append(
            Trouble(Outcome.WRONG, 200, text, self.worker, at=time.monotonic())
        )

    def _hang_up(self) -> None:
        self._http.close()  # the next request connects again
        self.worker = None
