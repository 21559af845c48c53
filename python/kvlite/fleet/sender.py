"""`Sender`: the writing half of a link: its outbox, the window of payloads, and the one task that writes.

A small frame goes to the kernel at once when nothing waits, because a turn of the event loop is dear beside an engine's
thread. What the link itself says passes a payload that waits for room in the window, or two sides could wait for each
other. Called by links.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.tcp import Wire
from kvlite.fleet.traffic import Outgoing, Payloads, Rate, Signal
from kvlite.fleet.wire import (
    Channel,
    EnvelopeError,
    Inner,
    Limits,
    LinkDownError,
    LinkError,
    OversizedError,
    Payload,
    Sealer,
    Window,
    again,
)

BATCH_BYTES = 1 << 16
"""Small frames that wait together are written together, up to here."""


class Sender:
    """Everything that one side of a link sends, in order."""

    def __init__(self, wire: Wire, config: LinkConfig, limits: Limits, key: bytes, payloads: Payloads) -> None:
        self.went = Signal()
        """Something was written or used up, or the end came."""
        self.blocked = False
        """Whether a payload waits for room."""
        self.num_released = 0
        """Payloads that the receiver has used up."""
        self.wrote = False
        """Whether anything was written; reset by who looks."""
        self.rate = Rate()
        self._wire = wire
        self._config = config
        self._limits = limits
        self._sealer = Sealer(key)
        self._payloads: Payloads | None = payloads
        self._window = Window(limits.window)
        self._outbox: deque[Outgoing] = deque()
        self._outbox_bytes = 0
        self._urgent: deque[Outgoing] = deque()
        self._to_write = Signal()
        self._sending: Outgoing | None = None
        self._rest: bytes | memoryview = b""
        self._end: LinkError | None = None

    @property
    def num_waiting_bytes(self) -> int:
        """In the outbox."""
        return self._outbox_bytes

    @property
    def is_idle(self) -> bool:
        """Whether everything is written."""
        return not self._outbox and not self._urgent and self._sending is None

    @property
    def is_free(self) -> bool:
        """Whether an urgent frame goes out at once, before a payload that waits for room."""
        return self._sending is None and not self._urgent

    @property
    def num_in_window(self) -> int:
        """Payloads that are not used up."""
        return self._window.num_taken

    def check(self) -> None:
        """Raises the end of writing."""
        if self._end is not None:
            raise again(self._end)

    def outgoing(self, channel: Channel | Inner, frame: bytes, payload: Payload | None = None) -> Outgoing:
        """A frame that may be sent. Raises OversizedError, or the end."""
        self.check()
        if len(frame) > self._limits.frame:
            raise OversizedError(f"a frame has {len(frame)} bytes, must be at most {self._limits.frame}")
        if payload is None:
            return Outgoing(channel, frame)
        views = [payload] if isinstance(payload, memoryview) else payload
        pieces = [view.cast("B") for view in views]
        num_bytes = sum(map(len, pieces))
        if not 0 < num_bytes <= self._limits.payload:
            raise OversizedError(f"a payload has {num_bytes} bytes, must be between 1 and {self._limits.payload}")
        return Outgoing(channel, frame, pieces, num_bytes, asyncio.get_running_loop().create_future())

    def fits(self, outgoing: Outgoing) -> bool:
        """Whether the outbox has room; an empty one has, for anything."""
        return not self._outbox or self._outbox_bytes + outgoing.size <= self._config.outbox_bytes_limit

    def put(self, outgoing: Outgoing) -> None:
        """Takes a frame. Raises the end."""
        self.check()
        if self.is_idle and self._wire.throttle is None and not outgoing.pieces:
            self._write_now(outgoing)
            self.check()
            return
        self._outbox.append(outgoing)
        self._outbox_bytes += outgoing.size
        self._to_write.notify()

    def put_urgent(self, channel: Inner, frame: bytes = b"") -> None:
        """What the link itself says; after the end, nothing."""
        outgoing = Outgoing(channel, frame)
        if self._end is not None:
            return
        if self.is_free and self._wire.throttle is None:
            self._write_now(outgoing)
        else:
            self._urgent.append(outgoing)
            self._to_write.notify()

    def withdraw(self, outgoing: Outgoing) -> None:
        """Nobody wants it sent any more; no effect when it is being written."""
        if outgoing in self._outbox:
            self._outbox.remove(outgoing)
            self._outbox_bytes -= outgoing.size
            self._to_write.notify()

    def released(self, count: int) -> None:
        """So many more payloads were used up. Raises EnvelopeError."""
        if not 0 < count <= self._window.num_taken:
            raise EnvelopeError(f"the other side released {count} payloads of {self._window.num_taken}")
        now_s = asyncio.get_running_loop().time()
        for _ in range(count):
            self._window.release()
            self.rate.released(now_s)
        self.num_released += count
        self._to_write.notify()
        self.went.notify()

    def stop(self, error: LinkError) -> None:
        """Nothing is written any more; whoever waits for it hears `error`."""
        if self._end is None:
            self._end = error.with_traceback(None)
        for outgoing in (*self._outbox, *([self._sending] if self._sending else [])):
            if outgoing.gone is not None and not outgoing.gone.done():
                outgoing.gone.set_exception(again(error))
                outgoing.gone.exception()  # marks it as seen: its sender may be gone
        self._outbox.clear()
        self._urgent.clear()
        self._outbox_bytes = 0
        self._sending = self._payloads = None
        self.went.notify()

    async def run(self) -> None:
        """Writes until it is cancelled. Raises LinkError."""
        while True:
            buffers = await self._next()
            await self._wire.write(buffers)
            self.wrote = True
            written, self._sending = self._sending, None
            if written is not None and written.gone is not None and not written.gone.done():
                written.gone.set_result(None)
            self.went.notify()

    async def _next(self) -> Sequence[bytes | memoryview]:
        """What is written next, its payload taken over."""
        while True:
            self.blocked = False
            if self._rest:
                rest, self._rest = self._rest, b""
                return [rest]
            if self._urgent:
                return self._batch(self._urgent.popleft())
            if self._outbox and not self._outbox[0].pieces:
                return self._batch(self._pop())
            if self._outbox:
                offset = self._window.take(self._outbox[0].payload_len)
                if offset is not None:
                    return await self._with_payload(self._pop(), offset)
                self.blocked = True
            await self._to_write.wait()

    def _batch(self, first: Outgoing) -> Sequence[bytes | memoryview]:
        """`first` and small frames that follow it."""
        self._sending = first
        buffers = self._sealed(first)
        num_bytes = first.size
        while self._outbox and not self._outbox[0].pieces and num_bytes < BATCH_BYTES:
            num_bytes += self._outbox[0].size
            buffers += self._sealed(self._pop())
        return buffers

    async def _with_payload(self, first: Outgoing, offset: int) -> Sequence[bytes | memoryview]:
        assert self._payloads is not None
        self._sending = first
        self.rate.starts.append((asyncio.get_running_loop().time(), first.payload_len))
        return [*self._sealed(first), *await self._payloads.put(offset, first.pieces)]

    def _pop(self) -> Outgoing:
        outgoing = self._outbox.popleft()
        self._outbox_bytes -= outgoing.size
        return outgoing

    def _write_now(self, outgoing: Outgoing) -> None:
        self._sending = outgoing
        try:
            self._rest = self._wire.write_now(b"".join(self._sealed(outgoing)))
        except LinkDownError as error:
            self.stop(error)
            return
        self.wrote = True
        if self._rest:
            self._to_write.notify()
        else:
            self._sending = None

    def _sealed(self, outgoing: Outgoing) -> list[bytes | memoryview]:
        return [self._sealer.header(outgoing.channel, outgoing.frame, outgoing.payload_len), outgoing.frame]
