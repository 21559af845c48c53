"""What a link queues: frames to write, frames that were read, how payloads travel, and how fast they did.

Owns these records alone; their order and limits are links.py's, its only caller.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from kvlite.fleet.wire import HEADER_BYTES, Channel, Inner

RATED_BYTES = 1 << 15
"""Shorter payloads say nothing about the link's speed."""
RATE_MEMORY = 0.8


class Payloads(Protocol):
    """How payloads travel: `tcp.InlinePayloads`, `shared_memory.SharedPayloads`."""

    cost: ClassVar[float]
    """Processor time from memory to memory, in times of what the digests of a payload take."""

    async def put(self, offset: int, pieces: Sequence[memoryview]) -> Sequence[memoryview]:
        """Takes a payload over; returns what must follow its frame in the stream."""
        ...

    async def get(self, offset: int, num_bytes: int) -> memoryview:
        """The payload of the frame that was read last; valid until `done`."""
        ...

    def done(self, payload: memoryview) -> None:
        """Nobody reads it any more."""
        ...


class Signal:
    """Wakes whoever waits for one kind of change; each looks again by itself."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something changed."""
        for changed in self._waiting:
            if not changed.done():
                changed.set_result(None)

    async def wait(self) -> None:
        """Until the next `notify`."""
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(changed)
        try:
            await changed
        finally:
            self._waiting.discard(changed)


@dataclass(eq=False)
class Outgoing:
    """A frame to write."""

    channel: Channel | Inner
    frame: bytes
    pieces: Sequence[memoryview] = ()
    payload_len: int = 0
    gone: asyncio.Future[None] | None = None
    """Set once the payload's memory is the caller's again."""

    @property
    def size(self) -> int:
        """What it takes of the outbox."""
        return HEADER_BYTES + len(self.frame)


@dataclass(eq=False)
class Received:
    """A frame that was read."""

    channel: Channel | Inner
    frame: bytes
    payload: memoryview | None = None
    released: bool = False

    @property
    def size(self) -> int:
        """What it takes of the inbox."""
        return HEADER_BYTES + len(self.frame)


@dataclass
class Rate:
    """Bytes per second, younger payloads count more."""

    num_bytes: float = 0.0
    seconds: float = 0.0
    last_s: float = 0.0
    starts: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])
    """When each payload that is not used up was begun, and its bytes."""

    @property
    def bytes_per_s(self) -> float:
        """0.0: not measured."""
        return self.num_bytes / self.seconds if self.seconds > 0 else 0.0

    def released(self, now_s: float) -> None:
        """The oldest payload was used up."""
        start_s, num_bytes = self.starts.popleft()
        if num_bytes >= RATED_BYTES:
            self.num_bytes = self.num_bytes * RATE_MEMORY + num_bytes
            self.seconds = self.seconds * RATE_MEMORY + now_s - max(start_s, self.last_s)
        self.last_s = now_s
