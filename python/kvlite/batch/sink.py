"""`Sink`: the file of answers. A finished line is never lost, never written twice, and says which request it answers.

Owns the lock (one writer), the repair after an interruption, and when the disk is asked to keep what it was given:

- a line is handed to the system as one whole when its request has ended: killing the process loses no finished line;
- `fsync` at most once in SYNC_S seconds, and at the end: a power failure loses what was finished since, and that is
  answered again;
- what an interruption left behind the last whole line (half a line, or zeros where the disk lost a page) is cut off.

Called by run.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self, cast

from kvlite.batch.source import Entry, Source
from kvlite.errors import ConfigError, KvliteError
from kvlite.interrupts import uninterrupted

SYNC_S = 1.0
OPENING = b'{"id": "batch_req_'
"""How every line begins; nothing else is ever cut off or continued."""

FOREIGN = "was not written by kvlite batch: give another file, or remove that line"


class OutputError(KvliteError):
    """The file of answers cannot be written: full disk, I/O error, or another run is writing it."""


class Sink:
    """Opens or creates `path`, locks it, and finds out what is answered already. Raises ConfigError, OutputError."""

    def __init__(self, path: Path, source: Source, model: str) -> None:
        self.path = path
        self.answered: set[str] = set()
        """The custom_ids that have their line."""
        self.statuses: Counter[int] = Counter()
        """Lines by status code."""
        self.num_cut_bytes = 0
        """What the last interruption had left of a line."""
        self._model = model
        self._is_dirty = False
        self._synced_at = time.monotonic()
        try:
            if path.exists() and path.samefile(source.path):
                raise ConfigError(str(path), "is the file of requests: give another one for the answers")
            self._file = _open(path)
        except OSError as error:
            raise ConfigError(str(path), f"cannot be written: {error.strerror}") from None
        try:
            self._size = self._recover(self._file, source)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            self._file.close()

    def append(self, entry: Entry, status: int, body: dict[str, Any]) -> None:
        """Writes the answer to `entry`, or OpenAI's error object as its body.

        Raises OutputError; what was written before stays whole.
        """
        assert entry.custom_id not in self.answered, "a request ends once"
        response = {"status_code": status, "request_id": f"req_{entry.digest.hex()}", "body": body}
        value = {"id": entry.id, "custom_id": entry.custom_id, "response": response, "error": None}
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        with uninterrupted():
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._file.fileno(), rest) :]
            except OSError as error:
                self._fail(error)
            self._size += len(line)
            self._is_dirty = True
            self.answered.add(entry.custom_id)
            self.statuses[status] += 1

    def sync_when_due(self) -> None:
        """`sync`, when the last one was SYNC_S ago."""
        if self._is_dirty and time.monotonic() - self._synced_at >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Returns when what was written is safe from a power failure. Raises OutputError."""
        if not self._is_dirty:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._fail(error)
        self._is_dirty, self._synced_at = False, time.monotonic()

    def _fail(self, error: OSError) -> NoReturn:
        """Cuts off what was half written; should that fail too, the next run does it."""
        self._is_dirty = False
        try:
            os.ftruncate(self._file.fileno(), self._size)
        except OSError as second:
            error.add_note(f"nor can it be cut: {second.strerror}")
        raise OutputError(
            f"{self.path} cannot be written: {error.strerror}; {len(self.answered)} answers are in it, and the same "
            "command goes on from there"
        ) from error

    def _recover(self, file: BinaryIO, source: Source) -> int:
        """Takes note of every line; returns the size of the whole ones, which the file has then."""
        size = 0
        head = os.pread(file.fileno(), len(OPENING), 0)
        if head != OPENING[: len(head)]:  # Before a line is read: a foreign file may be one line of gigabytes.
            raise self._wrong(1, FOREIGN)
        lines = open(file.fileno(), "rb", closefd=False)  # noqa: SIM115  buffered, over the same descriptor
        for number, raw in enumerate(lines, 1):
            is_torn = not raw.endswith(b"\n") or b"\0" in raw
            begins = min(len(raw), len(OPENING))
            if raw[:begins] != OPENING[:begins] and not (is_torn and raw.startswith(b"\0") and size):
                raise self._wrong(number, FOREIGN)
            if is_torn:
                self.num_cut_bytes = os.fstat(file.fileno()).st_size - size
                self._cut(size)
                break
            self._note(number, raw, source)
            size += len(raw)
        file.seek(size)
        return size

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be repaired: {error.strerror}") from None

    def _note(self, number: int, raw: bytes, source: Source) -> None:
        try:
            value = json.loads(raw)
            id, custom_id, status = value["id"], value["custom_id"], value["response"]["status_code"]
            model = value["response"]["body"].get("model")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self._wrong(number, "cannot be read: remove it, and its request is answered again") from None
        entry = source.by_custom_id.get(custom_id) if isinstance(custom_id, str) else None
        if entry is None or entry.id != id:
            raise self._wrong(number, f"answers another request than any of {source.path}: give another file")
        if custom_id in self.answered:
            raise self._wrong(number, f"answers {custom_id!r} a second time: remove one of the two")
        if model not in (None, self._model):
            raise self._wrong(number, f"was answered by the model {model!r}, this run has {self._model!r}")
        self.answered.add(custom_id)
        self.statuses[cast("int", status)] += 1

    def _wrong(self, number: int, why: str) -> ConfigError:
        return ConfigError(str(self.path), f"line {number} {why}")


def _open(path: Path) -> BinaryIO:
    """Opened for reading and writing, and locked until it is closed or the process ends."""
    is_new = not path.exists()
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_new:  # Its name must survive a power failure as well.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BlockingIOError:
        file.close()
        raise OutputError(f"{path} is being written by another run") from None
    except BaseException:
        file.close()
        raise
    return cast("BinaryIO", file)
