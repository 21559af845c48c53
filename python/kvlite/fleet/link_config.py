"""`LinkConfig`: limits and times of one side of a link, with their ranges.

Owns the values alone. Made by worker.py and frontend.py, read by links.py and dial.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlite.errors import ConfigError
from kvlite.fleet.auth import FINGERPRINT_BYTES, FleetKey
from kvlite.fleet.messages import OWNER


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """One side of a link. Of each limit both sides take the smaller. Raises ConfigError."""

    engine: int
    """Own number; OWNER for the front-end."""
    key: FleetKey
    fingerprint: bytes = bytes(FINGERPRINT_BYTES)
    """`auth.fingerprint` of model, number format, block size: equal on engines that exchange KV. Zeros: no model."""
    block_bytes: int = 0
    """Of one KV block; 0: no model."""
    frame_bytes_limit: int = 16 << 20
    payload_bytes_limit: int = 16 << 20
    window_bytes: int = 64 << 20
    """Payload sent and not yet used up, per direction: the size of a ring. One payload has at most half. 0: none."""
    outbox_bytes_limit: int = 16 << 20
    """Frames that wait to be written: beyond, `send` waits and `post` raises."""
    inbox_bytes_limit: int = 16 << 20
    """Frames that wait to be taken: beyond, nothing is read, and the peer's `send` comes to wait."""
    heartbeat_s: float = 0.5
    timeout_s: float = 5.0
    """Silence after which the peer is dead."""
    handshake_s: float = 5.0
    stall_s: float = 30.0
    """A living peer that takes nothing for so long is given up."""
    bytes_per_s_limit: float | None = None
    """Throttle of what this side sends, for measurements."""

    def __post_init__(self) -> None:
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ConfigError("fingerprint", f"has {len(self.fingerprint)} bytes, must have {FINGERPRINT_BYTES}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(name, f"{value:g} is out of range: must be between {low:g} and {high:g}")
        limit = self.bytes_per_s_limit
        if limit is not None and not 1e3 <= limit <= 1e12:
            raise ConfigError("bytes_per_s_limit", f"{limit:g} is out of range: must be between 1e3 and 1e12")
        if limit is not None and self.payload_bytes_limit / limit > self.timeout_s / 2:
            raise ConfigError("bytes_per_s_limit", f"{limit:g}: one payload would take longer than half of timeout_s")
        if self.timeout_s < 2 * self.heartbeat_s:
            raise ConfigError("timeout_s", f"{self.timeout_s:g} must be at least twice heartbeat_s")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("engine", OWNER, 1 << 16),
    ("block_bytes", 0, 1 << 32),
    ("frame_bytes_limit", 1 << 10, 1 << 30),
    ("payload_bytes_limit", 0, 1 << 30),
    ("window_bytes", 0, 1 << 31),
    ("outbox_bytes_limit", 1 << 10, 1 << 30),
    ("inbox_bytes_limit", 1 << 10, 1 << 30),
    ("heartbeat_s", 0.01, 60),
    ("timeout_s", 0.02, 600),
    ("handshake_s", 0.01, 60),
    ("stall_s", 0.01, 600),
)
