"""Whatever ends at whatever stage of a move ends once, on one engine, and both sides get every block back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvlite import Engine, FinishReason, InvalidRequestError, RequestOptions, SamplingParams
from kvlite.migration import Moving
from tests.engines import engine, essence, ids
from tests.moving import Journey, assert_clean, clear

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
PROMPT = ids(50, 3)
CHUNKED: dict[str, Any] = {"deterministic": True, "max_num_batched_tokens": 16}
STAGES = ("begun", "reserved", "first stage", "freezing", "frozen", "last stage", "exported")


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
def truth(made_pair: list[Engine]) -> Any:
    return essence(made_pair[0].generate(PROMPT, GREEDY))


class Move:
    """A move by hand, which stops after a stage and may be given up there."""

    def __init__(self, pair: list[Engine], journey: Journey) -> None:
        self.source, self.target = pair[0].migration, pair[1].migration
        self.journey = journey
        self.handle = journey.handle
        self.ticket: int | None = None
        self.hits = 0
        self.final: Moving | None = None

    def until(self, stage: str) -> None:
        begun = self.source.export_begin(self.handle)
        actions: dict[str, Callable[[], Any]] = {
            "begun": lambda: None,
            "reserved": lambda: self._reserve(begun),
            "first stage": self._stage,
            "freezing": lambda: self.source.freeze(self.handle),
            "frozen": self._wait,
            "last stage": self._stage,
            "exported": self._export,
        }
        for name, act in actions.items():
            act()
            if name == stage:
                return

    def _reserve(self, begun: Moving) -> None:
        self.ticket, self.hits = self.target.reserve(begun)

    def _stage(self) -> None:
        assert self.ticket is not None
        self.target.take_from(self.source, self.handle, self.ticket, self.hits)

    def _wait(self) -> None:
        while not self.source.is_frozen(self.handle):
            self.journey.step()

    def _export(self) -> None:
        self.final = self.source.export_final(self.handle)

    def give_up(self) -> bool:
        if self.ticket is not None:
            self.target.import_cancel(self.ticket)
        return self.source.export_abort(self.handle)


def started(pair: list[Engine], steps: int, options: RequestOptions | None = None) -> Journey:
    journey = Journey(pair, pair[0].validate(PROMPT, GREEDY, options))
    for _ in range(steps):
        journey.step()
    return journey


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("stage", STAGES)
def test_a_move_that_is_given_up_changes_no_bit(pair: list[Engine], truth: Any, stage: str, steps: int) -> None:
    journey = started(pair, steps)
    move = Move(pair, journey)
    move.until(stage)
    assert move.give_up()
    assert essence(journey.finish()) == truth
    journey = started(pair, steps)
    assert journey.move(), "it may be tried again"
    assert essence(journey.finish()) == truth


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("stage", STAGES)
def test_a_request_that_is_cancelled_during_its_move_ends_once_at_its_source(
    pair: list[Engine], stage: str, steps: int
) -> None:
    journey = started(pair, steps)
    move = Move(pair, journey)
    move.until(stage)
    assert pair[0].abort(journey.handle)
    output = journey.finish()
    assert {choice.finish_reason for choice in output.outputs} == {FinishReason.CANCELLED}
    assert not move.give_up()
    for call in (move.source.export_commit, move.source.export_final, move.source.freeze, move.source.is_frozen):
        with pytest.raises(InvalidRequestError, match="has ended"):
            call(journey.handle)


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_whose_time_is_over_during_its_move_ends_at_its_source(
    pair: list[Engine], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journey = started(pair, 7, RequestOptions(timeout_s=500))
    move = Move(pair, journey)
    move.until(stage)
    tracked = move.source.tracked(journey.handle)
    monkeypatch.setattr("kvlite.loop._now_ms", lambda: tracked.deadline_ms)
    output = journey.finish()
    assert {choice.finish_reason for choice in output.outputs} == {FinishReason.TIMEOUT}
    assert not move.give_up()


def test_the_time_that_is_left_goes_along(pair: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    journey = started(pair, 7, RequestOptions(timeout_s=500))
    deadline_ms = pair[0].migration.tracked(journey.handle).deadline_ms
    assert journey.move()
    monkeypatch.setattr("kvlite.loop._now_ms", lambda: deadline_ms - 10_000)
    journey.step()
    assert not journey.ended
    monkeypatch.setattr("kvlite.loop._now_ms", lambda: deadline_ms + 10_000)
    assert {choice.finish_reason for choice in journey.finish().outputs} == {FinishReason.TIMEOUT}


def test_a_reservation_that_nobody_comes_for_expires(
    pair: list[Engine], truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journey = started(pair, 7)
    move = Move(pair, journey)
    move.until("first stage")
    cancelled = pair[1].stats().num_imports_cancelled
    later_ms = pair[0].migration.tracked(journey.handle).deadline_ms
    monkeypatch.setattr("kvlite.loop._now_ms", lambda: later_ms)
    pair[1].step()
    monkeypatch.undo()
    assert pair[1].stats().num_imports_cancelled == cancelled + 1
    assert move.ticket is not None and not move.target.import_cancel(move.ticket)
    with pytest.raises(InvalidRequestError):
        move.target.import_block(move.ticket, 0, 0)
    assert move.source.export_abort(journey.handle)
    assert essence(journey.finish()) == truth


def test_a_commit_that_lacks_a_block_is_refused_and_the_move_can_still_be_given_up(
    pair: list[Engine], truth: Any
) -> None:
    journey = started(pair, 7)
    move = Move(pair, journey)
    move.until("frozen")
    move._export()
    assert move.ticket is not None and move.final is not None
    with pytest.raises(InvalidRequestError):
        move.target.import_commit(move.ticket, move.final)
    assert pair[1].num_unfinished == 0
    assert move.give_up()
    assert essence(journey.finish()) == truth


def test_a_choice_that_is_stopped_while_frozen_stays_behind(pair: list[Engine], truth: Any) -> None:
    """As by a stop string: the owner cuts choice 1 between the freeze and the tail."""
    journey = started(pair, 8)
    move = Move(pair, journey)
    move.until("frozen")
    assert pair[0].finish(journey.handle, 1, 2)
    journey.step()
    move._stage()
    move._export()
    assert move.final is not None and move.ticket is not None and move.final.outputs[1] is None
    tracked = move.source.tracked(journey.handle)
    new = move.target.import_commit(move.ticket, move.final, tracked)
    move.source.export_commit(journey.handle)
    journey.at, journey.handle = 1, new
    output = journey.finish()
    assert output.outputs[0].token_ids == truth[1][0][1]
    assert output.outputs[1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("stage", ["freezing", "frozen", "exported"])
def test_an_engine_that_closes_during_a_move_ends_the_request_once(stage: str) -> None:
    with engine(**CHUNKED) as source, engine(**CHUNKED) as target:
        journey = started([source, target], 7)
        move = Move([source, target], journey)
        move.until(stage)
        deltas = source.close()
        assert [delta.usage is not None for delta in deltas].count(True) == 1
        assert {delta.finish_reason for delta in deltas} == {FinishReason.CANCELLED}
        assert move.ticket is not None and move.target.import_cancel(move.ticket)
        assert_clean([target])


@pytest.mark.parametrize("broken", ["reserve", "import_block", "import_filled", "import_commit"])
def test_a_destination_that_fails_midway_leaves_the_request_where_it_was(
    pair: list[Engine], truth: Any, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("on purpose")

    journey = started(pair, 7)
    monkeypatch.setattr(pair[1].migration, broken, fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        pair[0].migrate(journey.handle, pair[1])
    monkeypatch.undo()
    journey._take(pair[0]._unread)
    pair[0]._unread.clear()
    assert pair[1].num_unfinished == 0
    assert essence(journey.finish()) == truth


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_step_after_a_move_ends_its_batch_alone(
    pair: list[Engine], truth: Any, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault at the source does not reach a request that has left, nor the other way round."""
    journey = started(pair, 7)
    assert journey.move()
    victim = pair[failing].stream(ids(20, 6), replace(GREEDY, n=1)) if failing == 0 else None
    decoder = pair[failing]._runner.decoder

    def fails(*args: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(decoder, "embed", fails)
    if victim is not None:
        assert list(victim)[-1].finish_reason is FinishReason.ERROR
        monkeypatch.undo()
        assert essence(journey.finish()) == truth
    else:
        journey.step()
        monkeypatch.undo()
        assert {choice.finish_reason for choice in journey.finish().outputs} == {FinishReason.ERROR}
