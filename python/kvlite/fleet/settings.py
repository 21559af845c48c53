"""`FleetSettings`: what a fleet has beside the settings of its engines. Flags of `kvlite fleet serve` are made of it.

Owns names, defaults and bounds; imports nothing heavy. Called by cli.py and launcher.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlite.errors import ConfigError

ENGINES_MAX = 64
RESTART_WINDOW_S = 60.0


@dataclass(frozen=True)
class FleetSettings:
    """Of one front-end. Raises ConfigError naming field, value and range."""

    engines: int = 2
    transport: str = "shm"
    """How KV moves between engines: shm (shared memory) or tcp (loopback)."""
    silence_s: float = 5.0
    """An engine that is silent for so long is dead."""
    restarts: int = 10
    """Of one engine within RESTART_WINDOW_S; then it is given up. 0: a dead one stays dead, a silent one is let be."""
    setup: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of messages.Setup that differ from their defaults; for tests and measurements."""

    def __post_init__(self) -> None:
        if not 1 <= self.engines <= ENGINES_MAX:
            raise ConfigError("engines", f"{self.engines} is out of range: must be 1 to {ENGINES_MAX}")
        if self.transport not in ("shm", "tcp"):
            raise ConfigError("transport", f"{self.transport!r} is not allowed: must be shm | tcp")
        if not 0.5 <= self.silence_s <= 300:
            raise ConfigError("silence_s", f"{self.silence_s:g} is out of range: must be 0.5 to 300 s")
        if not 0 <= self.restarts <= 1000:
            raise ConfigError("restarts", f"{self.restarts} is out of range: must be 0 to 1000")
