"""Opening connections for an asyncio pool: `_pool/opener.py`'s sister, with awaits.

One job: make a `Recipe` (calling the user's callables, which may be coroutine functions), have the
driver open it, run `configure`, and find out why it failed if it did.

It must not know: slots, waiters, when to open and how many. No lock: all of it runs on one loop.
"""

from __future__ import annotations

import asyncio
from copy import copy
from dataclasses import replace
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from penstock._machine.progress import CONNECT_SECONDS, Progress
from penstock._pool.opener import (
    DIAGNOSE_SECONDS,
    DRIVER_GRACE,
    Failure,
    NotReturned,
    NotWanted,
    Opener,
    callable_named,
    configure_raised,
    go_on,
    park_new,
    recipe_raised,
    refuse_unfinished,
    undiagnosed,
)
from penstock._process.clock import clock
from penstock.config.secret import Hidden

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.config.pool_config import PoolConfig
    from penstock.drivers import Diagnosis, Recipe, StatementLimit


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

    async def open(
        self,
        seconds: float = CONNECT_SECONDS,
        *,
        if_changed: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Open and configure a link. It comes back parked, idle and remembered as it is.

        Cancelled, it leaves nothing open. `progress` is told of each part, as in `Opener.open`.

        Raises:
            SameAgain: `if_changed`, and it would be made with what the last attempt was made with.
            NotWanted: what `progress` waits for was given up meanwhile.
            Exception: the driver's, or what a callable of the user raised. Nothing is left open.
        """
        began = clock()
        deadline = began + seconds
        progress = progress or Progress(began, seconds)
        go_on(progress, None, seconds)
        recipe = await self._recipe_within(seconds, progress)
        recipe = self._opener.begin(recipe, if_changed=if_changed)
        left = max(0.0, deadline - clock())
        go_on(progress, None, left + DRIVER_GRACE)
        link = await self._connected(recipe, left, progress)
        self._opener.let_in()
        try:
            left = max(DIAGNOSE_SECONDS, deadline - clock())
            go_on(progress, self._opener.configuring(), left)
            await self._configure_within(link, left)
        except NotWanted:
            await link.close()
            raise
        except BaseException:
            link.discard()
            raise
        progress.doing = None
        return link

    async def _connected(self, recipe: Recipe, seconds: float, progress: Progress) -> Any:
        try:
            return await self._driver.open(_naming_password(recipe, progress), seconds)
        except TimeoutError:
            if progress.doing is None:
                raise
            raise NotReturned(progress.doing, clock() - progress.since) from None

    async def explain(self, error: BaseException) -> Failure:
        """Find out why `open` raised `error`; may make one more attempt, which diagnoses."""
        failure = self._opener.known(error) or self._opener.asked_already(error)
        if failure is not None:
            return failure
        with self._opener.asking(error):
            return self._opener.remember(error, await self._diagnosis(error))

    def explain_at_once(self, error: BaseException) -> Failure:
        """What is known without asking anybody: for a moment in which nothing can be awaited."""
        return self._opener.explain_at_once(error)

    async def _diagnosis(self, error: BaseException) -> Diagnosis:
        try:
            # What was refused is diagnosed: a callable may say something else by now.
            recipe = self._opener.tried() or await self._recipe_within(
                DIAGNOSE_SECONDS, Progress(clock(), DIAGNOSE_SECONDS)
            )
            diagnosis: Diagnosis = await self._driver.diagnose(error, recipe, DIAGNOSE_SECONDS)
        except Exception:  # noqa: BLE001  a diagnosis that fails must not hide the failure
            diagnosis = undiagnosed(error)
        return diagnosis

    async def _recipe(self, progress: Progress) -> Recipe:
        config, given = self._config, {}
        for name in ("conninfo", "kwargs"):
            value = Hidden(getattr(config, name))
            if callable(value.value):
                progress.doing = callable_named(name, value.value)
                value = Hidden(await called(value.value))
            given[name] = value
        return self._opener.recipe_of(given["conninfo"], given["kwargs"])

    async def _recipe_within(self, seconds: float, progress: Progress) -> Recipe:
        """The recipe; a token service that never answers must not keep a connection opening for ever."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await self._called_recipe(progress)
        except TimeoutError:
            if not limit.expired():
                raise
            raise NotReturned(progress.doing, seconds) from None

    async def _called_recipe(self, progress: Progress) -> Recipe:
        """The recipe; what a callable of the user raises is told from a server that is down."""
        try:
            return await self._recipe(progress)
        except Exception as error:
            raise recipe_raised(progress) from error

    async def _configure_within(self, link: Any, seconds: float) -> None:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                await self._configure(link)
        except TimeoutError:
            if not limit.expired():
                raise
            raise NotReturned(self._opener.configuring(), seconds) from None

    async def _configure(self, link: Any) -> None:
        configure = self._config.configure
        if configure is not None:
            await _call_configure(configure, link.conn)
            refuse_unfinished(configure, link)
        await link.prepare()
        park_new(link)


def _naming_password(recipe: Recipe, progress: Progress) -> Recipe:
    """The same; where the password is a callable (asyncpg's), `progress` says when that is running."""
    password: Hidden[Any] = Hidden(recipe.kwargs.get("password"))
    if not callable(password.value):
        return recipe

    async def named() -> Any:
        progress.since, progress.doing = clock(), callable_named("password", password.value)
        try:
            found = Hidden(await called(password.value))
        except Exception as error:
            raise recipe_raised(progress) from error
        progress.doing = None
        return found.value

    return replace(recipe, kwargs={**recipe.kwargs, "password": named})


async def called(call: Callable[..., Any], *args: Any) -> Any:
    """What a callable of the user gives, be it a function or a coroutine function."""
    answer = call(*args)
    return await answer if isawaitable(answer) else answer


async def _call_configure(configure: Callable[[Any], object], conn: Any) -> None:
    try:
        await called(configure, conn)
    except Exception as error:
        raise configure_raised(configure) from error
