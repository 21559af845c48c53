"""A request that moves between two engines gives what it gives unmoved, in every state, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvlite import CapacityError, Delta, Engine, EngineClosedError, FinishReason, InvalidRequestError, SamplingParams
from kvlite.migration import How
from kvlite.request import ValidatedRequest
from tests.engines import engine, essence, ids, pool_of
from tests.moving import Journey, assert_clean, clear, travel

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=10, ignore_eos=True)
STYLES = {
    "greedy": GREEDY,
    "seeded, with log-probabilities": replace(SEEDED, logprobs=3),
    "penalties": replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
    "truncated": replace(SEEDED, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=-3),
    "bias and min_tokens": replace(GREEDY, logit_bias={9: 3.0, 6: 5.0}, min_tokens=6, ignore_eos=False),
    "three choices": replace(SEEDED, n=3, logprobs=1),
    "prompt log-probabilities": replace(GREEDY, prompt_logprobs=2, n=2, temperature=0.9, seed=3),
}
PROMPT = ids(50, 3)
CHUNKED: dict[str, Any] = {"deterministic": True, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def made_pair() -> Iterator[list[Engine]]:
    with engine(**CHUNKED) as first, engine(**CHUNKED) as second:
        yield [first, second]


@pytest.fixture
def pair(made_pair: list[Engine]) -> Iterator[list[Engine]]:
    clear(made_pair)
    yield made_pair
    assert_clean(made_pair)


@pytest.fixture(scope="module")
def truth(made_pair: list[Engine]) -> dict[str, Any]:
    """What each style gives on one engine."""
    return {name: essence(made_pair[0].generate(PROMPT, params)) for name, params in STYLES.items()}


def request(pair: list[Engine], params: SamplingParams = GREEDY, prompt: Any = PROMPT) -> ValidatedRequest:
    return pair[0].validate(prompt, params)


@pytest.mark.parametrize("how", ["copy", "replay"])
@pytest.mark.parametrize("style", STYLES)
def test_a_move_before_any_step_changes_no_bit(pair: list[Engine], truth: dict[str, Any], style: str, how: How) -> None:
    moved = 0
    for step in range(14):
        clear(pair)
        output, journey = travel(pair, request(pair, STYLES[style]), {step}, how)
        assert essence(output) == truth[style], f"moved before step {step}"
        moved += len(journey.reports)
    assert moved >= 10


@pytest.mark.parametrize("style", STYLES)
def test_moving_back_and_forth_before_every_step_changes_no_bit(
    pair: list[Engine], truth: dict[str, Any], style: str
) -> None:
    output, journey = travel(pair, request(pair, STYLES[style]), range(1, 1000))
    assert essence(output) == truth[style]
    assert len(journey.reports) >= 5
    assert output.usage.completion_tokens == sum(len(choice.token_ids) for choice in output.outputs)


def test_a_warm_destination_is_sent_only_what_it_lacks(pair: list[Engine], truth: dict[str, Any]) -> None:
    pair[1].generate(PROMPT, replace(GREEDY, max_tokens=1))
    output, journey = travel(pair, request(pair), {6})
    (report,) = journey.reports
    assert essence(output) == truth["greedy"]
    assert (report.how, report.hit_tokens) == ("copy", 48) and report.blocks <= 2
    assert report.bytes == report.blocks * pair[0]._runner.pool.shape.bytes_per_block


def test_the_report_says_what_was_copied(pair: list[Engine]) -> None:
    _, journey = travel(pair, request(pair), {8})
    (report,) = journey.reports
    assert (report.how, report.stages, report.blocks, report.hit_tokens) == ("copy", 2, 4, 0)
    assert 50 < report.tokens < 60 and report.gap_s > 0
    clear(pair)
    _, journey = travel(pair, request(pair), {8}, "replay")
    (report,) = journey.reports
    assert (report.how, report.stages, report.blocks, report.bytes) == ("replay", 0, 0, 0)
    clear(pair)
    _, journey = travel(pair, request(pair), {0})
    assert journey.reports[0].how == "replay", "what waits has nothing to copy"


@pytest.mark.parametrize("how", ["copy", "replay"])
def test_a_stop_string_may_begin_on_one_engine_and_end_on_the_other(pair: list[Engine], how: How) -> None:
    plain = pair[0].generate(PROMPT, replace(GREEDY, max_tokens=24))
    stop = plain.text[6:14]
    assert len(stop) == 8
    params = replace(GREEDY, max_tokens=24, stop=[stop, "never"], logprobs=0)
    expected = pair[0].generate(PROMPT, params)
    assert expected.outputs[0].finish_reason is FinishReason.STOP and expected.outputs[0].stop_reason == stop
    for step in range(4, 12):
        clear(pair)
        output, _ = travel(pair, request(pair, params), {step}, how)
        assert essence(output) == essence(expected) and output.outputs[0].stop_reason == stop
    clear(pair)
    assert essence(travel(pair, request(pair, params), range(1000), how)[0]) == essence(expected)


def test_choices_that_ended_stay_behind_and_the_rest_moves(pair: list[Engine]) -> None:
    params = replace(SEEDED, n=3, max_tokens=30, ignore_eos=False, logit_bias={6: 4.5})
    expected = pair[0].generate(PROMPT, params)
    lengths = sorted(len(choice.token_ids) for choice in expected.outputs)
    assert lengths[0] < lengths[-1], "the choices must end at different times"
    for step in range(4, 4 + lengths[-1], 2):
        clear(pair)
        output, _ = travel(pair, request(pair, params), {step})
        assert essence(output) == essence(expected) and output.usage == replace(
            expected.usage, cached_tokens=output.usage.cached_tokens
        )


def test_an_open_stream_goes_on_as_if_nothing_had_happened(pair: list[Engine], truth: dict[str, Any]) -> None:
    stream = pair[0].stream(PROMPT, GREEDY)
    deltas: list[Delta] = [next(stream)]
    here, there = pair
    for delta in stream:
        deltas.append(delta)
        if delta.usage is None:
            here.migrate(stream, there)
            here, there = there, here
    text = "".join(delta.text for delta in deltas)
    assert text == truth["greedy"][1][0][0] and [delta.usage is not None for delta in deltas].count(True) == 1


def test_neighbours_on_both_sides_see_nothing(pair: list[Engine], truth: dict[str, Any]) -> None:
    streams = [one.stream(ids(30, 9), SEEDED) for one in pair]
    expected = [essence(one.generate(ids(30, 9), SEEDED))[1][0][1] for one in pair]
    firsts = [next(stream) for stream in streams]
    journey = Journey(pair, request(pair))
    for _ in range(4):
        journey.step()
        journey.move()
    assert essence(journey.finish()) == truth["greedy"]
    for stream, first, tokens in zip(streams, firsts, expected, strict=True):
        assert tuple(id for delta in [first, *stream] for id in delta.token_ids) == tokens


def test_a_stream_that_is_closed_after_its_move_ends_where_it_is(pair: list[Engine]) -> None:
    stream = pair[0].stream(PROMPT, GREEDY)
    next(stream)
    pair[0].migrate(stream, pair[1])
    stream.close()
    assert pair[0].num_unfinished == 0 and list(stream) == []
    pair[1].step()
    assert pair[1].stats().finished[FinishReason.CANCELLED] >= 1


def test_a_stream_that_is_dropped_after_its_move_ends_where_it_is(pair: list[Engine]) -> None:
    stream = pair[0].stream(PROMPT, GREEDY)
    next(stream)
    pair[0].migrate(stream, pair[1])
    del stream
    pair[1].step()
    assert pair[1].num_unfinished == 0


def test_aborting_after_a_move_ends_it_once(pair: list[Engine]) -> None:
    journey = Journey(pair, request(pair))
    for _ in range(6):
        journey.step()
    gone = journey.handle
    assert journey.move()
    assert not pair[0].abort(gone) and pair[1].abort(journey.handle)
    assert journey.finish().outputs[0].finish_reason is FinishReason.CANCELLED


# States other than running


def test_a_request_that_waits_moves_to_where_there_is_room(truth: dict[str, Any]) -> None:
    with engine(**CHUNKED, max_num_seqs=1) as full, engine(**CHUNKED) as free:
        blocking = full.stream(ids(20, 5), replace(GREEDY, max_tokens=60))
        next(blocking)
        journey = Journey([full, free], request([full, free]))
        journey.step()
        assert full.num_waiting == 1
        assert journey.move() and journey.reports[0].how == "replay"
        assert full.stats().num_waiting == 0
        assert essence(journey.finish()) == truth["greedy"]
        assert len(list(blocking)) == 59
        assert_clean([full, free])


@pytest.mark.parametrize("how", ["copy", "replay"])
@pytest.mark.parametrize("num_choices", [1, 4])
def test_a_preempted_request_moves(num_choices: int, how: How) -> None:
    """One that waits again, and one of which some choices run."""
    params = replace(SEEDED, max_tokens=40, n=num_choices)
    with engine(**CHUNKED) as free:
        expected = essence(free.generate(ids(30, 3), params))
    tight = CHUNKED | {"kv_cache_bytes": pool_of(12), "reserve_tokens": 0}
    with engine(**tight) as small, engine(**CHUNKED) as free:
        rivals = [small.stream(ids(30, n), replace(GREEDY, max_tokens=40)) for n in range(2 if num_choices == 1 else 0)]
        firsts = [next(rival) for rival in rivals]
        journey = Journey([small, free], small.validate(ids(30, 3), params))
        while small.stats().num_preemptions == 0:
            journey.step()
            assert not journey.ended, "the pool is too large for this test"
        assert journey.move(how)
        assert journey.reports[0].how == ("replay" if num_choices == 1 else how)
        assert essence(journey.finish()) == expected
        for rival, first in zip(rivals, firsts, strict=True):
            assert sum(len(delta.token_ids) for delta in [first, *rival]) == 40
        assert_clean([small, free])


def test_a_preempted_request_comes_back_from_elsewhere_and_goes_on() -> None:
    long = replace(SEEDED, n=3, max_tokens=40)
    with engine(**CHUNKED) as free:
        expected = essence(free.generate(PROMPT, long))
    with engine(**CHUNKED, kv_cache_bytes=pool_of(12)) as small, engine(**CHUNKED) as free:
        output, journey = travel([free, small], free.validate(PROMPT, long), range(5, 60, 7))
        assert essence(output) == expected and len(journey.reports) >= 3
        assert_clean([small, free])


# Refusals


def test_what_cannot_move_is_refused_and_goes_on(pair: list[Engine], truth: dict[str, Any]) -> None:
    first, second = pair
    journey = Journey(pair, request(pair))
    journey.step()
    unread = first.stream(PROMPT, GREEDY)
    for source, wanted, to, said in (
        (first, journey.handle, first, "the engine that the request is on"),
        (second, journey.handle, first, "unknown on this engine, or has ended"),
        (first, 12345, second, "12345 is unknown"),
        (first, unread, second, "has not started"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            source.migrate(wanted, to)
    with pytest.raises(InvalidRequestError, match="not one of auto, copy, replay"):
        first.migrate(journey.handle, second, how="fly")  # type: ignore[arg-type]
    assert essence(journey.finish()) == truth["greedy"]
    with pytest.raises(InvalidRequestError, match="has ended"):
        first.migrate(journey.handle, second)


def test_a_stream_that_moved_cannot_be_moved_from_where_it_was(pair: list[Engine]) -> None:
    stream = pair[0].stream(PROMPT, GREEDY)
    next(stream)
    pair[0].migrate(stream, pair[1])
    with pytest.raises(InvalidRequestError, match="not on this engine"):
        pair[0].migrate(stream, pair[1])
    stream.close()


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("qwen2", {}, "shape|model"),
        ("llama2", {"block_size": 32}, "shape"),
        ("llama2", {"dtype": "bfloat16"}, "shape"),
        ("llama2", {"max_model_len": 55}, "max_tokens"),
        ("llama2", {"max_logprobs": 1}, "logprobs"),
        ("llama2", {"max_n": 1}, "n: 2"),
    ],
)
def test_an_engine_that_could_not_serve_it_is_no_destination(
    pair: list[Engine], name: str, overrides: dict[str, Any], said: str
) -> None:
    params = replace(SEEDED, n=2, logprobs=2)
    expected = essence(pair[0].generate(PROMPT, params))
    with engine(name, **(CHUNKED | overrides)) as other:
        journey = Journey(pair, request(pair, params))
        for _ in range(6):
            journey.step()
        with pytest.raises(InvalidRequestError, match=said):
            pair[0].migrate(journey.handle, other)
        assert essence(journey.finish()) == expected
        assert_clean([other])


def test_a_closed_engine_is_neither_source_nor_destination(pair: list[Engine]) -> None:
    closed = engine()
    closed.close()
    handle = pair[0].add(PROMPT, GREEDY)
    for source, target in ((pair[0], closed), (closed, pair[0])):
        with pytest.raises(EngineClosedError):
            source.migrate(handle, target)
    pair[0].abort(handle)


@pytest.mark.parametrize("filled", ["blocks", "rows", "queue"])
def test_a_destination_without_room_leaves_it_where_it_was(
    pair: list[Engine], truth: dict[str, Any], filled: str
) -> None:
    small: dict[str, Any] = {
        "blocks": {"kv_cache_bytes": pool_of(8)}, "rows": {"max_num_seqs": 1}, "queue": {"max_num_waiting": 1},
    }[filled]  # fmt: skip
    with engine(**(CHUNKED | small)) as full:
        held = full.stream(ids(70, 5), replace(GREEDY, max_tokens=50))
        next(held)
        journey = Journey([pair[0], full], request(pair))
        if filled == "queue":
            full.add(ids(5), GREEDY)
        else:
            for _ in range(6):
                journey.step()
        with pytest.raises(CapacityError):
            pair[0].migrate(journey.handle, full)
        assert essence(journey.finish()) == truth["greedy"]
        assert sum(len(delta.token_ids) for delta in held) == 49
        while full.num_unfinished:
            full.step()
        assert_clean([full])
