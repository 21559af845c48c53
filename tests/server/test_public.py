"""--public-documents: the file is checked before the model loads, and its documents are there before the server is."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, ConfigError
from kvlite.reuse_types import Document
from kvlite.server.public import publish, read_public_documents

from .fakes import FakeEngine


def read(tmp_path: Path, *lines: Any, **settings: Any) -> list[Document]:
    path = tmp_path / "public.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_public_documents(EngineConfig(public_documents=str(path), **settings))


def test_each_line_is_a_document_and_blank_ones_are_none(tmp_path: Path):
    documents = read(tmp_path, {"id": "a", "text": "x"}, "", {"id": "b", "title": "B", "text": "y"}, "")
    assert documents == [Document("x", "a"), Document("y", "b", "B")]
    assert read_public_documents(EngineConfig()) == []


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], "document 1: body: not JSON"),
        ([{"id": "a", "text": "x"}, {"text": "y"}], "document 2: id: "),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "id 'a' appears twice"),
        ([{"id": "a", "text": ""}], "document 1: text: "),
        ([{"id": "a", "text": "x" * 2000}], "document 1 is larger than 1024 bytes"),
        ([{"id": str(n), "text": "x"} for n in range(4)], "more than 3 documents"),
    ],
)
def test_a_file_that_cannot_be_published_says_which_document_and_why(lines: list[Any], says: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *lines, max_body_bytes=1024, max_stored_documents=3)
    assert caught.value.field == "public_documents"
    assert says in caught.value.message


def test_every_document_is_published_for_all():
    engine = FakeEngine()
    asyncio.run(publish(engine, [Document("x", str(n)) for n in range(20)]))  # type: ignore[arg-type]
    assert [info.id for info in engine.list_documents(5)] == [str(n) for n in range(20)]
    assert all(info.public for info in engine.list_documents(5))


def test_a_document_that_does_not_fit_stops_the_start_by_name():
    engine = FakeEngine()
    engine.failure = CapacityError("the store is full")
    with pytest.raises(ConfigError, match="document 'b' cannot be kept: the store is full"):
        asyncio.run(publish(engine, [Document("x", "a"), Document("bad", "b")]))  # type: ignore[arg-type]
