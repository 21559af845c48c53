"""Twins: every visible request ends exactly once, whatever its twin does; what is compared is what was computed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvlite import (
    CapacityError,
    Delta,
    EngineConfig,
    FinishReason,
    RequestOptions,
    Reuse,
    ReuseMode,
    ReuseReport,
    SamplingParams,
    Usage,
)
from kvlite.agreement import SAMPLES_MIN, AgreementMonitor
from kvlite.request import RequestLimits, ValidatedRequest, validate
from kvlite.reuse_types import EncodedPrompt, SegmentSpan
from kvlite.twins import SHADOWS_LIMIT, Start, Twins, kl, top1_equal
from kvlite.types import GenerationDefaults

LIMITS = RequestLimits(EngineConfig(), 100, 64, 1 << 16, GenerationDefaults(), 4)
PROMPT = EncodedPrompt(list(range(20)), (SegmentSpan(2, 10, "a"),))


def request(reuse: Reuse, **params: Any) -> ValidatedRequest:
    return validate(LIMITS, PROMPT, SamplingParams(max_tokens=4, **params), RequestOptions(reuse=reuse))


class FakeLoop:
    """Starts requests and says what became of them."""

    def __init__(self, min_agreement: float | None = None, sample_ratio: float = 1.0) -> None:
        self.started: dict[int, tuple[ValidatedRequest, Start]] = {}
        self.aborted: list[int] = []
        self.logits: dict[int, torch.Tensor] = {}
        self.full = False
        self.monitor = AgreementMonitor(min_agreement, sample_ratio)
        self.twins = Twins(self.start, self.abort, self.logits, self.monitor)

    def start(self, request: ValidatedRequest, how: Start) -> int:
        if self.full:
            raise CapacityError("full")
        handle = len(self.started)
        self.started[handle] = (request, how)
        return handle

    def abort(self, handle: int) -> bool:
        self.aborted.append(handle)
        return True

    def end(
        self,
        handle: int,
        *ids: int,
        reason: FinishReason = FinishReason.STOP,
        logits: Iterable[float] | None = (1.0, 0.0),
    ) -> list[Delta]:
        """The last delta of a request, through the sieve."""
        asked, how = self.started[handle]
        if how.captured and logits is not None:
            self.logits[handle] = torch.tensor(list(logits))
        blended = asked.blending is not None
        report = ReuseReport(
            asked.reuse.mode, not blended, 2, 6 if blended else 0, 2 if blended else 0, 10,
            method=asked.reuse.method, ratio=asked.blending.ratio if asked.blending else None, fallback=asked.fallback,
        )  # fmt: skip
        usage = Usage(20, len(ids), report.cached_tokens)
        delta = Delta(handle, 0, "".join(map(str, ids)), ids, finish_reason=reason, usage=usage, reuse=report)
        return self.twins.sift([delta])

    @property
    def captured(self) -> list[int]:
        return [handle for handle, (_, how) in self.started.items() if how.captured]


def verified() -> tuple[FakeLoop, int, int]:
    """A loop, the visible handle, its twin's."""
    loop = FakeLoop()
    visible = loop.twins.add(request(Reuse.verify(0.5), seed=3, n=2, prompt_logprobs=None))
    return loop, visible, 1 - visible


def test_a_verified_request_is_exact_and_its_twin_blended_under_the_same_seed_without_prefix_hits() -> None:
    loop, visible, hidden = verified()
    (exact, how), (blended, twin_how) = loop.started[visible], loop.started[hidden]
    assert exact.blending is None and how.use_cache and exact.params.n == 2
    assert blended.blending is not None and blended.blending.ratio == 0.5
    assert blended.params == replace(exact.params, n=1) and blended.params.seed == 3
    assert not twin_how.use_cache and loop.captured == [0, 1]


@pytest.mark.parametrize("exact_first", [True, False])
def test_the_last_delta_waits_for_the_twin_and_carries_the_difference(exact_first: bool) -> None:
    loop, visible, hidden = verified()
    steps = [
        lambda: loop.end(visible, 5, 6, 7, logits=(2.0, 1.0, 0.0)),
        lambda: loop.end(hidden, 5, 8, logits=(1.0, 2.0, 0.5)),
    ]
    first, second = [step() for step in (steps if exact_first else steps[::-1])]
    assert first == [] and [delta.handle for delta in second] == [visible]
    assert second[0].token_ids == (5, 6, 7) and second[0].usage == Usage(20, 3, 2)
    report = second[0].reuse
    assert report is not None and report.verify is not None and report.exact and report.mode is ReuseMode.VERIFY
    assert report.blended_tokens == 6, "the counts are the twin's"
    verify = report.verify
    assert (verify.equal_tokens, verify.exact_tokens, verify.blended_tokens) == (1, 3, 2)
    assert (verify.first_difference, verify.blended_token_ids, verify.blended_text) == (1, (5, 8), "58")
    assert not verify.top1_equal and verify.max_logit_difference == 1.0
    assert verify.kl == pytest.approx(kl(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])))
    assert not loop.logits and not loop.twins._hidden and not loop.twins._verified


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR, FinishReason.TIMEOUT])
def test_an_exact_request_that_ends_badly_takes_its_twin_along(reason: FinishReason) -> None:
    loop, visible, hidden = verified()
    shown = loop.end(visible, 5, reason=reason)
    assert [delta.finish_reason for delta in shown] == [reason] and loop.aborted == [hidden]
    assert loop.end(hidden, reason=FinishReason.CANCELLED) == []
    assert not loop.twins._hidden and not loop.twins._verified and not loop.logits


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR, FinishReason.TIMEOUT])
@pytest.mark.parametrize("exact_first", [True, False])
def test_a_twin_that_ends_badly_costs_the_report_alone(reason: FinishReason, exact_first: bool) -> None:
    loop, visible, hidden = verified()
    steps = [lambda: loop.end(visible, 5), lambda: loop.end(hidden, reason=reason, logits=None)]
    shown = [delta for step in (steps if exact_first else steps[::-1]) for delta in step()]
    assert [(delta.handle, delta.finish_reason) for delta in shown] == [(visible, FinishReason.STOP)]
    report = shown[0].reuse
    assert report is not None and report.verify is None and f"reason {reason}" in (report.fallback or "")


def test_aborting_while_only_the_twin_runs_ends_the_twin_and_then_the_request() -> None:
    loop, visible, hidden = verified()
    assert not loop.twins.abort(visible), "the loop itself aborts what still runs"
    assert loop.end(visible, 5) == []
    assert loop.twins.abort(visible) and loop.aborted == [hidden]
    shown = loop.end(hidden, reason=FinishReason.CANCELLED)
    assert [delta.handle for delta in shown] == [visible] and not loop.twins.abort(visible)


def test_a_closing_engine_shows_what_was_held_and_no_twin() -> None:
    loop, visible, hidden = verified()
    other = loop.twins.add(request(Reuse.PREFIX))
    loop.end(visible, 5)
    ends = [Delta(handle, 0, "", (), finish_reason=FinishReason.CANCELLED) for handle in (hidden, other)]
    assert [delta.handle for delta in loop.twins.end_all(ends)] == [visible, other]


def test_no_room_for_the_exact_one_ends_the_twin() -> None:
    loop = FakeLoop()
    starts = iter([False, True])
    plain = loop.start

    def start(request: ValidatedRequest, how: Start) -> int:
        loop.full = next(starts)
        return plain(request, how)

    loop.twins = Twins(start, loop.abort, loop.logits, loop.monitor)
    with pytest.raises(CapacityError):
        loop.twins.add(request(Reuse.verify()))
    assert loop.aborted == [0] and loop.end(0, reason=FinishReason.CANCELLED) == []


def test_without_a_floor_no_request_is_sampled() -> None:
    loop = FakeLoop()
    handle = loop.twins.add(request(Reuse.blend()))
    assert [delta.handle for delta in loop.end(handle, 1)] == [handle] and len(loop.started) == 1
    assert loop.captured == []


def test_a_sampled_request_is_followed_by_one_exact_token_that_nobody_sees() -> None:
    loop = FakeLoop(min_agreement=0.0)
    handle = loop.twins.add(request(Reuse.blend(0.25), min_tokens=2, n=2, logprobs=1))
    assert [delta.handle for delta in loop.end(handle, 7, 8, logits=(0.0, 3.0))] == [handle]
    shadow, how = loop.started[1]
    assert shadow.blending is None and shadow.max_tokens == 1 and shadow.params.n == 1 and how.captured
    assert loop.end(1, 7, logits=(0.0, 3.0)) == []
    assert (loop.monitor.num_samples, loop.monitor.agreement) == (1, 1.0)
    assert loop.monitor.kl_divergence == pytest.approx(0.0, abs=1e-9)


def test_samples_that_say_nothing_are_left_out() -> None:
    loop = FakeLoop(min_agreement=0.5)
    for reason, logits in ((FinishReason.CANCELLED, (1.0,)), (FinishReason.STOP, None)):
        handle = loop.twins.add(request(Reuse.blend()))
        loop.end(handle, 1, reason=reason, logits=logits)
    handle = loop.twins.add(request(Reuse.blend()))
    loop.full = True
    loop.end(handle, 1)
    assert len(loop.started) == 3 and loop.monitor.num_samples == 0


def test_samples_under_way_are_few() -> None:
    loop = FakeLoop(min_agreement=0.5)
    handles = [loop.twins.add(request(Reuse.blend())) for _ in range(20)]
    for handle in handles:
        loop.end(handle, 1)
    assert len(loop.started) == 20 + SHADOWS_LIMIT


def test_below_the_floor_requests_are_repaired_more_and_then_exact_and_said_to_be() -> None:
    loop = FakeLoop(min_agreement=0.9)
    ratios: list[float | None] = []
    for _ in range(3 * SAMPLES_MIN + 1):
        handle = loop.twins.add(request(Reuse.blend(0.15)))
        asked = loop.started[handle][0]
        ratios.append(None if asked.blending is None else asked.blending.ratio)
        shown = loop.end(handle, 1, logits=(1.0, 0.0))
        report = shown[0].reuse
        assert report is not None and (report.fallback is None) == (ratios[-1] == 0.15)
        if ratios[-1] is not None:
            loop.end(len(loop.started) - 1, 2, logits=(0.0, 1.0))
    assert ratios == [0.15] * 8 + [0.3] * 8 + [0.6] * 8 + [None]
    probe, how = loop.started[len(loop.started) - 1]
    assert probe.blending is not None and probe.blending.ratio == 0.6 and not how.use_cache
    assert loop.monitor.num_fallbacks == 17


def test_kl_and_agreement_are_those_of_the_textbook() -> None:
    draw = random.Random(1)
    for _ in range(20):
        p, q = ([draw.gauss(0, 2) for _ in range(7)] for _ in range(2))
        exact = [math.exp(x) / sum(map(math.exp, p)) for x in p]
        blended = [math.exp(x) / sum(map(math.exp, q)) for x in q]
        expected = sum(a * math.log(a / b) for a, b in zip(exact, blended, strict=True))
        assert kl(torch.tensor(p), torch.tensor(q)) == pytest.approx(expected, rel=1e-4)
        assert top1_equal(torch.tensor(p), torch.tensor(q)) == (int(np.argmax(p)) == int(np.argmax(q)))
    assert kl(torch.ones(5), torch.ones(5)) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_order_of_ends_every_visible_request_ends_once(seed: int) -> None:
    draw = random.Random(seed)
    loop = FakeLoop(min_agreement=0.5)
    modes = [Reuse.verify(), Reuse.blend(), Reuse.PREFIX]
    visible = [loop.twins.add(request(draw.choice(modes))) for _ in range(30)]
    ended: list[int] = []
    live = list(loop.started)
    while live:
        handle = live.pop(draw.randrange(len(live)))
        before = len(loop.started)
        ended += [delta.handle for delta in loop.end(handle, 1, reason=draw.choice(list(FinishReason)))]
        live += range(before, len(loop.started))
    assert sorted(ended) == sorted(visible)
    assert not loop.logits and not loop.twins._hidden and not loop.twins._verified and not loop.twins._sampled
