"""A response body that keeps its request's connection until it has been sent.

One job: `Streamed`, the iterable behind `db.stream()`.

It must not know: pools, transactions; it tells the `Loans` that it has ended. It takes no lock: a
body is iterated by one thread.

However a body ends, the connection comes back: read to its end, by its own exception, by `close()`
(a WSGI server calls it when the client has gone, too, and when nothing was read), and, if it is
merely dropped, by the pool's own net (see loans.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from contextlib import AbstractContextManager

    from penstock.integrations._unit.loans import Loan, Loans


class Streamed:
    """Chunks of a body, in the context of the request that answers with it.

    Args:
        body: gives the chunks.
        contexts: the app's and the request's, to be in while the body runs.
        loans: the request's.
        key: the database whose connection is kept.
        loan: that connection's.
    """

    def __init__(
        self,
        body: Iterable[Any],
        contexts: Sequence[AbstractContextManager[Any]],
        loans: Loans,
        key: str,
        loan: Loan,
    ) -> None:
        self._body = body
        self._chunks = _inside(contexts, body)
        self._loans = loans
        self._key = key
        self._loan: Loan | None = loan
        loan.keep_for(self)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._chunks)
        except StopIteration:
            self.close()
            raise
        except BaseException as error:
            self._end(error)
            raise

    def close(self) -> None:
        """End it, wherever it is. Does nothing the second time."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        loan, self._loan = self._loan, None
        if loan is None:
            return
        try:
            self._chunks.close()
            close = getattr(self._body, "close", None)
            if close is not None:  # of one that never began, nobody else does
                close()
        finally:
            self._loans.end_stream(self._key, loan, self, error)


def _inside(
    contexts: Sequence[AbstractContextManager[Any]], body: Iterable[Any]
) -> Generator[Any, None, None]:
    """The chunks, made in the contexts, which are entered at the first one.

    As Flask's `stream_with_context` does since 3.1.2. Before, it entered them at once, so that the
    request went on, and with it everything that it held, until the stream's end.
    """
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield from body
