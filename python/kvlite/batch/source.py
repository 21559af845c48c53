"""`Source`: the file of requests, checked line by line before anything runs, then read again as lines are fed.

Owns the outside of a line (custom_id, method, url, body) and the feeding order; a body is checked where its answer is
made. Keeps of a line what tells it from others, never its text: about 300 bytes and 1/32 of the prompt. Called
by run.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

from kvlite.errors import ConfigError, InvalidRequestError
from kvlite.server.fields import Fields, Json, parse_object, shown

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
CUSTOM_ID_CHARS = 512
LINES_MAX = 1 << 22
"""Lines of one file; a longer workload is several files."""
ENVELOPE_BYTES = 4096
"""Of a line beside its body."""
PROBLEMS_SHOWN = 5
KEY_BLOCK_BYTES = 256
"""Prompts that share fewer bytes are neighbours by chance alone."""
ID_BYTES = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the file."""

    number: int
    """From 1, blank lines counted."""
    offset: int
    custom_id: str
    digest: bytes
    """Of the whole line: an answer names what it answers."""
    prefix_key: bytes
    """Sorts prompts that begin alike next to each other: a hash of each block of the prompt's JSON."""

    @property
    def id(self) -> str:
        """Of its answer."""
        return f"batch_req_{self.digest.hex()}"


@dataclass(frozen=True, slots=True)
class Line:
    """What a line asks."""

    custom_id: str
    url: str
    body: Json


class Source:
    """An open batch file whose every line can be read as a request. Raises ConfigError, which lists bad lines."""

    def __init__(self, path: Path, max_body_bytes: int) -> None:
        self.path = path
        self._line_bytes = max_body_bytes + ENVELOPE_BYTES
        self.entries: list[Entry] = []
        """In the order of the file."""
        self.by_custom_id: dict[str, Entry] = {}
        self._num_lines = 0
        self._num_problems = 0
        self._problems: list[str] = []
        try:
            if not path.is_file():
                raise ConfigError(str(path), "no such file" if not path.exists() else "is not a regular file")
            self._file = path.open("rb")
            try:
                self._scan()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, entry: Entry) -> Line:
        """The line again. Raises ConfigError when the file is no longer what it was."""
        try:
            self._file.seek(entry.offset)
            raw = self._file.readline(self._line_bytes + 1)
        except OSError as error:
            raise ConfigError(str(self.path), f"cannot be read: {error.strerror}") from None
        if _digest(raw) != entry.digest:
            raise ConfigError(str(self.path), f"line {entry.number} was changed during the run: run the command again")
        return _line(parse_object(raw.strip()))

    def _scan(self) -> None:
        offset = 0
        while raw := self._file.readline(self._line_bytes + 1):
            self._num_lines += 1
            if len(raw) > self._line_bytes:
                self._refuse(f"is longer than {self._line_bytes} bytes: raise --max-body-bytes")
                raise self._error()  # What follows is the rest of this line.
            if raw.strip():
                self._take(raw, offset)
            if len(self.entries) > LINES_MAX:
                raise ConfigError(str(self.path), f"has more than {LINES_MAX} lines: split it")
            offset += len(raw)
        if self._num_problems:
            raise self._error()

    def _take(self, raw: bytes, offset: int) -> None:
        try:
            values = parse_object(raw.strip())
        except InvalidRequestError as error:
            self._refuse(error.message)  # Its param says "body", which here is a field.
            return
        try:
            line = _line(values)
        except InvalidRequestError as error:
            self._refuse(str(error))
            return
        first = self.by_custom_id.get(line.custom_id)
        if first is not None:
            self._refuse(f"custom_id: {shown(line.custom_id)} is that of line {first.number} already")
            return
        entry = Entry(self._num_lines, offset, line.custom_id, _digest(raw), _prefix_key(line))
        self.entries.append(entry)
        self.by_custom_id[line.custom_id] = entry

    def _refuse(self, why: str) -> None:
        self._num_problems += 1
        if len(self._problems) < PROBLEMS_SHOWN:
            self._problems.append(f"line {self._num_lines}: {why}")

    def _error(self) -> ConfigError:
        more = self._num_problems - len(self._problems)
        rows = [*self._problems, *([f"and {more} more"] if more else [])]
        what = "1 line is" if self._num_problems == 1 else f"{self._num_problems} lines are"
        return ConfigError(str(self.path), "\n  ".join([f"{what} no request, so nothing was run", *rows]))


def feeding_order(entries: Sequence[Entry], max_num_waiting: int) -> list[Entry]:
    """Entries as they are best fed to an engine whose queue holds `max_num_waiting` of them. O(n log n).

    When all fit, the order is the core's business and they come as they are. Otherwise prompts that begin alike come
    one after the other (a walk of the prefix tree, depth first), so that those who share are in the queue together.
    """
    if len(entries) <= max_num_waiting:
        return list(entries)
    return sorted(entries, key=lambda entry: entry.prefix_key)


def _digest(raw: bytes) -> bytes:
    return blake2b(raw.strip(), digest_size=ID_BYTES).digest()


def _line(values: Json) -> Line:
    fields = Fields(values)
    custom_id = fields.text("custom_id", CUSTOM_ID_CHARS)
    if not custom_id:
        fields.refuse("custom_id", custom_id, f"text of 1 to {CUSTOM_ID_CHARS} characters")
    if fields.choice("method", ("POST",)) is None:
        fields.refuse("method", None, "POST")
    url = fields.choice("url", (CHAT_URL, COMPLETION_URL))
    if url is None:
        fields.refuse("url", None, f"{CHAT_URL} or {COMPLETION_URL}")
    body = fields.object("body")
    if body is None:
        fields.refuse("body", None, "an object")
    if unread := fields.unread():
        raise InvalidRequestError(unread[0], "unknown field: allowed are custom_id, method, url, body")
    return Line(custom_id, url, body)


def _prefix_key(line: Line) -> bytes:
    """8 bytes of hash for each block of what the prompt begins with; the body may still be anything."""
    messages = line.body.get("messages")
    if line.url == COMPLETION_URL:
        beginning: object = line.body.get("prompt")
    else:
        beginning = [line.body.get("documents"), messages]
    text = json.dumps([line.url, beginning], ensure_ascii=False).encode()
    blocks = range(0, len(text), KEY_BLOCK_BYTES)
    return b"".join(blake2b(text[at : at + KEY_BLOCK_BYTES], digest_size=8).digest() for at in blocks)
