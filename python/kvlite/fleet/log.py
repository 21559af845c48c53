"""Where the front-end's log goes: standard error, from a thread of its own.

Owns the handler. Whoever reads standard error may stop reading; the event loop, which owns every stream, must not wait
for that. So lines queue, at most QUEUED_MAX, and are dropped beyond. Called by server/__main__.py.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator
from contextlib import contextmanager
from logging.handlers import QueueHandler

QUEUED_MAX = 4096
LAST_LINES_S = 1.0
"""Time to write what is queued at the end."""


class _Dropping(QueueHandler):
    """Never waits, never fails."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queues a record, or drops it."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


@contextmanager
def log_to_stderr() -> Generator[None]:
    """What happens to engines and requests of a fleet goes to standard error, a line each, inside the block."""
    lines: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUED_MAX)
    target = logging.StreamHandler()
    target.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def write() -> None:
        while (record := lines.get()) is not None:
            target.handle(record)

    writer = threading.Thread(target=write, name="kvlite-log", daemon=True)
    log, handler = logging.getLogger("kvlite.fleet"), _Dropping(lines)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    writer.start()
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
        try:
            lines.put(None, timeout=LAST_LINES_S)
        except queue.Full:
            return
        writer.join(LAST_LINES_S)
