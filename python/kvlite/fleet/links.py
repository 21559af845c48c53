"""`Link`: an authenticated, ordered, bounded channel between two processes of a fleet.

Owns the tasks of a link (one reads, one writes, one beats), its queues and its end. A link is up once both sides have
proved the fleet key; every frame carries a sequence number and MACs (wire.py), and whatever is wrong with one ends the
link with a named error. Payloads travel in the stream (TCP) or through shared memory (unix sockets). All of it belongs
to one event loop. Nothing waits without an end: a dead peer is found by its silence, one that takes nothing by
`stall_s`, and `close` ends every wait. Called by worker.py, mover.py and frontend.py.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine

import numpy as np

from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.tcp import Wire
from kvlite.fleet.traffic import RATED_BYTES, Outgoing, Payloads, Rate, Received, Signal
from kvlite.fleet.wire import (
    HEADER_BYTES,
    Channel,
    EnvelopeError,
    Inner,
    Limits,
    LinkClosedError,
    LinkDownError,
    LinkError,
    Opener,
    OutboxFullError,
    OversizedError,
    Payload,
    Sealer,
    SilentPeerError,
    StalledPeerError,
    Window,
)

BATCH_BYTES = 1 << 16
"""Small frames that wait together are written together, up to here."""
PROBES = 4
PROBE_BYTES = 1 << 20
_COUNT = struct.Struct("<I")


class Link:
    """One side of a link that is up; made by `dial.connect` and `dial.listen`.

        await link.send(Channel.MIGRATION, frame, copier.payload(blocks))
        async for channel, frame, payload in link:
            ...

    Frames arrive in the order of sending, each once, or the link ends. One task iterates. The iteration ends after
    `close` or the peer's goodbye; it raises LinkDownError when the peer died, EnvelopeError when somebody meddled.
    A task that iterates should answer with `post`: two that wait in `send` for each other end with StalledPeerError.
    """

    def __init__(self, wire: Wire, config: LinkConfig, peer: int, limits: Limits, keys: tuple[bytes, bytes]) -> None:
        """A link over a socket whose handshake is done; keys: of what is sent, of what is received."""
        self.peer = peer
        """The other side's engine number, or OWNER."""
        self.limits = limits
        self._wire = wire
        self._config = config
        self._sealer, self._opener = Sealer(keys[0]), Opener(keys[1], limits)
        self._payloads: Payloads | None = None
        self._out_window, self._in_window = Window(limits.window), Window(limits.window)
        self._outbox: deque[Outgoing] = deque()
        self._inbox: deque[Received] = deque()
        self._unreleased: deque[Received] = deque()
        self._outbox_bytes = self._inbox_bytes = 0
        self._to_write, self._to_take, self._went = Signal(), Signal(), Signal()
        self._current: Received | None = None
        self._urgent: deque[Outgoing] = deque()
        self._sending: Outgoing | None = None
        self._blocked = False
        self._blocked_beats = 0
        self._wrote = False
        self._rate = Rate()
        self._end: LinkError | None = None
        self._unwritable: LinkError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, payloads: Payloads) -> None:
        """Begins to read, write and beat. Once, by who made the link."""
        self._payloads = payloads
        loop = asyncio.get_running_loop()
        for part in (self._read, self._write, self._beat):
            self._tasks.append(loop.create_task(self._run(part), name=f"link {self.peer} {part.__name__}"))

    @property
    def ended(self) -> LinkError | None:
        """Why the link is over; None while it is up."""
        return self._end

    @property
    def bytes_per_s(self) -> float:
        """Payload bytes per second, from the start of sending until the receiver used them up; 0.0: not measured."""
        return self._rate.bytes_per_s

    async def send(self, channel: Channel, frame: bytes, payload: Payload | None = None) -> None:
        """Returns when the frame is queued, with a payload when the payload's memory may be used again.

        Waits while the outbox or the window is full. Raises OversizedError (the link lives on), LinkError when it has
        ended. When the call is cancelled the frame goes out whole or not at all; its payload may then be garbage, which
        the blocks' digests tell.
        """
        outgoing = self._outgoing(channel, frame, payload)
        while not self._fits(outgoing):
            await self._wait(self._went)
        self._put(outgoing)
        if outgoing.gone is not None:
            try:
                await outgoing.gone
            except asyncio.CancelledError:
                if outgoing in self._outbox:
                    self._outbox.remove(outgoing)
                    self._outbox_bytes -= outgoing.size
                raise

    def post(self, channel: Channel, frame: bytes) -> None:
        """`send` without waiting. Raises OutboxFullError or OversizedError (the link lives on), LinkError."""
        outgoing = self._outgoing(channel, frame, None)
        if not self._fits(outgoing):
            limit = self._config.outbox_bytes_limit
            raise OutboxFullError(
                f"{self._outbox_bytes} of {limit} bytes wait for peer {self.peer}: it reads too slowly"
            )
        self._put(outgoing)

    def __aiter__(self) -> AsyncIterator[tuple[Channel, bytes, memoryview | None]]:
        return self

    async def __anext__(self) -> tuple[Channel, bytes, memoryview | None]:
        """(channel, frame, payload). The payload is valid until the next call, unless `keep` was called."""
        if self._current is not None:
            self._release(self._current)
            self._current = None
        while not self._inbox:
            if isinstance(self._end, LinkClosedError):
                raise StopAsyncIteration
            await self._wait(self._to_take)
        received = self._inbox.popleft()
        self._inbox_bytes -= received.size
        self._went.notify()
        self._current = received if received.payload is not None else None
        assert isinstance(received.channel, Channel)
        return received.channel, received.frame, received.payload

    def keep(self) -> Callable[[], None]:
        """Keeps the payload of the last frame valid until the function that is returned is called (once, on the loop).

        Lets a task go on iterating while a thread stores a payload. Until then it counts against the peer's window.
        """
        assert self._current is not None, "the last frame had no payload"
        kept, self._current = self._current, None
        return lambda: self._release(kept)

    async def measure(self) -> float:
        """`bytes_per_s` after some payloads that the other side throws away. 0.0 when the link carries none."""
        num_bytes = min(PROBE_BYTES, self.limits.payload)
        for _ in range(PROBES if num_bytes >= RATED_BYTES else 0):
            gone = asyncio.get_running_loop().create_future()
            self._put(Outgoing(Inner.PROBE, b"", (memoryview(bytes(num_bytes)),), num_bytes, gone))
            await gone
        while self._out_window.num_taken:
            self._check_writable()
            await self._went.wait()
        return self.bytes_per_s

    async def finish(self, timeout_s: float = 1.0) -> None:
        """Writes what waits, says goodbye, closes. After `timeout_s` it closes all the same."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._end is None and (self._outbox or self._urgent or self._sending is not None):
                    await self._wait(self._went)
        except (TimeoutError, LinkError):
            self._finish(LinkClosedError(f"the link to {self.peer} was closed before everything was written"))
        self.close()

    def close(self) -> None:
        """Ends every wait and both directions, at once; with a goodbye when nothing waits to be written."""
        if self._end is None and not self._outbox and not self._urgent and self._sending is None:
            self._wire.try_write(self._sealer.header(Inner.GOODBYE, b"", 0))
        self._finish(LinkClosedError(f"the link to {self.peer} is closed"))
        self._drop_inbox()

    def _outgoing(self, channel: Channel, frame: bytes, payload: Payload | None) -> Outgoing:
        self._check_writable()
        if len(frame) > self.limits.frame:
            raise OversizedError(f"a frame has {len(frame)} bytes, must be at most {self.limits.frame}")
        if payload is None:
            return Outgoing(channel, frame)
        views = [payload] if isinstance(payload, memoryview) else payload
        pieces = [view.cast("B") for view in views]
        num_bytes = sum(map(len, pieces))
        if not 0 < num_bytes <= self.limits.payload:
            raise OversizedError(f"a payload has {num_bytes} bytes, must be between 1 and {self.limits.payload}")
        return Outgoing(channel, frame, pieces, num_bytes, asyncio.get_running_loop().create_future())

    def _fits(self, outgoing: Outgoing) -> bool:
        return not self._outbox or self._outbox_bytes + outgoing.size <= self._config.outbox_bytes_limit

    def _put(self, outgoing: Outgoing) -> None:
        self._check_writable()
        self._outbox.append(outgoing)
        self._outbox_bytes += outgoing.size
        self._to_write.notify()

    def _put_urgent(self, outgoing: Outgoing) -> None:
        if self._unwritable is None:
            self._urgent.append(outgoing)
            self._to_write.notify()

    def _release(self, received: Received) -> None:
        """Payloads go back in order: those behind one that is kept wait for it."""
        received.released = True
        count = 0
        while self._unreleased and self._unreleased[0].released:
            first = self._unreleased.popleft()
            self._in_window.release()
            assert self._payloads is not None and first.payload is not None
            self._payloads.done(first.payload)
            count += 1
        if count and self._end is None:
            self._put_urgent(Outgoing(Inner.RELEASE, _COUNT.pack(count)))

    async def _wait(self, signal: Signal) -> None:
        """Until something changed. Raises the link's end."""
        if self._end is not None:
            raise _again(self._end)
        await signal.wait()

    def _check_writable(self) -> None:
        if self._unwritable is not None:
            raise _again(self._unwritable)

    async def _run(self, part: Callable[[], Coroutine[None, None, None]]) -> None:
        """A part of the link whose end is the link's."""
        try:
            await part()
        except LinkError as error:
            if part == self._write and type(error) is LinkDownError:
                self._stop_writing(error)  # what the peer said before it died can still be read
            else:
                self._finish(error)
        except Exception as error:  # ours: whoever waits on this link must hear of it
            self._finish(LinkError(f"the link to {self.peer} failed: {error!r}"))

    def _finish(self, error: LinkError) -> None:
        if self._end is not None:
            return
        self._end = error.with_traceback(None)
        self._payloads = None
        tasks, self._tasks = self._tasks, []
        current = asyncio.current_task() if tasks else None
        for task in tasks:
            if task is not current:
                task.cancel()
        self._unreleased.clear()
        self._wire.close()
        self._stop_writing(error)
        self._to_take.notify()

    def _stop_writing(self, error: LinkError) -> None:
        if self._unwritable is None:
            self._unwritable = error.with_traceback(None)
        for outgoing in (*self._outbox, *([self._sending] if self._sending else [])):
            if outgoing.gone is not None and not outgoing.gone.done():
                outgoing.gone.set_exception(_again(error))
                outgoing.gone.exception()  # marks it as seen: its sender may be gone
        self._outbox.clear()
        self._urgent.clear()
        self._outbox_bytes = 0
        self._sending = None
        self._went.notify()

    def _drop_inbox(self) -> None:
        self._inbox.clear()
        self._inbox_bytes = 0
        self._current = None

    async def _write(self) -> None:
        payloads = self._payloads
        assert payloads is not None
        loop = asyncio.get_running_loop()
        while True:
            first, offset = await self._next()
            self._sending = first
            buffers = self._sealed(first)
            if first.pieces:
                self._rate.starts.append((loop.time(), first.payload_len))
                buffers += await payloads.put(offset, first.pieces)
            else:
                num_bytes = first.size
                while self._outbox and not self._outbox[0].pieces and num_bytes < BATCH_BYTES:
                    num_bytes += self._outbox[0].size
                    buffers += self._sealed(self._pop())
            await self._wire.write(buffers)
            self._wrote = True
            self._sending = None
            if first.gone is not None and not first.gone.done():
                first.gone.set_result(None)
            self._went.notify()

    async def _next(self) -> tuple[Outgoing, int]:
        """What is written next, and where its payload goes. What is urgent passes a payload that waits for room."""
        while True:
            if self._urgent:
                return self._urgent.popleft(), 0
            if self._outbox:
                first = self._outbox[0]
                offset = self._out_window.take(first.payload_len) if first.pieces else 0
                self._blocked = offset is None
                if offset is not None:
                    return self._pop(), offset
            await self._to_write.wait()

    def _pop(self) -> Outgoing:
        outgoing = self._outbox.popleft()
        self._outbox_bytes -= outgoing.size
        return outgoing

    def _sealed(self, outgoing: Outgoing) -> list[bytes | memoryview]:
        return [self._sealer.header(outgoing.channel, outgoing.frame, outgoing.payload_len), outgoing.frame]

    async def _read(self) -> None:
        payloads = self._payloads
        assert payloads is not None
        while True:
            while self._inbox_bytes >= self._config.inbox_bytes_limit:
                await self._wait(self._went)
            header = self._opener.header(await self._wire.read(HEADER_BYTES, inside=False))
            frame = await self._wire.read(header.frame_len, inside=True)
            self._opener.frame(header, frame)
            received = Received(header.channel, frame)
            if header.payload_len:
                offset = self._in_window.take(header.payload_len)
                if offset is None:
                    sizes = f"a payload of {header.payload_len} bytes exceeds the window of {self.limits.window}"
                    raise OversizedError(f"{sizes}: those before it are not used up")
                received.payload = await payloads.get(offset, header.payload_len)
                self._unreleased.append(received)
            await self._take_in(received)

    async def _take_in(self, received: Received) -> None:
        if isinstance(received.channel, Channel):
            self._inbox.append(received)
            self._inbox_bytes += received.size
            self._to_take.notify()
        elif received.channel is Inner.RELEASE:
            self._released(received.frame)
        elif received.channel is Inner.GOODBYE:
            raise LinkClosedError(f"peer {self.peer} said goodbye")
        elif received.payload is not None:
            await asyncio.to_thread(np.array, np.frombuffer(received.payload, np.uint8))
            self._release(received)

    def _released(self, frame: bytes) -> None:
        count = _COUNT.unpack(frame)[0] if len(frame) == _COUNT.size else 0
        if not 0 < count <= self._out_window.num_taken:
            raise EnvelopeError(f"peer {self.peer} released {count} payloads of {self._out_window.num_taken}")
        self._blocked_beats = 0
        for _ in range(count):
            self._out_window.release()
            self._rate.released(asyncio.get_running_loop().time())
        self._to_write.notify()
        self._went.notify()

    async def _beat(self) -> None:
        """Counts beats, not time: a loop of our own that was held up must not blame the peer."""
        silent_beats, seen, beat_s = 0, -1, self._config.heartbeat_s
        while True:
            await asyncio.sleep(beat_s)
            if not self._wrote and self._sending is None:
                self._put_urgent(Outgoing(Inner.PING, b""))
            self._wrote = False
            silent = self._wire.waits_for_bytes and self._wire.num_received == seen
            silent_beats = silent_beats + 1 if silent else 0
            seen = self._wire.num_received
            if silent_beats * beat_s >= self._config.timeout_s:
                raise SilentPeerError(f"nothing came from peer {self.peer} for {self._config.timeout_s:g} s")
            self._blocked_beats = self._blocked_beats + 1 if self._blocked else 0
            if self._blocked_beats * beat_s >= self._config.stall_s:
                waited = f"{self._config.stall_s:g} s"
                raise StalledPeerError(f"peer {self.peer} lives but has used up no payload for {waited}")


def _again(error: LinkError) -> LinkError:
    """The same as a new error: one that is raised twice would collect tracebacks."""
    return type(error)(*error.args)
