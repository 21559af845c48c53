"""Lines of batch files, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvlite.batch.source import COMPLETION_URL, Source

BODY_BYTES = 1 << 16


def line(custom_id: str, prompt: Any = "Nora lives in", **body: Any) -> dict[str, Any]:
    """A request for a completion."""
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETION_URL, "body": {"prompt": prompt, **body}}


def write(path: Path, *lines: Any) -> Path:
    """A file of those lines; text goes in as it is."""
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def source_of(path: Path, *lines: Any) -> Source:
    """An open source of those lines."""
    return Source(write(path, *lines), BODY_BYTES)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by custom_id; every line is whole, and none is there twice."""
    raw = path.read_bytes()
    assert raw.endswith(b"\n") or not raw
    values = [json.loads(each) for each in raw.splitlines()]
    assert len({value["custom_id"] for value in values}) == len(values)
    return {value["custom_id"]: value for value in values}
