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
from kvlite.fleet.sender import Sender
from kvlite.fleet.tcp import Wire
from kvlite.fleet.traffic import RATED_BYTES, Outgoing, Payloads, Received, Signal
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
    SilentPeerError,
    StalledPeerError,
    Window,
    again,
)

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

    def __init__(
        self,
        wire: Wire,
        config: LinkConfig,
        peer: int,
        limits: Limits,
        keys: tuple[bytes, bytes],
        payloads: Payloads,
    ) -> None:
        """A link over a socket whose handshake is done; keys: of what is sent, of what is received."""
        self.peer = peer
        """The other side's engine number, or OWNER."""
        self.limits = limits
        self.payload_cost = payloads.cost
        """As `Payloads.cost`."""
        self._wire = wire
        self._config = config
        self._payloads: Payloads | None = payloads
        self._sender = Sender(wire, config, limits, keys[0], payloads)
        self._opener = Opener(keys[1], limits)
        self._window = Window(limits.window)
        self._inbox: deque[Received] = deque()
        self._inbox_bytes = 0
        self._unreleased: deque[Received] = deque()
        self._current: Received | None = None
        self._arrived, self._taken = Signal(), Signal()
        self._end: LinkError | None = None
        create = asyncio.get_running_loop().create_task
        parts = {"read": self._read, "write": self._write, "beat": self._beat}
        self._tasks = [create(self._run(part), name=f"link {peer} {name}") for name, part in parts.items()]

    @property
    def ended(self) -> LinkError | None:
        """Why the link is over; None while it is up."""
        return self._end

    @property
    def bytes_per_s(self) -> float:
        """Payload bytes per second, from the start of sending until the receiver used them up; 0.0: not measured."""
        return self._sender.rate.bytes_per_s

    async def send(self, channel: Channel, frame: bytes, payload: Payload | None = None) -> None:
        """Returns when the frame is queued, with a payload when the payload's memory may be used again.

        Waits while the outbox or the window is full. Raises OversizedError (the link lives on), LinkError when it has
        ended. When the call is cancelled the frame goes out whole or not at all; its payload may then be garbage, which
        the blocks' digests tell.
        """
        outgoing = self._sender.outgoing(channel, frame, payload)
        while not self._sender.fits(outgoing):
            self._sender.check()
            await self._sender.went.wait()
        await self._put(outgoing)

    def post(self, channel: Channel, frame: bytes) -> None:
        """`send` without waiting. Raises OutboxFullError or OversizedError (the link lives on), LinkError."""
        outgoing = self._sender.outgoing(channel, frame)
        if not self._sender.fits(outgoing):
            waiting = f"{self._sender.num_waiting_bytes} of {self._config.outbox_bytes_limit} bytes"
            raise OutboxFullError(f"{waiting} wait for peer {self.peer}: it reads too slowly")
        self._sender.put(outgoing)

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
            if self._end is not None:
                raise again(self._end)
            await self._arrived.wait()
        received = self._inbox.popleft()
        self._inbox_bytes -= received.size
        self._taken.notify()
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
            await self._put(self._sender.outgoing(Inner.PROBE, b"", memoryview(bytes(num_bytes))))
        while self._sender.num_in_window:
            self._sender.check()
            await self._sender.went.wait()
        return self.bytes_per_s

    async def finish(self, timeout_s: float = 1.0) -> None:
        """Writes what waits, says goodbye, closes. After `timeout_s` it closes all the same."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._sender.is_idle:
                    await self._sender.went.wait()
        except TimeoutError:
            self._finish(LinkClosedError(f"the link to {self.peer} was closed before everything was written"))
        self.close()

    def close(self) -> None:
        """Ends every wait and both directions, at once; with a goodbye when nothing waits to be written."""
        if self._sender.is_idle:
            self._sender.put_urgent(Inner.GOODBYE)
        self._finish(LinkClosedError(f"the link to {self.peer} is closed"))
        self._inbox.clear()
        self._inbox_bytes = 0
        self._current = None

    async def _put(self, outgoing: Outgoing) -> None:
        self._sender.put(outgoing)
        if outgoing.gone is not None:
            try:
                await outgoing.gone
            except asyncio.CancelledError:
                self._sender.withdraw(outgoing)
                raise

    def _release(self, received: Received) -> None:
        """Payloads go back in order: those behind one that is kept wait for it."""
        received.released = True
        count = 0
        while self._unreleased and self._unreleased[0].released:
            first = self._unreleased.popleft()
            self._window.release()
            assert self._payloads is not None and first.payload is not None
            self._payloads.done(first.payload)
            count += 1
        if count and self._end is None:
            self._sender.put_urgent(Inner.RELEASE, _COUNT.pack(count))

    async def _run(self, part: Callable[[], Coroutine[None, None, None]]) -> None:
        """A part of the link whose end is the link's."""
        try:
            await part()
        except LinkError as error:
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
        self._sender.stop(error)
        self._arrived.notify()

    async def _write(self) -> None:
        try:
            await self._sender.run()
        except StalledPeerError:
            raise
        except LinkDownError as error:
            self._sender.stop(error)  # what the peer said before it died can still be read

    async def _read(self) -> None:
        payloads = self._payloads
        assert payloads is not None
        while True:
            while self._inbox_bytes >= self._config.inbox_bytes_limit:
                await self._taken.wait()
            header = self._opener.header(await self._wire.read(HEADER_BYTES, inside=False))
            frame = await self._wire.read(header.frame_len, inside=True)
            self._opener.frame(header, frame)
            received = Received(header.channel, frame)
            if header.payload_len:
                if isinstance(header.channel, Inner) and header.channel is not Inner.PROBE:
                    raise EnvelopeError(f"a {header.channel.name} has a payload")
                offset = self._window.take(header.payload_len)
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
            self._arrived.notify()
        elif received.channel is Inner.RELEASE:
            frame = received.frame
            self._sender.released(_COUNT.unpack(frame)[0] if len(frame) == _COUNT.size else 0)
        elif received.channel is Inner.GOODBYE:
            raise LinkClosedError(f"peer {self.peer} said goodbye")
        elif received.payload is not None:
            await asyncio.to_thread(np.array, np.frombuffer(received.payload, np.uint8))
            self._release(received)

    async def _beat(self) -> None:
        """Counts beats, not time: a loop of our own that was held up must not blame the peer."""
        wire, sender, beat_s = self._wire, self._sender, self._config.heartbeat_s
        silent_beats = blocked_beats = 0
        received = released = -1
        while True:
            await asyncio.sleep(beat_s)
            if not sender.wrote and sender.is_free:
                sender.put_urgent(Inner.PING)
            sender.wrote = False
            silent_beats = silent_beats + 1 if wire.waits_for_bytes and wire.num_received == received else 0
            blocked_beats = blocked_beats + 1 if sender.blocked and sender.num_released == released else 0
            received, released = wire.num_received, sender.num_released
            if silent_beats * beat_s >= self._config.timeout_s:
                raise SilentPeerError(f"nothing came from peer {self.peer} for {self._config.timeout_s:g} s")
            if blocked_beats * beat_s >= self._config.stall_s:
                waited = f"{self._config.stall_s:g} s"
                raise StalledPeerError(f"peer {self.peer} lives but has used up no payload for {waited}")
