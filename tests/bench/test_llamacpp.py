"""llama.cpp's own protocol: ids, counts and endings; and a conversion that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvlite.bench.client import Address, Piece, RequestError
from kvlite.bench.errors import TargetError
from kvlite.bench.llamacpp import gguf, parse, sender
from kvlite.bench.workloads import Job
from tests.bench.test_client import against, chunked, event, plain


def part(predicted: int, *tokens: int, **more: Any) -> dict[str, Any]:
    return {"tokens": list(tokens), "tokens_predicted": predicted, "stop": False} | more


END = part(4, stop=True, tokens_evaluated=9, timings={"cache_n": 5})


async def collect(address: Address) -> list[Piece]:
    return [piece async for piece in sender(address, "m")(Job((7, 8), 4))]


def test_ids_come_back_and_a_token_without_an_event_is_counted_with_the_next() -> None:
    pieces, sent = against(chunked(event(part(1, 30)), event(part(3, 32)), event(END)), collect)
    assert [(piece.num_tokens, piece.token_ids) for piece in pieces] == [(1, (30,)), (2, (32,)), (1, ())]
    usage = {"completion_tokens": 4, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}
    assert pieces[-1].usage == usage
    asked = json.loads(sent.split(b"\r\n\r\n")[1])
    assert (asked["prompt"], asked["n_predict"], asked["ignore_eos"], asked["top_k"]) == ([7, 8], 4, True, 1)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (chunked(event(part(1, 30))), "without its last event"),
        (chunked(event({"error": {"message": "no slot"}})), "no slot"),
        (plain(b'{"error": {"message": "Loading model"}}', "503 Unavailable"), "HTTP 503: Loading model"),
        (chunked(event({"choices": []})), "no part of a completion"),
    ],
)
def test_a_failed_answer_says_why(answer: bytes, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        against(answer, collect)


def test_an_event_that_is_no_object_is_refused() -> None:
    with pytest.raises(RequestError, match="no part of a completion"):
        parse(b"[1]", 0)


def test_a_conversion_that_fails_leaves_no_file_and_says_its_last_line(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (tmp_path / "llamacpp").mkdir()
    with pytest.raises(TargetError, match="no conversion to bf16, status 1: ModuleNotFoundError"):
        gguf(tmp_path / "llamacpp", model, "bfloat16")
    assert not list((tmp_path / "gguf").iterdir())
