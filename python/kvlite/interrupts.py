"""`uninterrupted`: Ctrl-C waits until a block is done.

For the few lines between which something would be lost: a delta that was read and not stored, a request that is on
two engines or on none. Called by engine.py and migration.py.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Generator[None]:
    """Holds Ctrl-C back until the block is done; only where Python's own handler is set, in the main thread."""
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
