"""Bad input and settings of reuse: clear errors that name their field, and limits that are met without harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvlite import (
    ConfigError,
    Document,
    Engine,
    InvalidRequestError,
    RequestOptions,
    Reuse,
    ReuseMode,
    Segment,
    SegmentHit,
    UnknownDocumentError,
)
from tests.engines import MAX_LEN, SMALL, engine, ids, pool_of
from tests.test_engine_reuse import CROSS, DOCUMENTS, GREEDY, asked, chat, hits


@pytest.fixture(scope="module")
def shipped() -> Any:
    with Engine(**SMALL) as made:
        yield made
        assert made.num_unfinished == 0
        made._core.audit()


@pytest.mark.parametrize(
    ("reuse", "param", "said"),
    [
        (Reuse.blend(method="magic"), "reuse_options.method", "magic"),
        (Reuse.blend(0.1, "query", width=3), "reuse_options.width", "no option"),
        (Reuse.verify(0.1, "deviation", check_layer=99), "reuse_options.check_layer", "99"),
        (Reuse(ReuseMode.PREFIX, 0.5), "reuse_options", "need reuse=blend"),
        ("blend", "reuse", "blend"),
    ],
)
def test_bad_reuse_names_its_field_and_starts_nothing(shipped: Engine, reuse: Any, param: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        chat(shipped, reuse)
    assert caught.value.param == param and shipped.num_unfinished == 0


@pytest.mark.parametrize(
    ("documents", "param", "said"),
    [
        ([Document("a", id="x"), Document("b", id="x")], "documents[1].id", "occurs twice"),
        ([Document("a"), Document(id="lost")], "documents[1].id", "does not exist"),
        ([Document("word " * 3000)], "documents[0].text", "at most 2047"),
        ([Document("a")] * 65, "documents", "at most 64"),
        ("text", "documents", "list"),
        ([{"text": "a"}], "documents[0]", r"kvlite\.Document"),
        ([""], "document.text", "empty"),
        (["half \ud800"], "prompt", "cannot be tokenised"),
    ],
)
@pytest.mark.parametrize("reuse", [Reuse.OFF, Reuse.blend()])
def test_bad_documents_are_refused_by_their_index_under_every_mode(
    shipped: Engine, documents: Any, param: str, said: str, reuse: Reuse
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        shipped.chat(asked(CROSS), GREEDY, documents=documents, reuse=reuse)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


def test_another_tenants_document_is_as_unknown_as_none(shipped: Engine) -> None:
    shipped.precompute(DOCUMENTS[:1], tenant=1)
    said = []
    for id in ("nora", "none"):
        with pytest.raises(UnknownDocumentError) as caught:
            shipped.chat(asked(CROSS), GREEDY, documents=[Document(id=id)])
        said.append(str(caught.value).replace(id, ""))
    assert said[0] == said[1]
    named = shipped.chat(asked(CROSS), GREEDY, RequestOptions(tenant=1), documents=[Document(id="nora")])
    assert named.reuse is not None
    assert shipped.drop(Document(id="nora"), tenant=1)


def test_a_blend_without_documents_is_exact_and_prompt_logprobs_need_an_exact_prompt(shipped: Engine) -> None:
    output = shipped.generate("Nora lives in", GREEDY, reuse=Reuse.blend())
    assert output.reuse is not None and output.reuse.exact and output.reuse.mode is ReuseMode.BLEND
    with pytest.raises(InvalidRequestError, match="not computed whole") as caught:
        chat(shipped, Reuse.blend(), params=replace(GREEDY, prompt_logprobs=1))
    assert caught.value.param == "prompt_logprobs"


def test_the_engines_settings_say_what_requests_leave_open() -> None:
    with Engine(**SMALL, reuse="blend", reuse_method="boundary", recompute_ratio=0.5) as blending:
        report = chat(blending, None).reuse
        assert report is not None and (report.mode, report.method, report.ratio) == (ReuseMode.BLEND, "boundary", 0.5)
        with_logprobs = chat(blending, None, params=replace(GREEDY, prompt_logprobs=1))
        assert with_logprobs.prompt_logprobs is not None and with_logprobs.reuse is not None
        assert with_logprobs.reuse.exact and "prompt_logprobs" in (with_logprobs.reuse.fallback or "")
        assert chat(blending, Reuse.blend(method="query")).reuse.ratio == 0.5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"reuse_method: .*magic"):
        engine(reuse_method="magic")
    with pytest.raises(ConfigError, match=r"canonical_prefix: has \d+ tokens"):
        engine(canonical_prefix="word " * 400)
    with pytest.raises(ConfigError, match="recompute_ratio"):
        engine(recompute_ratio="nan")


def test_a_store_without_room_computes_documents_as_text_and_says_so() -> None:
    with engine(kv_cache_bytes=pool_of(16), segment_cache_ratio=0.1, deterministic=True) as narrow:
        parts = [ids(5, 1), Segment(ids(60, 2), id="long"), Segment(ids(4, 3), id="short"), ids(6, 4)]
        output = narrow.generate(parts, GREEDY, reuse=Reuse.blend(0.0))
        assert output.reuse is not None
        assert hits(output)[0] is SegmentHit.COMPUTED
        exact = narrow.generate(parts, GREEDY, reuse=Reuse.OFF)
        assert exact.reuse is not None and exact.reuse.computed_tokens == 75
        with pytest.raises(InvalidRequestError, match="store of segments holds") as caught:
            narrow.precompute(["word " * 40])
        assert caught.value.param == "document.text"
        with pytest.raises(InvalidRequestError, match="fit the model"):
            narrow.precompute(["word " * 2 * MAX_LEN])
        narrow._core.audit()
