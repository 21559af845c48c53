"""The laws of reused text through the engine: the core plans, the runner computes, over a tiny random model.

In deterministic mode an answer is compared bit by bit, its log-probabilities too: with the exact one where every row is
recomputed, with that of a fresh engine elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvlite import Engine, RequestOptions, RequestOutput, Reuse, SamplingParams, Segment
from kvlite.output import Collector
from kvlite.reuse import METHODS
from tests.engines import engine, essence, ids, pool_of

Parts = list[Any]
PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
DOCS = [ids(37, 1), ids(16, 2), ids(21, 3)]
HEAD, GAP, QUESTION = ids(6, 4), ids(3, 5), ids(9, 6)
PARTLY = Reuse.blend(0.2, "query")
REPAIRING = Reuse.blend(0.1, "attention-deviation", decode_rows=3)
EVERY = {name: Reuse.blend(0.2, name) for name in METHODS} | {
    "gradual": Reuse.blend(0.2, "deviation", gradual=2),
    "max over layers": Reuse.blend(0.2, "deviation", check_layer=2, max_over_layers=True),
    "decode stage": REPAIRING,
}
FULLY = Reuse.blend(1.0, "query")
EXACT = Reuse.OFF


def parts(*pieces: Sequence[int], documents: Sequence[Sequence[int]] = DOCS) -> Parts:
    """A prompt; pieces that are documents become segments."""
    return [Segment(list(piece)) if piece in list(documents) else list(piece) for piece in pieces]


PROMPT = parts(HEAD, DOCS[0], DOCS[1], GAP, DOCS[2], QUESTION)
ONE, SHORT, MANY = [77], ids(5, 9), [ids(1 + n, 30 + n) for n in range(12)]
LAYOUTS: dict[str, Parts] = {
    "mixed": PROMPT,
    "starts with a segment": parts(DOCS[0], QUESTION),
    "ends with a segment": parts(HEAD, DOCS[0]),
    "nothing else": parts(DOCS[1]),
    "the same one twice": parts(HEAD, DOCS[2], GAP, DOCS[2], QUESTION),
    "the same one twice in a row": parts(DOCS[2], DOCS[2], QUESTION),
    "one token": parts(HEAD, ONE, GAP, DOCS[0], ONE, QUESTION, documents=[*DOCS, ONE]),
    "shorter than a block": parts(HEAD, SHORT, SHORT, QUESTION, documents=[SHORT]),
    "many": parts(HEAD, *MANY, QUESTION, documents=MANY),
}


def ask(made: Engine, prompt: Parts, reuse: Reuse, params: SamplingParams = PARAMS, **options: Any) -> RequestOutput:
    output = made.generate(_given(prompt), params, RequestOptions(reuse=reuse, **options))
    assert isinstance(output, RequestOutput)
    return output


def fresh(prompt: Parts, reuse: Reuse, params: SamplingParams = PARAMS, **settings: Any) -> Any:
    """The essence of an answer by an engine that has seen nothing."""
    with engine(deterministic=True, **settings) as made:
        return essence(ask(made, prompt, reuse, params))


def _given(prompt: Parts) -> Any:
    return prompt if any(isinstance(part, Segment) for part in prompt) else flat(prompt)


def flat(prompt: Parts) -> list[int]:
    return [token for part in prompt for token in (part.content if isinstance(part, Segment) else part)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_every_row_recomputed_the_answer_is_bit_equal_to_the_exact_one(layout: str) -> None:
    prompt = LAYOUTS[layout]
    with engine(deterministic=True) as made:
        exact = essence(ask(made, prompt, EXACT))
        made.clear_cache()
        cold, warm = ask(made, prompt, FULLY), ask(made, prompt, FULLY)
    assert essence(cold) == exact and essence(warm) == exact
    assert exact == fresh([flat(prompt)], EXACT)
    assert cold.reuse is not None and cold.reuse.recomputed_tokens > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["query", "hybrid", "attention-deviation"])
def test_a_segment_gives_the_same_answer_whether_it_was_there_or_not(method: str, layout: str) -> None:
    """All hits, no hits, some hits, in another order before: what is placed is the same KV."""
    prompt, reuse = LAYOUTS[layout], Reuse.blend(0.2, method)
    cold = fresh(prompt, reuse)
    documents = [part for part in prompt if isinstance(part, Segment)]
    with engine(deterministic=True) as made:
        ask(made, [*documents[::-2], QUESTION[::-1]], Reuse.blend(0.5, "boundary"))
        assert essence(ask(made, prompt, reuse)) == cold
    with engine(deterministic=True) as made:
        ask(made, [QUESTION, *documents, GAP], Reuse.blend(0.0, "none"))
        assert essence(ask(made, prompt, reuse)) == cold


def test_what_was_hit_is_reported_for_every_segment() -> None:
    with engine() as made:
        cold, warm = ask(made, PROMPT, PARTLY), ask(made, parts(GAP, *DOCS[::-1], QUESTION), PARTLY)
        again = ask(made, PROMPT, PARTLY)
    reports = [output.reuse for output in (cold, warm, again)]
    assert all(report is not None for report in reports)
    hits = [[segment.hit.value for segment in report.segments] for report in reports if report is not None]
    assert hits[:2] == [["made"] * 3, ["device"] * 3] and set(hits[2]) <= {"recipe", "device"} and "recipe" in hits[2]
    total = sum(map(len, DOCS))
    first = reports[0]
    assert first is not None and not first.exact
    assert first.recomputed_tokens == -(-total // 5) and first.blended_tokens == total - first.recomputed_tokens


def test_an_identical_prompt_hits_its_own_recipe_and_answers_the_same() -> None:
    with engine(deterministic=True) as made:
        first, second = ask(made, PROMPT, PARTLY), ask(made, PROMPT, PARTLY)
        other = ask(made, PROMPT, Reuse.blend(0.3, "query"))
    assert essence(first) == essence(second)
    hits = [output.reuse.prefix_tokens for output in (first, second, other) if output.reuse is not None]
    assert hits[0] == 0 and hits[1] > len(flat(PROMPT)) - 32
    assert hits[2] < len(HEAD) + len(DOCS[0]), "another ratio is another recipe"


def test_blended_kv_is_never_served_to_an_exact_request() -> None:
    follow_up = [*flat(PROMPT), *ids(4, 40)]
    alone, exact = fresh([follow_up], Reuse.PREFIX), fresh([flat(PROMPT)], Reuse.PREFIX)
    assert alone != fresh(PROMPT, PARTLY), "or this test proves nothing"
    with engine(deterministic=True) as made:
        ask(made, PROMPT, PARTLY)
        after = ask(made, [follow_up], Reuse.PREFIX)
        assert essence(after) == alone and after.usage.cached_tokens <= len(HEAD)
        again = ask(made, [flat(PROMPT)], Reuse.PREFIX)
        assert essence(again) == exact


def test_an_exact_prefix_is_hit_and_what_it_covers_is_not_blended() -> None:
    with engine(deterministic=True) as made:
        ask(made, [flat(PROMPT)[: len(HEAD) + len(DOCS[0]) + 3]], Reuse.PREFIX)
        output = ask(made, PROMPT, PARTLY)
        assert output.reuse is not None and output.reuse.prefix_tokens >= len(HEAD) + len(DOCS[0]) - 15
        reused = output.reuse.blended_tokens + output.reuse.recomputed_tokens
        assert reused == sum(map(len, DOCS)) + len(HEAD) - output.reuse.prefix_tokens
        assert output.reuse.segments[0].hit.value in ("prefix", "device")
        assert essence(ask(made, PROMPT, FULLY)) == fresh(PROMPT, EXACT)


def test_another_tenant_gets_no_hit_and_the_same_one_does() -> None:
    elsewhere = parts(GAP, *DOCS[::-1], QUESTION)
    with engine() as made:
        outputs = [ask(made, prompt, PARTLY, tenant=tenant)
                   for prompt, tenant in ((PROMPT, 1), (PROMPT, 2), (elsewhere, 1), (PROMPT, 1))]  # fmt: skip
    reports = [output.reuse for output in outputs if output.reuse is not None]
    hits = [{segment.hit.value for segment in report.segments} for report in reports]
    assert hits[:3] == [{"made"}, {"made"}, {"device"}] and "recipe" in hits[3]
    assert [report.prefix_tokens for report in reports[:3]] == [0, 0, 0] and reports[3].prefix_tokens > 0


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("tokens", [24, 100])
def test_small_steps_choose_the_rows_that_one_large_step_does(tokens: int, method: str) -> None:
    reuse = EVERY[method]
    small = {"max_num_batched_tokens": tokens, "max_num_seqs": 8}
    assert fresh(PROMPT, reuse, **small) == fresh(PROMPT, reuse, max_num_batched_tokens=512)


@pytest.mark.parametrize("method", EVERY)
def test_neighbours_change_nothing_on_either_side(method: str) -> None:
    reuse = EVERY[method]
    long = replace(PARAMS, max_tokens=12)
    prompts = [PROMPT, [ids(60, 50)], LAYOUTS["the same one twice"], [ids(9, 51)], LAYOUTS["one token"]]
    options = [RequestOptions(reuse=reuse if n % 2 == 0 else Reuse.PREFIX) for n in range(len(prompts))]
    alone = [fresh(prompt, option.reuse or EXACT, long) for prompt, option in zip(prompts, options, strict=True)]
    with engine(deterministic=True, max_num_batched_tokens=96) as made:
        assert run_together(made, prompts, long, options) == alone


def run_together(
    made: Engine, prompts: list[Parts], params: SamplingParams, options: list[RequestOptions]
) -> list[Any]:
    """All at once; essences in the order of the prompts."""
    checked = [made.validate(_given(prompt), params, option) for prompt, option in zip(prompts, options, strict=True)]
    collectors = {made.add_validated(request): Collector(request) for request in checked}
    done = 0
    while done < len(checked):
        for delta in made.step():
            done += collectors[delta.handle].push(delta)
    return [essence(collector.output()) for collector in collectors.values()]


def test_two_choices_of_a_blend_are_those_of_one_each() -> None:
    params = replace(PARAMS, n=2, temperature=1.0, seed=7)
    both = fresh(PROMPT, PARTLY, params)
    first = fresh(PROMPT, PARTLY, replace(params, n=1))
    assert both[1][0] == first[1][0] and both[1][1] != both[1][0]
    assert both == fresh(PROMPT, PARTLY, params, max_num_batched_tokens=24, max_num_seqs=8)


DEEPER = [("deviation", {"check_layer": 2}), ("attention-deviation", {"check_layer": 2}), ("deviation", {"gradual": 2})]


@pytest.mark.parametrize(("method", "options"), [*((method, {}) for method in METHODS), *DEEPER])
def test_a_preempted_blend_goes_on_as_if_nothing_had_been(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, int]
) -> None:
    reuse, long = Reuse.blend(0.2, method, **options), replace(PARAMS, max_tokens=60)
    prompts = [PROMPT, parts(*DOCS[::-1], QUESTION), parts(GAP, DOCS[1], QUESTION), parts(DOCS[2], HEAD, QUESTION)]
    alone = [fresh(prompt, reuse, long) for prompt in prompts]
    small = pool_of(27)
    monkeypatch.setattr("kvlite.startup.measure_swap_cost", lambda *_: 0)
    for host in (0, 2 * small):
        with engine(deterministic=True, kv_cache_bytes=small, host_cache_bytes=host, reserve_tokens=1) as made:
            assert run_together(made, prompts, long, [RequestOptions(reuse=reuse)] * 4) == alone
            stats = made.stats()
            assert stats.num_preemptions > 0 and (stats.demoted_blocks > 0) == (host > 0), "or this test proves nothing"


@pytest.mark.parametrize("method", ["deviation", "attention-deviation"])
def test_a_preempted_blend_with_all_rows_recomputed_is_exact(method: str) -> None:
    long = replace(PARAMS, max_tokens=60)
    prompts = [PROMPT, parts(*DOCS[::-1], QUESTION), parts(GAP, DOCS[1], QUESTION), parts(DOCS[2], HEAD, QUESTION)]
    alone = [fresh(prompt, EXACT, long) for prompt in prompts]
    options = [RequestOptions(reuse=Reuse.blend(1.0, method))] * 4
    with engine(deterministic=True, kv_cache_bytes=pool_of(27), reserve_tokens=1) as made:
        assert run_together(made, prompts, long, options) == alone
        assert made.stats().num_preemptions > 0


def test_decode_steps_of_the_decode_stage_compute_further_reused_rows() -> None:
    long = replace(PARAMS, max_tokens=8)
    with engine(deterministic=True) as made:
        seen = _watch(made)
        output = ask(made, PROMPT, REPAIRING, long)
        steps = [starts[-1] for starts, _, _, samples in seen if samples][1:]
        assert steps == [4] * 7 and len(output.token_ids) == 8
        again = ask(made, PROMPT, REPAIRING, long)
        exact = ask(made, [flat(PROMPT)], Reuse.PREFIX, long)
        assert exact.usage.cached_tokens <= len(HEAD)
    assert essence(exact) == fresh([flat(PROMPT)], EXACT, long)
    assert essence(again) == essence(output) != fresh(PROMPT, Reuse.blend(0.1, "attention-deviation"), long)


def test_choices_of_the_decode_stage_repair_copies_of_their_own() -> None:
    params = replace(PARAMS, n=2, temperature=1.0, seed=7, max_tokens=8)
    both, first = fresh(PROMPT, REPAIRING, params), fresh(PROMPT, REPAIRING, replace(params, n=1))
    assert both[1][0] == first[1][0] and both[1][1] != both[1][0]


def test_a_store_without_room_makes_holes_and_the_answer_is_exact() -> None:
    with engine(deterministic=True, segment_cache_ratio=0.0) as made:
        output = ask(made, PROMPT, PARTLY)
    assert output.reuse is not None
    assert [segment.hit.value for segment in output.reuse.segments] == ["computed"] * 3
    assert essence(output) == fresh(PROMPT, EXACT)


def test_segments_evicted_between_two_questions_are_made_again() -> None:
    others = [parts(document, QUESTION, documents=[document]) for document in (ids(90, 60 + n) for n in range(6))]
    with engine(deterministic=True, kv_cache_bytes=pool_of(30), segment_cache_ratio=0.4) as made:
        first = ask(made, PROMPT, PARTLY)
        for other in others:
            ask(made, other, PARTLY)
        again = ask(made, PROMPT, PARTLY)
    assert essence(again) == essence(first)
    assert again.reuse is not None and "made" in {segment.hit.value for segment in again.reuse.segments}


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3", "mistral"])
def test_other_families_keep_the_first_law_too(name: str) -> None:
    with engine(name, deterministic=True) as made:
        exact = essence(ask(made, PROMPT, EXACT))
        made.clear_cache()
        assert essence(ask(made, PROMPT, PARTLY)) != exact
        assert essence(ask(made, PROMPT, FULLY)) == exact


def test_the_work_of_a_blend_depends_on_lengths_alone() -> None:
    """The rows of every plan, step by step, for two prompts of the same lengths."""
    shapes: list[list[Any]] = []
    for shift in (0, 100):
        documents = [ids(len(document), shift + n) for n, document in enumerate(DOCS)]
        prompt = parts(HEAD, *documents, QUESTION, documents=documents)
        with engine(max_num_batched_tokens=64) as made:
            shapes.append(_watch(made))
            ask(made, prompt, PARTLY)
    assert shapes[0] == shapes[1] and len(shapes[0]) > 5


def _watch(made: Engine) -> list[Any]:
    seen: list[Any] = []
    run: Callable[..., Any] = made._runner.run

    def watching(arena: Any, plan: Any) -> Any:
        seen.append((plan.query_start.tolist(), len(plan.place), plan.score[:, 2:5].tolist(), len(plan.sample)))
        return run(arena, plan)

    made._runner.run = watching  # type: ignore[method-assign]
    return seen
