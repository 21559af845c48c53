"""`Bar`: a progress bar of one line on stderr, for work that a person may wait for.

Shown on a terminal, or when asked for; silent otherwise and for work that ends within half a second. Called by Engine,
kvlite.batch and the runner's graphs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

DELAY_S = 0.5
"""Work that ends sooner shows nothing."""
INTERVAL_S = 0.1
WIDTH = 24


class Bar:
    """`wanted` None shows it on a terminal only. `unit` B prints sizes, anything else counts."""

    def __init__(self, label: str, *, unit: str, wanted: bool | None = None) -> None:
        self._label = label
        self._unit = unit
        self._shown = sys.stderr.isatty() if wanted is None else wanted
        self._start = time.monotonic()
        self._next = self._start if wanted else self._start + DELAY_S
        self._dirty = False

    def update(self, done: int, total: int, note: Callable[[], str] = str) -> None:
        """Draws when it is time to, `note()` behind the count; cheap otherwise."""
        now = time.monotonic()
        if not self._shown or (now < self._next and done < total) or (not self._dirty and now < self._next):
            return
        self._next = now + INTERVAL_S
        self._dirty = True
        filled = WIDTH * done // max(total, 1)
        amount = f"{done / 1e6:.0f}/{total / 1e6:.0f} MB" if self._unit == "B" else f"{done}/{total} {self._unit}"
        bar = "#" * filled + "-" * (WIDTH - filled)
        sys.stderr.write(f"\r{self._label} [{bar}] {amount} {now - self._start:.0f} s {note()}\x1b[K")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dirty:
            sys.stderr.write("\n")
            sys.stderr.flush()
