"""Blended requests through Engine: same ids under every mode, reports that add up, exactness at ratio 1, clean ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvlite import (
    CapacityError,
    Document,
    Engine,
    FinishReason,
    RequestOptions,
    RequestOutput,
    Reuse,
    ReuseMode,
    SamplingParams,
    Segment,
    SegmentHit,
)
from kvlite.agreement import SAMPLES_MIN
from tests.engines import SMALL, essence

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TEXTS = (
    "Nora works as a baker. Nora lives in Oslo.",
    "Ben lives in Rome. Ben owns a boat.",
    "The baker owns a red bicycle. She likes tea.",
)
DOCUMENTS = [Document(text, id=name) for text, name in zip(TEXTS, ("nora", "ben", "baker"), strict=True)]
CROSS = "What does Nora own?"
EVERY_MODE = [Reuse.OFF, Reuse.PREFIX, Reuse.blend(0.3), Reuse.verify(0.3)]
METHODS = ("none", "boundary", "random", "deviation", "attention-deviation", "query", "hybrid")


def asked(question: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Answer the question from the documents."},
        {"role": "user", "content": question},
    ]


@pytest.fixture(scope="module")
def module_engine() -> Any:
    with Engine(**SMALL, deterministic=True) as made:
        yield made


@pytest.fixture
def shipped(module_engine: Engine) -> Any:
    """The shipped model with an empty cache; whatever a test did, nothing may be left of it."""
    module_engine.clear_cache()
    for stored in module_engine.documents.list(0):
        module_engine.library.delete(0, stored.id)
    yield module_engine
    assert clean(module_engine)


def clean(made: Engine) -> bool:
    """Steps until nothing runs; every invariant of the core holds."""
    for _ in range(50):
        if not made.num_unfinished:
            break
        made.step()
    made._core.audit()
    twins = made._twins
    assert not (twins._hidden or twins._verified or twins._sampled or made._inflight.first_logits)
    assert made.step() == [] and made.num_unfinished == 0
    return made.stats().owned_blocks == made.stats().pinned_blocks


def chat(made: Engine, reuse: Reuse | None, question: str = CROSS, **more: Any) -> RequestOutput:
    return made.chat(asked(question), more.pop("params", GREEDY), documents=DOCUMENTS, reuse=reuse, **more)


def hits(output: RequestOutput) -> list[str]:
    assert output.reuse is not None
    return [segment.hit for segment in output.reuse.segments]


def test_every_mode_sees_the_same_ids_and_its_counts_add_up(shipped: Engine) -> None:
    seen = set()
    for reuse in EVERY_MODE:
        shipped.clear_cache()
        output = chat(shipped, reuse)
        report = output.reuse
        assert report is not None and report.mode is reuse.mode
        seen.add(output.prompt_token_ids)
        counts = (report.prefix_tokens, report.blended_tokens, report.recomputed_tokens, report.computed_tokens)
        assert sum(counts) == output.usage.prompt_tokens and min(counts) >= 0
        assert report.exact == (reuse.mode is not ReuseMode.BLEND)
        assert [segment.id for segment in report.segments] == ["nora", "ben", "baker"]
        assert sum(segment.tokens for segment in report.segments) < output.usage.prompt_tokens
        if reuse.mode is ReuseMode.BLEND:
            assert output.usage.cached_tokens == report.blended_tokens + report.prefix_tokens > 0
            assert (report.method, report.ratio) == ("query", 0.3)
    assert len(seen) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_of_one_gives_the_bits_of_full_prefill(shipped: Engine, method: str) -> None:
    params = replace(GREEDY, logprobs=3, ignore_eos=True)
    expected = chat(shipped, Reuse.OFF, params=params)
    shipped.clear_cache()
    if method == "none":
        assert chat(shipped, Reuse.blend(1.0, method), params=params).reuse.ratio == 0.0  # type: ignore[union-attr]
        return
    output = chat(shipped, Reuse.blend(1.0, method), params=params)
    assert essence(output) == essence(expected)
    assert output.reuse is not None and output.reuse.exact and output.reuse.recomputed_tokens > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_recomputes_its_share_of_what_is_reused(shipped: Engine, method: str) -> None:
    report = chat(shipped, Reuse.blend(0.25, method)).reuse
    assert report is not None
    reused = report.blended_tokens + report.recomputed_tokens
    share = 0.0 if method == "none" else 0.25
    assert report.recomputed_tokens == -(-reused * share // 1) and report.method == method


def test_documents_are_made_once_and_hit_in_any_order_and_prompt(shipped: Engine) -> None:
    assert hits(chat(shipped, Reuse.blend())) == [SegmentHit.MADE] * 3
    shuffled = shipped.chat(asked("Where does Ben live?"), GREEDY, documents=DOCUMENTS[::-1], reuse=Reuse.blend())
    assert hits(shuffled) == [SegmentHit.DEVICE] * 3
    other = shipped.chat(
        asked("Where does Ben live?"), GREEDY, RequestOptions(tenant=1), documents=DOCUMENTS, reuse=Reuse.blend()
    )
    assert hits(other) == [SegmentHit.MADE] * 3, "nothing crosses a tenant"
    assert other.text == " Rome"


def test_an_exact_request_never_sees_blended_kv_and_a_blend_takes_the_exact_prefix(shipped: Engine) -> None:
    expected = chat(shipped, Reuse.OFF, params=replace(GREEDY, logprobs=2))
    shipped.clear_cache()
    chat(shipped, Reuse.blend(0.0))
    again = chat(shipped, Reuse.PREFIX, params=replace(GREEDY, logprobs=2))
    assert essence(again) == essence(expected)
    after = chat(shipped, Reuse.blend(0.0))
    assert after.reuse is not None and after.reuse.prefix_tokens >= 32


def test_the_same_blend_again_hits_its_recipe(shipped: Engine) -> None:
    first = chat(shipped, Reuse.blend(0.3), params=replace(GREEDY, logprobs=2))
    again = chat(shipped, Reuse.blend(0.3), params=replace(GREEDY, logprobs=2))
    assert essence(again) == essence(first)
    assert again.reuse is not None and not again.reuse.exact
    assert again.reuse.prefix_tokens > 0 and SegmentHit.RECIPE in hits(again)


def test_precomputed_documents_are_hits_and_may_be_named_by_id(shipped: Engine) -> None:
    made = shipped.precompute([*DOCUMENTS, "Text without an id."])
    assert [(report.id, report.hit) for report in made] == [
        ("nora", False), ("ben", False), ("baker", False), (None, False),
    ]  # fmt: skip
    assert [report.hit for report in shipped.precompute(DOCUMENTS)] == [True] * 3
    named = shipped.chat(asked(CROSS), GREEDY, documents=[Document(id="nora"), Document(id="ben")], reuse=Reuse.blend())
    assert hits(named) == [SegmentHit.DEVICE] * 2
    assert [segment.tokens for segment in named.reuse.segments] == [report.tokens for report in made[:2]]  # type: ignore[union-attr]
    stats = shipped.stats()
    assert stats.num_documents == 3 and stats.num_segments == 4 and stats.blended_tokens > 0


def test_pinned_documents_stay_and_dropped_ones_go() -> None:
    with Engine(**SMALL | {"kv_cache_bytes": 2 << 20}) as small:
        small.precompute(DOCUMENTS[:1], pinned=True)
        small.precompute(DOCUMENTS[1:2])
        for n in range(40):
            small.precompute([f"{TEXTS[2]} It is number {n}."])
        state = [small.library.get(0, name) for name in ("nora", "ben")]
        assert [info and info.state for info in state] == ["ready", "evicted"]
        with pytest.raises(CapacityError, match="pinned"):
            small.precompute([f"{TEXTS[2]} Pinned {n}." for n in range(200)], pinned=True)
        assert small.pin(DOCUMENTS[0], pinned=False) and not small.pin(Document("never seen"))
        assert small.drop(DOCUMENTS[0]) and not small.drop(DOCUMENTS[0])
        assert small.library.get(0, "nora") is None
        small._core.audit()


def test_a_document_dropped_while_in_use_harms_nobody(shipped: Engine) -> None:
    expected = chat(shipped, Reuse.blend(0.3))
    shipped.clear_cache()
    shipped.precompute(DOCUMENTS)
    for steps in range(5):
        request = shipped.prepare_chat(asked(CROSS), GREEDY, documents=DOCUMENTS, reuse=Reuse.blend(0.3)).request
        shipped.add_validated(request)
        deltas = [delta for _ in range(steps) for delta in shipped.step()]
        assert shipped.drop(DOCUMENTS[1])
        while not deltas or deltas[-1].usage is None:
            deltas += shipped.step()
        assert "".join(delta.text for delta in deltas) == expected.text
        assert deltas[-1].finish_reason is FinishReason.STOP
        shipped.clear_cache()
        shipped.precompute(DOCUMENTS)


def test_parts_are_one_prompt_and_lists_of_them_many(shipped: Engine) -> None:
    parts = ["Answer. ", Segment(TEXTS[0], id="x"), shipped.tokenizer.encode("Where?"), Segment([9, 10, 11])]
    single = shipped.generate(parts, GREEDY, reuse=Reuse.blend(0.5))
    assert [(segment.id, segment.hit) for segment in single.reuse.segments] == [("x", "made"), ("1", "made")]  # type: ignore[union-attr]
    shipped.clear_cache()
    made = shipped.precompute([Segment(TEXTS[0], id="x"), Segment([9, 10, 11])])
    assert [(report.id, report.hit) for report in made] == [("x", False), (None, False)] and made[1].tokens == 3
    assert hits(shipped.generate(parts, GREEDY, reuse=Reuse.blend(0.5))) == ["device"] * 2
    both = shipped.generate([parts, "plain text", [5, 6]], GREEDY, reuse=Reuse.blend(0.5))
    assert [len(output.reuse.segments) for output in both] == [2, 0, 0]  # type: ignore[union-attr]
    assert both[0].prompt_token_ids == single.prompt_token_ids
    assert both[1].reuse is not None and both[1].reuse.exact and both[1].prompt == "plain text"
    streamed = list(shipped.stream(parts, GREEDY, reuse=Reuse.blend(0.5)))
    assert streamed[-1].reuse is not None and "".join(delta.text for delta in streamed) == single.text


def test_many_blended_requests_beside_others_give_what_each_gives_alone(shipped: Engine) -> None:
    questions = [f"Where does {name} live?" for name in ("Nora", "Ben", "she", "the baker")]
    reuses = [Reuse.blend(0.2), Reuse.blend(0.4, "boundary"), Reuse.PREFIX, Reuse.blend(0.4, "deviation")]
    requests = [
        shipped.prepare_chat(
            asked(text), replace(GREEDY, logprobs=1), RequestOptions(tenant=n), documents=DOCUMENTS, reuse=reuse
        ).request
        for n, (text, reuse) in enumerate(zip(questions, reuses, strict=True))
    ]
    alone = []
    for request in requests:
        shipped.clear_cache()
        alone.append(essence(shipped._run_all([request], None)[0]))
    shipped.clear_cache()
    assert [essence(output) for output in shipped._run_all(requests, None)] == alone


def test_verify_answers_exactly_and_says_how_the_blend_differs(shipped: Engine) -> None:
    params = replace(GREEDY, logprobs=2, prompt_logprobs=1, n=2)
    expected = chat(shipped, Reuse.OFF, params=params)
    shipped.clear_cache()
    output = chat(shipped, Reuse.verify(0.2), params=params)
    assert essence(output) == essence(expected)
    report = output.reuse
    assert report is not None and report.verify is not None and report.exact and report.fallback is None
    assert report.blended_tokens > 0 and report.verify.kl >= 0 and report.verify.max_logit_difference > 0
    shipped.clear_cache()
    whole = chat(shipped, Reuse.verify(1.0)).reuse
    assert whole is not None and whole.verify is not None
    assert (whole.verify.kl, whole.verify.max_logit_difference, whole.verify.first_difference) == (0.0, 0.0, None)
    assert whole.verify.top1_equal and whole.verify.equal_tokens == whole.verify.exact_tokens
    warm = chat(shipped, Reuse.verify(0.2)).reuse
    assert warm is not None and warm.verify is not None and warm.verify.max_logit_difference > 0, "the cache is warm"


def test_verify_streams_and_parts_and_seeds_end_once(shipped: Engine) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=3)
    parts = [Segment(TEXTS[0]), "Where does Nora live?"]
    deltas = list(shipped.stream(parts, params, reuse=Reuse.verify(0.3)))
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    report = deltas[-1].reuse
    assert report is not None and report.verify is not None
    assert report.verify.exact_tokens == report.verify.blended_tokens == 12
    exact = shipped.generate(parts, params, reuse=Reuse.PREFIX)
    assert tuple(id for delta in deltas for id in delta.token_ids) == exact.token_ids


@pytest.mark.parametrize("reuse", [Reuse.blend(0.3), Reuse.blend(0.3, "deviation"), Reuse.verify(0.3)])
def test_an_abort_in_any_phase_ends_once_and_leaves_nothing(shipped: Engine, reuse: Reuse) -> None:
    expected = chat(shipped, Reuse.blend(0.3))
    for steps in (0, 1, 2, 3, 4, 6):
        shipped.clear_cache()
        request = shipped.prepare_chat(asked(CROSS), GREEDY, documents=DOCUMENTS, reuse=reuse).request
        handle = shipped.add_validated(request)
        deltas = [delta for _ in range(steps) for delta in shipped.step()]
        shipped.abort(handle)
        for _ in range(12):
            deltas += shipped.step()
        ends = [delta for delta in deltas if delta.usage is not None]
        assert [delta.handle for delta in ends] == [handle] and {delta.handle for delta in deltas} == {handle}
        assert clean(shipped)
    shipped.clear_cache()
    assert chat(shipped, Reuse.blend(0.3)).text == expected.text


def test_a_stream_closed_in_any_phase_of_verify_leaves_nothing(shipped: Engine) -> None:
    for taken in range(3):
        stream = shipped.stream([Segment(TEXTS[0]), "Where?"], replace(GREEDY, ignore_eos=True), reuse=Reuse.verify())
        for _ in range(taken):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert clean(shipped)


def test_a_failed_step_ends_its_blends_with_an_error_and_the_next_ones_are_right(
    shipped: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = chat(shipped, Reuse.blend(0.3))
    for reuse in (Reuse.blend(0.3), Reuse.verify(0.3)):
        for steps in range(4):
            shipped.clear_cache()
            request = shipped.prepare_chat(asked(CROSS), GREEDY, documents=DOCUMENTS, reuse=reuse).request
            handle = shipped.add_validated(request)
            deltas = [delta for _ in range(steps) for delta in shipped.step()]
            with monkeypatch.context() as patch:
                patch.setattr(shipped._runner.decoder, "embed", lambda *_: 1 / 0)
                deltas += shipped.step()
            for _ in range(20):
                deltas += shipped.step()
            ends = [delta for delta in deltas if delta.usage is not None]
            assert [delta.handle for delta in ends] == [handle], (reuse, steps)
            assert clean(shipped)
    assert chat(shipped, Reuse.blend(0.3)).text == expected.text


def test_measured_agreement_is_exported_and_below_the_floor_requests_fall_back_to_exact() -> None:
    with Engine(**SMALL, min_agreement=1.0, agreement_sample_ratio=1.0) as guarded:
        asked_for = guarded.validate([Segment(TEXTS[0])], GREEDY, reuse=Reuse.blend(0.15)).blending
        assert asked_for is not None
        for _ in range(3 * SAMPLES_MIN):
            guarded._monitor.record(asked_for.method, asked_for.ratio, False, 1.0)
        exact = chat(guarded, Reuse.blend(0.15))
        assert exact.reuse is not None and exact.reuse.exact and "computed exactly" in (exact.reuse.fallback or "")
        assert exact.reuse.mode is ReuseMode.BLEND and exact.reuse.blended_tokens == 0
        assert clean(guarded)
        guarded.clear_cache()
        other = chat(guarded, Reuse.blend(0.5))
        assert other.reuse is not None and other.reuse.fallback is None and other.reuse.blended_tokens > 0
        assert clean(guarded)
        stats = guarded.stats()
        assert stats.num_agreement_samples == 3 * SAMPLES_MIN + 2, "the exact one was probed, the blended one checked"
        assert stats.num_fallbacks == 1 and stats.kl_divergence is not None and stats.agreement is not None
