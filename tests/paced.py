"""`Paced`: an AsyncEngine that computes plans only when a test says so, so that no test races the engine thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import TypeVar

from kvlite import AsyncEngine

TIMEOUT_S = 60.0

T = TypeVar("T")


class Paced:
    """From now on `served` stops before each plan that has work, until `step`, `until` or `open`.

    What is awaited here must leave something to compute: a plan that never comes fails the test after TIMEOUT_S.
    """

    def __init__(self, served: AsyncEngine) -> None:
        self._arrived = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)
        self._stopped = False
        self._open = False
        self._engine = served._engine
        self._run_plan = served._engine.run_plan
        served._engine.run_plan = self._wait_and_run  # type: ignore[method-assign]

    def _wait_and_run(self) -> None:
        if not self._engine.is_idle and not self._open:
            self._arrived.release()
            assert self._allowed.acquire(timeout=TIMEOUT_S), "the test never let the engine go on"
        self._run_plan()

    async def arrived(self) -> None:
        """Returns when a plan is ready to be computed; everything before it is committed and delivered."""
        if not self._stopped:
            assert await asyncio.to_thread(self._arrived.acquire, timeout=TIMEOUT_S), "no plan was made"
            self._stopped = True
        await asyncio.sleep(0)

    async def step(self) -> None:
        """Lets the plan at hand be computed; returns when the next one is ready."""
        await self.arrived()
        self._stopped = False
        self._allowed.release()
        await self.arrived()

    async def until(self, wanted: Awaitable[T]) -> T:
        """Steps until `wanted` is there."""
        task = asyncio.ensure_future(wanted)
        await self.arrived()
        while not task.done():
            await self.step()
        return await task

    async def drive(self, wanted: Awaitable[T]) -> T:
        """As `until`, but what is awaited may end all work: it is waited for without a plan, too."""
        task = asyncio.ensure_future(wanted)
        while not task.done():
            self._stopped = self._stopped or self._arrived.acquire(blocking=False)
            if self._stopped:
                self._stopped = False
                self._allowed.release()
            await asyncio.sleep(0)
        return await task

    def open(self) -> None:
        """Lets the engine run freely again."""
        self._open = True
        self._allowed.release()
