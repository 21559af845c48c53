"""A fault proxy between two processes of a fleet: delays, drops, doubles, swaps, flips, cuts and freezes single frames.

Stands between `dial.connect` and `dial.listen`, TCP or unix (where it passes the rings' descriptors on). It has no key:
it shows each frame to a callback, which says what becomes of it and may do anything else meanwhile, such as killing a
process exactly there.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Self

from kvlite.fleet import dial, shared_memory
from kvlite.fleet.auth import HELLO_BYTES, PROOF_BYTES, read_hello
from kvlite.fleet.tcp import Wire
from kvlite.fleet.wire import HEADER_BYTES, LinkError, peek

STALL_S = 60.0


class Fault(Enum):
    """What becomes of a frame."""

    NONE = "passes"
    DROP = "vanishes"
    DOUBLE = "comes twice"
    SWAP = "comes after the next one of its direction"
    FLIP_HEADER = "one bit of the header is flipped"
    FLIP_FRAME = "one bit in the middle of the frame is flipped"
    FLIP_PAYLOAD = "one bit in the middle of the payload is flipped (TCP)"
    CUT = "half of it, then the end of both streams"
    FREEZE = "it and all that follows, either way, stays here; both streams stay open"


@dataclass(frozen=True)
class Seen:
    """A frame on its way."""

    upward: bool
    """From the side that connected to the side that listens."""
    channel: int
    """Of `Channel` or `Inner`."""
    sequence: int
    frame: bytes
    payload_len: int


Decide = Callable[[Seen], Fault | Awaitable[Fault]]
"""Called for each frame in turn; one that is awaited delays it and those behind it."""


class Proxy:
    """Listens at `address` and connects to `target` for each connection."""

    def __init__(self, sock: socket.socket, target: str, decide: Decide) -> None:
        self._sock = sock
        self._target = target
        self._decide = decide
        self._tasks: set[asyncio.Task[None]] = set()
        self._pairs: list[_Pair] = []
        name = sock.getsockname()
        self.address = f"unix:{name}" if sock.family == socket.AF_UNIX else f"tcp:{name[0]}:{name[1]}"
        self._spawn(self._accept())

    @classmethod
    async def start(cls, target: str, decide: Decide, address: str = "tcp:127.0.0.1:0") -> Self:
        """`address` is of the same kind as `target`."""
        family, where = await dial._resolve(address)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(16)
        return cls(sock, target, decide)

    @property
    def num_connections(self) -> int:
        """That ever came."""
        return len(self._pairs)

    async def thawed(self) -> None:
        """Returns when whoever was on a frozen connection has given it up."""
        for pair in list(self._pairs):
            if pair.frozen:
                await pair.closed.wait()

    def cut(self) -> None:
        """Ends every connection that is there now, without a word."""
        for pair in self._pairs:
            pair.close()

    def close(self) -> None:
        """Ends everything."""
        for task in self._tasks:
            task.cancel()
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self.cut()

    def _spawn(self, part: Awaitable[None]) -> None:
        task = asyncio.ensure_future(part)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            caller, _ = await loop.sock_accept(self._sock)
            family, where = await dial._resolve(self._target)
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setblocking(False)
            try:
                await loop.sock_connect(listener, where)
            except OSError:
                caller.close()
                listener.close()
                continue
            pair = _Pair(caller, listener, self._decide)
            self._pairs.append(pair)
            for upward in (True, False):
                self._spawn(pair.pump(upward))


class _Pair:
    """One connection: two sockets, two pumps."""

    def __init__(self, caller: socket.socket, listener: socket.socket, decide: Decide) -> None:
        self._socks = (listener, caller)
        self._wires = (Wire(listener, stall_s=STALL_S), Wire(caller, stall_s=STALL_S))
        self._inline = caller.family != socket.AF_UNIX
        self._decide = decide
        self._windows: list[int] = []
        self.frozen = False
        self.closed = asyncio.Event()
        self._held: list[list[bytes]] = [[], []]

    def close(self) -> None:
        for wire in self._wires:
            wire.close()
        self.closed.set()

    async def pump(self, upward: bool) -> None:
        source, target = self._wires[upward], self._wires[not upward]
        try:
            await self._shake_hands(source, target, upward)
            while True:
                await self._pass_one(source, target, upward)
        except (LinkError, OSError, ValueError):  # one end is gone, or both: the other shall know
            self.close()

    async def _shake_hands(self, source: Wire, target: Wire, upward: bool) -> None:
        hello = await source.read_exactly(HELLO_BYTES)
        self._windows.append(read_hello(hello).limits.window)
        await target.write([hello])
        await target.write([await source.read_exactly(PROOF_BYTES)])
        if not self._inline and min(self._windows) > 0:
            fds: list[int] = []
            message = await shared_memory._receive_with_files(source, self._socks[upward], fds)
            socket.send_fds(self._socks[not upward], [message], fds)
            for fd in fds:
                os.close(fd)

    async def _pass_one(self, source: Wire, target: Wire, upward: bool) -> None:
        header = await source.read(HEADER_BYTES, inside=False)
        channel, sequence, frame_len, payload_len = peek(header)
        frame = await source.read(frame_len, inside=True)
        payload = await source.read(payload_len, inside=True) if self._inline else b""
        decided = self._decide(Seen(upward, channel, sequence, frame, payload_len))
        fault = decided if isinstance(decided, Fault) else await decided
        self.frozen = self.frozen or fault is Fault.FREEZE
        if self.frozen or fault is Fault.DROP:
            return
        parts = [header, frame, payload]
        flipped = {Fault.FLIP_HEADER: 0, Fault.FLIP_FRAME: 1, Fault.FLIP_PAYLOAD: 2}.get(fault)
        if flipped is not None:
            changed = bytearray(parts[flipped])
            changed[len(changed) // 2] ^= 1
            parts[flipped] = bytes(changed)
        whole = b"".join(parts)
        if fault is Fault.CUT:
            await target.write([whole[: max(1, len(whole) // 2)]])
            self.close()
            raise OSError("cut")
        if fault is Fault.SWAP:
            self._held[upward].append(whole)
            return
        await target.write([whole] * (2 if fault is Fault.DOUBLE else 1))
        while self._held[upward]:
            await target.write([self._held[upward].pop()])
