"""Bytes over a socket of an event loop, with no copy but the kernel's: TCP, and the stream beside a ring.

Owns the non-blocking socket, the read buffer, the throttle and payloads that follow their frame in the stream; knows no
frame. Every wait ends: writing when the peer takes nothing for `stall_s`, reading when the link cancels it. Called by
links.py.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from kvlite.fleet.wire import CutFrameError, LinkDownError, StalledPeerError

BUFFER_BYTES = 1 << 17
PIECES_PER_CALL = 64
"""Of one sendmsg; systems allow 1024."""
FAIR_BYTES = 1 << 20
"""Read at a stretch before other tasks have their turn."""
THROTTLED_PIECE_BYTES = 1 << 16
SPARE_BUFFERS = 4


class Throttle:
    """A line of so many bytes per second, for measurements: what is sent leaves when its last byte would.

    A timer that is late is made up for while more is waiting, so that the line is not slower than it says.
    """

    BACKLOG_S = 0.002
    """Who comes back so soon was waiting: the line has not been idle."""
    LATE_S_MAX = 0.1

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._left_s = 0.0

    async def take(self, num_bytes: int) -> None:
        """Returns once so many bytes have passed."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        earliest = now - self.LATE_S_MAX if now - self._left_s < self.BACKLOG_S else now
        self._free_s = max(self._free_s, earliest) + num_bytes / self._bytes_per_s
        if self._free_s > now:
            await asyncio.sleep(self._free_s - now)
        self._left_s = loop.time()


class Wire:
    """One connected stream socket. One task reads, one writes."""

    def __init__(self, sock: socket.socket, *, stall_s: float, bytes_per_s_limit: float | None = None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self.stall_s = stall_s
        self.throttle = Throttle(bytes_per_s_limit) if bytes_per_s_limit else None
        self._buffer = bytearray(BUFFER_BYTES)
        self._start = self._end = 0
        self._unfair_bytes = 0
        self.waits_for_bytes = False
        """Whether silence is the peer's."""
        self.num_received = 0
        """Bytes; grows while the peer lives."""
        self._closed = False

    async def read(self, num_bytes: int, *, inside: bool) -> bytes:
        """The next bytes. `inside` a frame, the end of the stream is CutFrameError, else LinkDownError."""
        if num_bytes > BUFFER_BYTES:
            large = bytearray(num_bytes)
            await self.read_into(memoryview(large))
            return bytes(large)
        view = memoryview(self._buffer)
        while self._end - self._start < num_bytes:
            if self._start + num_bytes > BUFFER_BYTES:
                rest = self._end - self._start
                self._buffer[:rest] = self._buffer[self._start : self._end]
                self._start, self._end = 0, rest
            self._end += await self._receive(view[self._end :], inside or self._end > self._start)
        data = bytes(view[self._start : self._start + num_bytes])
        self._start += num_bytes
        if self._start == self._end:
            self._start = self._end = 0
        return data

    async def read_exactly(self, num_bytes: int) -> bytes:
        """As `read`, but takes nothing out of the socket beyond: for a handshake, which files may follow."""
        data = bytearray(num_bytes)
        await self.read_into(memoryview(data))
        return bytes(data)

    async def read_into(self, view: memoryview) -> None:
        """Fills `view`; past the buffer, straight from the kernel. Raises CutFrameError at the end of the stream."""
        done = min(self._end - self._start, len(view))
        view[:done] = self._buffer[self._start : self._start + done]
        self._start += done
        if self._start == self._end:
            self._start = self._end = 0
        while done < len(view):
            done += await self._receive(view[done:], True)

    async def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """All of them, in order. Raises StalledPeerError, LinkDownError."""
        pending = deque(memoryview(buffer).cast("B") for buffer in buffers if len(buffer))
        while pending:
            if self.throttle is not None:
                piece = pending[0][:THROTTLED_PIECE_BYTES]
                await self.throttle.take(len(piece))
                await self._send_all(deque([piece]))
                pending[0] = pending[0][len(piece) :]
                if not len(pending[0]):
                    pending.popleft()
            else:
                await self._send_all(pending)

    def write_now(self, data: bytes) -> memoryview:
        """What the kernel takes at once; returns the rest. Raises LinkDownError."""
        try:
            return memoryview(data)[self._sock.send(data) :]
        except (BlockingIOError, InterruptedError):
            return memoryview(data)
        except OSError as error:
            raise LinkDownError(f"the link broke: {error}") from None

    async def ready_to_read(self) -> None:
        """Returns when the socket has something."""
        self.waits_for_bytes = True
        try:
            await self._ready(self._loop.add_reader, self._loop.remove_reader)
        finally:
            self.waits_for_bytes = False

    def close(self) -> None:
        """Twice is fine. Whoever waits must be cancelled first."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._sock.close()

    async def _receive(self, view: memoryview, inside: bool) -> int:
        while True:
            try:
                received = self._sock.recv_into(view)
                break
            except (BlockingIOError, InterruptedError):
                self._unfair_bytes = 0
                await self.ready_to_read()
            except OSError as error:
                raise LinkDownError(f"the link broke: {error}") from None
        if not received:
            if inside:
                raise CutFrameError("the other side left in the middle of a frame")
            raise LinkDownError("the other side left without a goodbye")
        self.num_received += received
        self._unfair_bytes += received
        if self._unfair_bytes > FAIR_BYTES:
            self._unfair_bytes = 0
            await asyncio.sleep(0)
        return received

    async def _send_all(self, pending: deque[memoryview]) -> None:
        while pending:
            try:
                sent = self._sock.sendmsg([pending[n] for n in range(min(len(pending), PIECES_PER_CALL))])
            except (BlockingIOError, InterruptedError):
                await self._writable()
                continue
            except OSError as error:
                raise LinkDownError(f"the link broke: {error}") from None
            while pending and sent >= len(pending[0]):
                sent -= len(pending.popleft())
            if sent:
                pending[0] = pending[0][sent:]

    async def _writable(self) -> None:
        try:
            async with asyncio.timeout(self.stall_s):
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
        except TimeoutError:
            raise StalledPeerError(f"the other side lives but took nothing for {self.stall_s:g} s") from None

    async def _ready(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        add(self._fd, _set, ready)
        try:
            await ready
        finally:
            if not self._closed:
                remove(self._fd)


class InlinePayloads:
    """Payloads that follow their frame in the stream. Offsets are not used: the window only counts."""

    cost: ClassVar[float] = 4.0  # the digests, and the system's copies on either side

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._spare: list[bytearray] = []

    async def put(self, offset: int, pieces: Sequence[memoryview]) -> Sequence[memoryview]:
        """What follows the frame in the stream: everything."""
        return pieces

    async def get(self, offset: int, num_bytes: int) -> memoryview:
        """The payload, in a buffer that is used again after `done`."""
        buffer = self._spare.pop() if self._spare else bytearray()
        if len(buffer) < num_bytes:
            buffer = bytearray(num_bytes)
        view = memoryview(buffer)[:num_bytes]
        await self._wire.read_into(view)
        return view

    def done(self, payload: memoryview) -> None:
        """Nobody reads it any more."""
        if len(self._spare) < SPARE_BUFFERS and isinstance(payload.obj, bytearray):
            self._spare.append(payload.obj)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
