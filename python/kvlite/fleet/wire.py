"""The envelope of every frame between two processes of a fleet, and a named error for each way it can be wrong.

Owns the header's layout, the sequence numbers and the MACs of a session; knows no socket and no time. A header carries
its own MAC, so that a length is believed before anything of that length is allocated or waited for. Frames are
authenticated, not encrypted: between hosts a fleet belongs on a private network. Called by links.py.
"""

from __future__ import annotations

import hmac
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b

from kvlite.errors import KvliteError

MAGIC = b"kvlf"
VERSION = 2
"""Of handshake and envelope; both sides must have the same."""
MAC_BYTES = 16
_FIELDS = struct.Struct("<4sBBHQII16s")
"""magic, version, channel, zero, sequence number, length of frame, length of payload, MAC of the frame."""
HEADER_BYTES = _FIELDS.size + MAC_BYTES


class LinkError(KvliteError):
    """A link could not be opened or has ended; nothing more is sent or received on it."""


class LinkClosedError(LinkError):
    """This side closed the link, or the other one said goodbye."""


class LinkDownError(LinkError):
    """The other side is gone: end of file without a goodbye, a reset, silence."""


class SilentPeerError(LinkDownError):
    """Nothing arrived for `timeout_s`, not even a heartbeat."""


class StalledPeerError(LinkDownError):
    """The other side lives but has taken nothing for `stall_s`."""


class CutFrameError(LinkDownError):
    """The stream ended inside a frame."""


class OutboxFullError(LinkError):
    """`post` found no room. The link lives on."""


class EnvelopeError(LinkError):
    """What arrived is no frame of this session; the link is closed."""


class ForeignEnvelopeError(EnvelopeError):
    """Another magic or version, an unknown channel, a reserved bit: not our protocol."""


class ForgedFrameError(EnvelopeError):
    """A MAC is wrong: bits flipped on the way, or somebody without the key."""


class SequenceError(EnvelopeError):
    """A frame was replayed, lost or overtaken."""


class OversizedError(EnvelopeError):
    """A frame or payload is larger than the agreed limit, or exceeds the window."""


def again(error: LinkError) -> LinkError:
    """The end of a link as a new error: one that is raised twice would collect tracebacks."""
    return type(error)(*error.args)


class Channel(IntEnum):
    """What a frame speaks of: each has its own decoder."""

    CONTROL = 1
    """Front-end and worker, `messages.py`."""
    MIGRATION = 2
    """The machines of `_core`; frames of blocks have a payload."""


class Inner(IntEnum):
    """Channels of the link itself."""

    PING = 128
    GOODBYE = 129
    RELEASE = 130
    """u32: so many more payloads were used up."""
    PROBE = 131
    """A payload that is read and thrown away: measures the link."""


CHANNELS: dict[int, Channel | Inner] = {int(channel): channel for kind in (Channel, Inner) for channel in kind}


@dataclass(frozen=True)
class Limits:
    """What both sides of a link agreed on: the smaller of their settings, in bytes."""

    frame: int
    payload: int
    window: int
    """Payload sent and not yet used up by the receiver; 0: this link carries none."""


@dataclass(frozen=True)
class Header:
    """A header whose MAC is right and whose lengths are allowed."""

    channel: Channel | Inner
    frame_len: int
    payload_len: int
    frame_mac: bytes


Payload = memoryview | Sequence[memoryview]
"""Bytes beside a frame; several pieces follow each other."""


def peek(header: bytes | memoryview) -> tuple[int, int, int, int]:
    """(channel, sequence number, frame length, payload length) of a header, unchecked: for tests that sit between."""
    _magic, _version, channel, _zero, sequence, frame_len, payload_len, _mac = _FIELDS.unpack_from(header)
    return channel, sequence, frame_len, payload_len


class Window:
    """Where payloads lie in a ring of `size` bytes, each in one piece. Both sides count alike, so no offset travels.

    A payload of at most half the size fits as soon as those before it are released.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._head = 0
        self._used = 0
        self._taken: deque[int] = deque()

    @property
    def num_taken(self) -> int:
        """Payloads that are not released."""
        return len(self._taken)

    def take(self, num_bytes: int) -> int | None:
        """Offset of the next payload; None while there is no room."""
        wraps = self._head + num_bytes > self._size
        skipped = self._size - self._head if wraps else 0
        if self._used + skipped + num_bytes > self._size:
            return None
        offset = 0 if wraps else self._head
        self._head = offset + num_bytes
        self._used += skipped + num_bytes
        self._taken.append(skipped + num_bytes)
        return offset

    def release(self) -> None:
        """The oldest payload is used up."""
        self._used -= self._taken.popleft()


class Sealer:
    """Makes the headers of what one side sends, in order."""

    def __init__(self, key: bytes) -> None:
        self._keyed = blake2b(key=key, digest_size=MAC_BYTES)
        self._sequence = 0

    def header(self, channel: Channel | Inner, frame: bytes | memoryview, payload_len: int) -> bytes:
        """Header of the next frame; sizes are the caller's to check."""
        mac = _mac(self._keyed, frame)
        fields = _FIELDS.pack(MAGIC, VERSION, channel, 0, self._sequence, len(frame), payload_len, mac)
        self._sequence += 1
        return fields + _mac(self._keyed, fields)


class Opener:
    """Checks what the other side sent, in order."""

    def __init__(self, key: bytes, limits: Limits) -> None:
        self._keyed = blake2b(key=key, digest_size=MAC_BYTES)
        self._limits = limits
        self._sequence = 0

    def header(self, data: bytes | memoryview) -> Header:
        """The next header, HEADER_BYTES long. Raises an EnvelopeError."""
        magic, version, number, zero, sequence, frame_len, payload_len, mac = _FIELDS.unpack_from(data)
        if magic != MAGIC:
            raise ForeignEnvelopeError(f"a frame begins with {magic!r}, must be {MAGIC!r}")
        if version != VERSION:
            raise ForeignEnvelopeError(f"a frame has version {version}, must be {VERSION}")
        if not hmac.compare_digest(_mac(self._keyed, data[: _FIELDS.size]), bytes(data[_FIELDS.size : HEADER_BYTES])):
            raise ForgedFrameError("the MAC of a header is wrong: it was changed on the way or has another key")
        channel = CHANNELS.get(number)
        if channel is None or zero:
            raise ForeignEnvelopeError(f"a frame has channel {number} and reserved bits {zero}: unknown here")
        if sequence != self._sequence:
            what = "replayed" if sequence < self._sequence else "came after a gap"
            raise SequenceError(f"frame {sequence} {what}: the next is {self._sequence}")
        self._sequence += 1
        if frame_len > self._limits.frame:
            raise OversizedError(f"a frame has {frame_len} bytes, must be at most {self._limits.frame}")
        if payload_len > self._limits.payload:
            raise OversizedError(f"a payload has {payload_len} bytes, must be at most {self._limits.payload}")
        return Header(channel, frame_len, payload_len, mac)

    def frame(self, header: Header, frame: bytes | memoryview) -> None:
        """Raises ForgedFrameError unless `frame` is what `header` announced."""
        if not hmac.compare_digest(_mac(self._keyed, frame), header.frame_mac):
            raise ForgedFrameError("the MAC of a frame is wrong: it was changed on the way")


def _mac(keyed: blake2b, data: bytes | memoryview) -> bytes:
    mac = keyed.copy()
    mac.update(data)
    return mac.digest()
