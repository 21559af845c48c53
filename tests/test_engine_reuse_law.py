"""Any mixture of modes, methods, aborts, drops and pins in a small pool: exact answers are those of full prefill.

What a request reports as exact (off, prefix, verify, a ratio of 1, holes alone) equals, bit for bit, the same request
computed whole by an engine with room for everything. Every request ends once; nothing is left behind.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from kvlite import (
    CapacityError,
    Delta,
    Engine,
    FinishReason,
    InvalidRequestError,
    RequestOptions,
    Reuse,
    ReuseMode,
    SamplingParams,
    Segment,
)
from kvlite.config import Policy
from tests.engines import engine, ids, pool_of

METHODS = ("none", "boundary", "random", "deviation", "attention-deviation", "query", "hybrid")
NUM_STEPS = 70
STEPS_LIMIT = 2000


class Crowd:
    """Requests over a few segments, by seed."""

    def __init__(self, made: Engine, seed: int) -> None:
        self.made = made
        self.draw = random.Random(seed)
        self.segments = [ids(self.draw.randint(1, 40), 100 * seed + n) for n in range(5)]
        self.live: dict[int, tuple[list[Any], SamplingParams, Reuse]] = {}
        self.tokens: dict[int, dict[int, list[int]]] = {}
        self.ended: list[tuple[Delta, list[Any], SamplingParams, Reuse]] = []

    def parts(self) -> list[Any]:
        draw = self.draw
        parts: list[Any] = [ids(draw.randint(1, 20), draw.randrange(3))] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            parts.append(Segment(draw.choice(self.segments)))
            if draw.random() < 0.6:
                parts.append(ids(draw.randint(1, 12), draw.randrange(5)))
        return parts if draw.random() < 0.1 else [*parts, ids(draw.randint(1, 6), draw.randrange(50))]

    def add(self) -> None:
        draw = self.draw
        ratio, method = draw.choice([0.0, 0.2, 0.5, 1.0, 1.0]), draw.choice(METHODS)
        blends = [Reuse.blend(ratio, method), Reuse.verify(ratio, method)]
        reuse = draw.choice([Reuse.OFF, Reuse.PREFIX, blends[0], *blends])
        params = SamplingParams(
            temperature=draw.choice([0, 1]), seed=draw.randrange(9), max_tokens=draw.randint(1, 30),
            n=draw.choice([1, 1, 2]), ignore_eos=True,
        )  # fmt: skip
        levels = draw.randint(0, 3) if self.made.config.policy is Policy.PRIORITY else 0
        options = RequestOptions(tenant=draw.choice([0, 0, 1]), priority=levels)
        parts = self.parts()
        with suppress(CapacityError, InvalidRequestError):  # too long for this pool, or pins leave too little
            self.live[self.made.add(parts, params, options, reuse=reuse)] = (parts, params, reuse)

    def disturb(self) -> None:
        draw, core = self.draw, self.made._core
        if self.live and draw.random() < 0.06:
            self.made.abort(draw.choice(list(self.live)))
        if draw.random() < 0.06:
            core.drop_segment(0, np.asarray(draw.choice(self.segments), np.int32))
        if draw.random() < 0.06:
            with suppress(CapacityError):
                self.made.library._pin_ids(0, np.asarray(draw.choice(self.segments), np.int32), draw.random() < 0.5)

    def step(self) -> None:
        for delta in self.made.step():
            assert delta.handle in self.live, "nothing follows the end, and twins are not seen"
            self.tokens.setdefault(delta.handle, {}).setdefault(delta.index, []).extend(delta.token_ids)
            if delta.usage is not None:
                self.ended.append((delta, *self.live.pop(delta.handle)))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_called_exact_is_full_prefill_whatever_runs_beside_it(seed: int) -> None:
    draw = random.Random(seed)
    settings: dict[str, Any] = {
        "max_num_seqs": draw.choice([2, 4, 8]),
        "max_num_batched_tokens": draw.choice([16, 48, 200]),
        "segment_cache_ratio": draw.choice([0.1, 0.4, 0.8]),
        "reserve_tokens": 0,
        "min_agreement": draw.choice([None, 0.0]),
        "agreement_sample_ratio": 0.5,
    }
    small = pool_of(draw.choice([20, 40]))
    settings |= {"policy": draw.choice(list(Policy)), "max_passes": draw.choice([0, 2, 64])}
    with engine(kv_cache_bytes=small, deterministic=True, **settings) as made, engine(deterministic=True) as whole:
        crowd = Crowd(made, seed)
        for step in range(STEPS_LIMIT):
            if step < NUM_STEPS and crowd.draw.random() < 0.4:
                crowd.add()
            crowd.disturb()
            crowd.step()
            if step >= NUM_STEPS and not crowd.live:
                break
        made._core.audit()
        assert not crowd.live and len(crowd.ended) > 10
        num_compared = 0
        for delta, parts, params, reuse in crowd.ended:
            report, usage = delta.reuse, delta.usage
            assert delta.finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED) and usage is not None
            if report is None:
                continue
            assert usage.prompt_tokens == report.cached_tokens + report.recomputed_tokens + report.computed_tokens
            if delta.finish_reason is FinishReason.CANCELLED or not report.exact:
                continue
            expected = whole.generate(parts, params, reuse=Reuse.OFF)
            found = crowd.tokens[delta.handle]
            assert [list(choice.token_ids) for choice in expected.outputs] == [found[n] for n in sorted(found)], reuse
            num_compared += 1
            if reuse.mode is ReuseMode.VERIFY and report.ratio == 1.0 and report.verify is not None:
                assert (report.verify.kl, report.verify.first_difference) == (0.0, None)
        assert num_compared > 5
        for _ in range(50):
            made.step()
        assert made.num_unfinished == 0 and made.stats().owned_blocks <= made.stats().pinned_blocks
        assert not (made._twins._hidden or made._twins._verified or made._twins._sampled)
