"""Requests that blend segments move in every state; so do those that are compared, or are refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvlite import Document, Engine, InvalidRequestError, Reuse, SamplingParams
from kvlite.migration import How
from kvlite.request import ValidatedRequest
from tests.engines import SMALL, essence
from tests.moving import Journey, assert_clean, clear, travel

GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
TEXTS = (
    "Nora works as a baker. Nora lives in Oslo.",
    "Ben lives in Rome. Ben owns a boat.",
    "The baker owns a red bicycle. She likes tea.",
)
DOCUMENTS = [Document(text, id=name) for text, name in zip(TEXTS, ("nora", "ben", "baker"), strict=True)]
ASKED = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What does Nora own?"}]
METHODS = {
    "query": Reuse.blend(0.3),
    "static": Reuse.blend(0.3, "boundary"),
    "two rounds": Reuse.blend(0.3, "deviation", check_layer=1, gradual=2),
    "attention": Reuse.blend(0.3, "attention-deviation", check_layer=1),
}
REPAIRING = Reuse.blend(0.3, "attention-deviation", check_layer=1, decode_rows=4)
CHUNKED: dict[str, Any] = SMALL | {"deterministic": True, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def made_pair() -> Iterator[list[Engine]]:
    with Engine(**CHUNKED) as first, Engine(**CHUNKED) as second:
        yield [first, second]


@pytest.fixture
def pair(made_pair: list[Engine]) -> Iterator[list[Engine]]:
    clear(made_pair)
    yield made_pair
    assert_clean(made_pair)
    clear(made_pair)


def asked(pair: list[Engine], reuse: Reuse, params: SamplingParams = GREEDY) -> ValidatedRequest:
    return pair[0].prepare_chat(ASKED, params, documents=DOCUMENTS, reuse=reuse).request


def unmoved(pair: list[Engine], request: ValidatedRequest) -> tuple[Any, int]:
    """What it gives on one engine, and how many steps that takes; its segments are made on the way."""
    before = pair[0].stats().num_steps
    output, _ = travel(pair, request, ())
    return essence(output), pair[0].stats().num_steps - before


@pytest.mark.parametrize("how", ["copy", "replay"])
@pytest.mark.parametrize("method", METHODS)
def test_a_blended_request_gives_the_same_after_a_move_before_any_step(
    pair: list[Engine], method: str, how: How
) -> None:
    request = asked(pair, METHODS[method])
    expected, steps = unmoved(pair, request)
    moved: list[str] = []
    for step in range(steps + 1):
        clear(pair)
        output, journey = travel(pair, request, {step}, how)
        assert essence(output) == expected, f"moved before step {step}"
        moved += [report.how for report in journey.reports]
        assert output.reuse is not None and not output.reuse.exact and output.reuse.method == request.reuse.method
    assert len(moved) > 6
    assert ("copy" in moved) == (how == "copy"), "KV of a finished blend moves under its recipe"


@pytest.mark.parametrize("how", ["copy", "replay"])
def test_a_request_whose_decode_steps_repair_rows_begins_anew_where_it_moves(pair: list[Engine], how: How) -> None:
    """Its KV never stands still, so tokens behind a move may differ; those before it stay, and it ends as ever."""
    request = asked(pair, REPAIRING)
    _, steps = unmoved(pair, request)
    for step in range(steps + 1):
        clear(pair)
        output, journey = travel(pair, request, {step}, how)
        assert {report.how for report in journey.reports} <= {"replay"}
        assert len(output.token_ids) == 6 and output.outputs[0].finish_reason == "length"


def test_moving_back_and_forth_while_decoding_changes_no_bit(pair: list[Engine]) -> None:
    request = asked(pair, METHODS["query"], replace(GREEDY, n=2, temperature=1.0, seed=4, max_tokens=12))
    expected, _ = unmoved(pair, request)
    clear(pair)
    journey = Journey(pair, request)
    while not journey.deltas:
        journey.step()
    while not journey.ended and journey.move():
        journey.step()
    assert essence(journey.finish()) == expected
    assert {report.how for report in journey.reports} == {"copy"} and len(journey.reports) >= 4


def test_the_report_of_reuse_goes_along(pair: list[Engine]) -> None:
    request = asked(pair, METHODS["query"])
    journey = Journey(pair, request)
    while not journey.deltas:
        journey.step()
    assert journey.move()
    report = journey.finish().reuse
    assert report is not None and [segment.id for segment in report.segments] == ["nora", "ben", "baker"]
    assert report.blended_tokens > 0 and report.recomputed_tokens > 0


def test_what_moved_is_never_exact_kv_for_others(pair: list[Engine]) -> None:
    request = asked(pair, METHODS["query"])
    exact = asked(pair, Reuse.OFF)
    expected = essence(travel(pair, exact, ())[0])
    clear(pair)
    journey = Journey(pair, request)
    while not journey.deltas:
        journey.step()
    assert journey.move()
    journey.finish()
    again = pair[1].prepare_chat(ASKED, GREEDY, documents=DOCUMENTS, reuse=Reuse.PREFIX).request
    assert essence(travel(pair[::-1], again, ())[0]) == expected


def test_a_follow_up_hits_the_recipe_where_it_moved_to(pair: list[Engine]) -> None:
    request = asked(pair, METHODS["query"])
    journey = Journey(pair, request)
    while not journey.deltas:
        journey.step()
    assert journey.move()
    journey.finish()
    output, _ = travel(pair[::-1], request, ())
    assert output.reuse is not None and "recipe" in [segment.hit for segment in output.reuse.segments]


def test_a_verified_request_and_a_document_being_computed_stay_where_they_are(pair: list[Engine]) -> None:
    journey = Journey(pair, asked(pair, Reuse.verify(0.3)))
    journey.step()
    with pytest.raises(InvalidRequestError, match="verified against a twin"):
        pair[0].migrate(journey.handle, pair[1])
    output = journey.finish()
    assert output.reuse is not None and output.reuse.verify is not None
    handle = pair[0].add_validated(pair[0].library.prepare(DOCUMENTS[0], tenant=0, pinned=False)[1])
    with pytest.raises(InvalidRequestError):
        pair[0].migrate(handle, pair[1])
    while pair[0].num_unfinished:
        pair[0].step()


def test_a_sampled_request_may_move_and_is_no_sample_then(pair: list[Engine]) -> None:
    for _ in range(8):
        clear(pair)
        journey = Journey(pair, asked(pair, METHODS["query"]))
        for _ in range(4):
            journey.step()
        if journey.move():
            assert journey.finish().outputs[0].token_ids
