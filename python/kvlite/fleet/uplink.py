"""`Uplink`: what a worker says to the front-end, in one order: control messages and the mover's frames.

Owns the queue. Messages that wait together go out as one frame, so a decode step of many requests costs one. Readers of
streams wait for `room`; everything else is small and rare. Called by live.py, mover.py and worker.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from kvlite.fleet.links import Link
from kvlite.fleet.messages import MESSAGES_MAX, FromWorker, encode
from kvlite.fleet.wire import Channel, OversizedError

QUEUED_MAX = 4096
"""Messages that wait; who reads a stream waits then, and its deltas become fewer and larger."""

log = logging.getLogger("kvlite.fleet")


class Uplink:
    """The sending side of the link to the front-end; `run` does the work."""

    def __init__(self, link: Link) -> None:
        self.on_oversized: Callable[[FromWorker, OversizedError], None] = _log_oversized
        """Hears of a message that no link takes; it is not sent."""
        self._link = link
        self._queue: deque[FromWorker | bytes] = deque()
        self._filled = asyncio.Event()
        self._sent = asyncio.Event()
        self._sending = False

    def post(self, message: FromWorker) -> None:
        """Queues a control message."""
        self._queue.append(message)
        self._filled.set()

    def post_frame(self, frame: bytes) -> None:
        """Queues a frame of the mover, behind everything before it."""
        self._queue.append(frame)
        self._filled.set()

    async def room(self) -> None:
        """Returns when one more message may be queued."""
        while len(self._queue) >= QUEUED_MAX:
            self._sent.clear()
            await self._sent.wait()

    async def run(self) -> None:
        """Sends until the link ends. Raises LinkError."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            self._sending = True
            while self._queue:
                await self._send_next()
                self._sent.set()
            self._sending = False
            self._sent.set()

    async def flushed(self) -> None:
        """Returns when everything is with the link; `run` must be running."""
        while self._queue or self._sending:
            self._sent.clear()
            await self._sent.wait()

    async def _send_next(self) -> None:
        first = self._queue.popleft()
        if isinstance(first, bytes):
            await self._link.send(Channel.MIGRATION, first)
            return
        batch = [first]
        while self._queue and len(batch) < MESSAGES_MAX and not isinstance(self._queue[0], bytes):
            message = self._queue.popleft()
            assert not isinstance(message, bytes)
            batch.append(message)
        try:
            await self._link.send(Channel.CONTROL, encode(batch))
        except OversizedError:
            await self._send_one_by_one(batch)

    async def _send_one_by_one(self, batch: Sequence[FromWorker]) -> None:
        for message in batch:
            try:
                await self._link.send(Channel.CONTROL, encode([message]))
            except OversizedError as error:
                self.on_oversized(message, error)


def _log_oversized(message: FromWorker, error: OversizedError) -> None:
    log.error("a message %s is too large for the link: %s", type(message).__name__, error)
