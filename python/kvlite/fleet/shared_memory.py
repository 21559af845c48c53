"""Payloads between two processes of one host: a ring in memory that the sender makes and the receiver maps.

The memory never has a name: its descriptor travels over the unix socket once both sides have proved the key, so nobody
else can open it and nothing is left behind by a crash. On Linux it is sealed against shrinking (a mapping of memory
that the sender cut short would kill the receiver); elsewhere it is an unlinked file. Sizes come from the agreed limits.
Called by links.py.
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import mmap
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvlite.fleet.auth import HandshakeError
from kvlite.fleet.tcp import Wire

INLINE_COPY_BYTES = 2 << 20
"""Up to here a copy is shorter than handing it to a thread."""
THROTTLED_PIECE_BYTES = 1 << 20
MEMORY_MESSAGE_BYTES = 40
"""u64 size, 32 bytes of proof."""
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


class SharedPayloads:
    """The sender's ring and the receiver's, of one side of a link."""

    cost: ClassVar[float] = 2.0  # the digests, one copy and a frame

    def __init__(self, wire: Wire, outgoing: mmap.mmap, incoming: mmap.mmap) -> None:
        self._wire = wire
        self._outgoing = np.frombuffer(outgoing, np.uint8)
        self._incoming = memoryview(incoming)

    async def put(self, offset: int, pieces: Sequence[memoryview]) -> Sequence[memoryview]:
        """Copies into the ring, long ones beside the event loop. What follows the frame in the stream: nothing."""
        num_bytes = sum(map(len, pieces))
        if self._wire.throttle is not None:
            for start in range(0, num_bytes, THROTTLED_PIECE_BYTES):
                await self._wire.throttle.take(min(num_bytes - start, THROTTLED_PIECE_BYTES))
        if num_bytes <= INLINE_COPY_BYTES:
            self._copy(offset, pieces)
        else:
            await asyncio.to_thread(self._copy, offset, pieces)
        return ()

    async def get(self, offset: int, num_bytes: int) -> memoryview:
        """The payload where it lies; the sender writes there again after it was released."""
        return self._incoming[offset : offset + num_bytes]

    def done(self, payload: memoryview) -> None:
        """Nobody reads it any more."""

    def _copy(self, offset: int, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            np.copyto(self._outgoing[offset : offset + len(piece)], np.frombuffer(piece, np.uint8))
            offset += len(piece)


def create_memory(num_bytes: int) -> int:
    """Descriptor of new zeroed memory without a name, which only this user may open. The caller closes it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("kvlite-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _all_seals())
        return fd
    with tempfile.TemporaryFile(prefix="kvlite-ring") as file:
        os.ftruncate(file.fileno(), num_bytes)
        return os.dup(file.fileno())


def map_memory(fd: int, num_bytes: int) -> mmap.mmap:
    """The memory behind a descriptor that the other side sent. Raises HandshakeError unless it is what we agreed on."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes:
        raise HandshakeError(f"the other side's ring is no memory of {num_bytes} bytes but has {found.st_size}")
    if hasattr(os, "memfd_create"):
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        if seals & _all_seals() != _all_seals():
            raise HandshakeError("the other side's ring is not sealed: it could shrink under its reader")
    return mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ)


async def exchange_memory(wire: Wire, sock: socket.socket, keys: tuple[bytes, bytes], num_bytes: int) -> SharedPayloads:
    """Makes the own ring, sends it, maps the other side's. keys: of what is sent, of what is received.

    Raises HandshakeError when what arrives is not the other side's ring; LinkDownError when it left.
    """
    own = create_memory(num_bytes)
    try:
        outgoing = mmap.mmap(own, num_bytes)
        socket.send_fds(sock, [_message(keys[0], num_bytes)], [own])
    except OSError as error:
        raise HandshakeError(f"the ring cannot be made or sent: {error}") from None
    finally:
        os.close(own)
    received: list[int] = []
    try:
        message = await _receive_with_files(wire, sock, received)
        if len(received) != 1 or not hmac.compare_digest(message, _message(keys[1], num_bytes)):
            raise HandshakeError(f"the other side sent {len(received)} rings or one of another size, must be one")
        return SharedPayloads(wire, outgoing, map_memory(received[0], num_bytes))
    finally:
        for fd in received:
            os.close(fd)


async def _receive_with_files(wire: Wire, sock: socket.socket, files: list[int]) -> bytes:
    message = b""
    while len(message) < MEMORY_MESSAGE_BYTES:
        try:
            part, fds, _flags, _address = socket.recv_fds(sock, MEMORY_MESSAGE_BYTES - len(message), 2, _RECEIVE_FLAGS)
        except (BlockingIOError, InterruptedError):
            await wire.ready_to_read()
            continue
        except OSError as error:
            raise HandshakeError(f"the other side's ring did not arrive: {error}") from None
        files += fds
        if not part:
            raise HandshakeError("the other side left before it sent its ring")
        message += part
    return message


def _message(key: bytes, num_bytes: int) -> bytes:
    size = struct.pack("<Q", num_bytes)
    return size + hmac.digest(key, b"kvlite ring" + size, "sha256")


def _all_seals() -> int:
    seals = 0
    for name in _SEALS:
        seals |= getattr(fcntl, name)
    return seals
