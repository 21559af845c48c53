"""The kvlite block and the usage: whole answers, streams, several prompts."""

from dataclasses import replace

import pytest

from kvlite.reuse_types import ReuseMode, ReuseReport, SegmentHit, SegmentReport, VerifyReport

from .fakes import CHAT, FakeEngine, Reply, answer, run

CHAT_PATH = "/v1/chat/completions"


def one(engine: FakeEngine, path: str, body: object) -> Reply:
    return run(engine, lambda client: client.post(path, body))


BLENDED = ReuseReport(
    ReuseMode.BLEND, False, 16, 80, 14, 10, (SegmentReport("lease", 94, SegmentHit.DEVICE),), "query", 0.15
)
VERIFIED = replace(
    BLENDED, mode=ReuseMode.VERIFY, verify=VerifyReport(0.25, False, 1.5, 1, 3, 4, (5, 6, 7, 8), "Rome"), fallback="why"
)


def test_a_blended_answer_says_what_was_reused():
    engine = FakeEngine([answer(prompt=120, cached=96, reuse=BLENDED)], warnings=("no place for documents",))
    body = CHAT | {"reuse": "blend", "documents": [{"id": "lease", "text": "x"}], "colour": 1}
    reply = one(engine, CHAT_PATH, body)
    assert reply.json["kvlite"] == {
        "reuse": "blend", "exact": False, "prefix_tokens": 16, "blended_tokens": 80, "recomputed_tokens": 14,
        "computed_tokens": 10, "segments": [{"id": "lease", "tokens": 94, "hit": "device"}], "method": "query",
        "recompute_ratio": 0.15,
    }  # fmt: skip
    assert reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert reply.json["warnings"] == ['unknown field "colour" was ignored', "no place for documents"]
    assert [document.id for document in engine.documents[0]] == ["lease"]


def test_a_verified_answer_says_how_the_blended_one_differs():
    block = one(FakeEngine([answer(reuse=VERIFIED)]), CHAT_PATH, CHAT | {"reuse": "verify"}).json["kvlite"]
    assert block["reuse"] == "verify"
    assert block["fallback"] == "why"
    assert block["verify"] == {
        "kl": 0.25, "top1_equal": False, "max_logit_difference": 1.5, "equal_tokens": 1, "exact_tokens": 3,
        "blended_tokens": 4, "first_difference": 1, "blended_text": "Rome",
    }  # fmt: skip


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_last_chunk_of_a_stream_has_the_reuse(include_usage: bool):
    body = CHAT | {"stream": True, "reuse": "blend"}
    if include_usage:
        body |= {"stream_options": {"include_usage": True}}
    *chunks, last = one(FakeEngine([answer(reuse=BLENDED)]), CHAT_PATH, body).events
    assert last["kvlite"]["blended_tokens"] == 80
    assert ("usage" in last) == include_usage
    assert bool(last["choices"]) != include_usage
    assert not any("kvlite" in chunk for chunk in chunks)


def test_the_prompts_of_one_call_add_up():
    exact = ReuseReport(ReuseMode.PREFIX, True, 3, 0, 0, 4)
    scripts = [answer(prompt=7, cached=3, reuse=exact), answer(prompt=5, cached=0)]
    body = one(FakeEngine(scripts), "/v1/completions", {"prompt": ["a", "b"]}).json
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert body["kvlite"] == {
        "reuse": "prefix", "exact": True, "prefix_tokens": 3, "blended_tokens": 0, "recomputed_tokens": 0,
        "computed_tokens": 9,
    }  # fmt: skip


def test_the_last_prompt_of_a_stream_brings_the_sum():
    scripts = [answer(prompt=7, cached=3), answer(prompt=5, cached=1)]
    events = one(FakeEngine(scripts), "/v1/completions", {"prompt": ["a", "b"], "stream": True}).events
    blocks = [event["kvlite"] for event in events if "kvlite" in event]
    assert [block["prefix_tokens"] for block in blocks] == [4]
    assert "kvlite" in events[-1]
