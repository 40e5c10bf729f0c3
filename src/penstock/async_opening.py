"""Opening connections for an asyncio pool: `opening.py`'s sister, with awaits.

One job: make a `Recipe` (calling the user's callables, which may be coroutine functions), have the
driver open it, run `configure`, and find out why it failed if it did.

It must not know: slots, waiters, when to open and how many. No lock: all of it runs on one loop.
"""

from __future__ import annotations

import asyncio
from copy import copy
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from penstock.clock import clock
from penstock.opening import (
    CONNECT_SECONDS,
    DIAGNOSE_SECONDS,
    ConfigureError,
    Failure,
    Opener,
    RecipeError,
    configure_raised,
    park_new,
    refuse_unfinished,
    undiagnosed,
)
from penstock.secret import Hidden

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock._drivers.protocol import Diagnosis, Recipe, StatementLimit
    from penstock.config import PoolConfig


class AsyncOpener:
    """Opens the connections of one pool, on the loop that runs."""

    def __init__(
        self,
        config: PoolConfig,
        driver: Any,
        pool_name: str,
        limit: StatementLimit | None = None,
    ) -> None:
        self._config = config
        self._driver = driver
        self._opener = Opener(config, driver, pool_name, limit)

    def without_limit(self) -> AsyncOpener:
        """One for connections of which no statement is given up (`dedicated()`)."""
        found = copy(self)
        found._opener = self._opener.without_limit()
        return found

    @property
    def where(self) -> str | None:
        """Which server the last connect was for, without secrets; None: not known."""
        return self._opener.where

    def may_change(self) -> bool:
        """Whether the next attempt may be made with something else than the last one was."""
        return self._opener.may_change()

    async def open(self, seconds: float = CONNECT_SECONDS, *, if_changed: bool = False) -> Any:
        """Open and configure a link. It comes back parked, idle and remembered as it is.

        Cancelled, it leaves nothing open.

        Raises:
            SameAgain: `if_changed`, and it would be made with what the last attempt was made with.
            Exception: the driver's, or what a callable of the user raised. Nothing is left open.
        """
        deadline = clock() + seconds
        recipe = self._opener.begin(await self._recipe_within(seconds), if_changed=if_changed)
        link = await self._driver.open(recipe, max(0.0, deadline - clock()))
        self._opener.let_in()
        try:
            await self._configure_within(link, max(DIAGNOSE_SECONDS, deadline - clock()))
        except BaseException:
            link.discard()
            raise
        return link

    async def explain(self, error: BaseException) -> Failure:
        """Find out why `open` raised `error`; may make one more attempt, which diagnoses."""
        failure = self._opener.known(error) or self._opener.asked_already(error)
        if failure is not None:
            return failure
        with self._opener.asking(error):
            return self._opener.remember(error, await self._diagnosis(error))

    def explain_at_once(self, error: BaseException) -> Failure:
        """What is known without asking anybody: for a moment in which nothing can be awaited."""
        return self._opener.known(error) or self._opener.remember(error, undiagnosed(error))

    async def _diagnosis(self, error: BaseException) -> Diagnosis:
        try:
            # What was refused is diagnosed: a callable may say something else by now.
            recipe = self._opener.tried() or await self._recipe_within(DIAGNOSE_SECONDS)
            diagnosis: Diagnosis = await self._driver.diagnose(error, recipe, DIAGNOSE_SECONDS)
        except Exception:  # noqa: BLE001  a diagnosis that fails must not hide the failure
            diagnosis = undiagnosed(error)
        return diagnosis

    async def _recipe(self) -> Recipe:
        config = self._config
        return self._opener.recipe_of(
            Hidden(await called(config.conninfo) if callable(config.conninfo) else config.conninfo),
            Hidden(await called(config.kwargs) if callable(config.kwargs) else config.kwargs),
        )

    async def _recipe_within(self, seconds: float) -> Recipe:
        """The recipe; a token service that never answers must not keep a connection opening for ever."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await self._called_recipe()
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError("conninfo= or kwargs= took longer than a connect may") from None

    async def _called_recipe(self) -> Recipe:
        """The recipe; a bug in a callable of the user is told from a server that is down."""
        try:
            return await self._recipe()
        except OSError:
            raise  # a token service that is down, say: it may be up later
        except Exception as error:
            raise RecipeError("conninfo= or kwargs= raised") from error

    async def _configure_within(self, link: Any, seconds: float) -> None:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                await self._configure(link)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ConfigureError("configure= took longer than a connect may") from None

    async def _configure(self, link: Any) -> None:
        configure = self._config.configure
        if configure is not None:
            await _call_configure(configure, link.conn)
            refuse_unfinished(configure, link)
        await link.prepare()
        park_new(link)


async def called(call: Callable[..., Any], *args: Any) -> Any:
    """What a callable of the user gives, be it a function or a coroutine function."""
    answer = call(*args)
    return await answer if isawaitable(answer) else answer


async def _call_configure(configure: Callable[[Any], object], conn: Any) -> None:
    try:
        await called(configure, conn)
    except Exception as error:
        raise configure_raised(configure) from error
