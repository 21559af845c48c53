"""`Pace`: how much of one core's time copies of KV take while requests decode beside them.

Owns the time from which the next part may be copied, one for all moves that leave an engine. What a part costs is
processor time, so that a slow machine copies slowly and the share stays what it is. A frozen request does not come
here: its client waits. Called by exporter.py.
"""

from __future__ import annotations

import asyncio
import time

ALLOWANCE_S = 0.1
"""Time that an idle pace saves up: a short request's blocks go at once."""


class Pace:
    """`share` of a core, from above 0 to 1. One event loop."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._free_s = 0.0
        self._turns = asyncio.Lock()

    async def turn(self) -> None:
        """Returns when a part may be copied; who came first goes first."""
        async with self._turns:
            while (wait_s := self._free_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)

    def took(self, busy_s: float) -> None:
        """So much processor time goes into a part."""
        self._free_s = max(self._free_s, time.monotonic() - ALLOWANCE_S) + busy_s / self._share
