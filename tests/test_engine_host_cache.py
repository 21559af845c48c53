"""The host tier under a real model: what a small pool cannot keep comes back from there, and no answer changes."""

from __future__ import annotations

from typing import Any

import pytest

from kvlite import Engine, RequestOutput, SamplingParams
from kvlite.runner.plan import CopyDirection, Plan
from tests.engines import alone, engine, essence, ids, pool_of, together

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True)


@pytest.fixture(autouse=True)
def copies_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is copied depends on no clock."""
    monkeypatch.setattr("kvlite.startup.measure_swap_cost", lambda *_: 0)


def small(num_blocks: int, host_blocks: int, **overrides: Any) -> Engine:
    return engine(kv_cache_bytes=pool_of(num_blocks), host_cache_bytes=pool_of(host_blocks), **overrides)


@pytest.mark.parametrize("deterministic", [False, True])
def test_prompts_that_the_pool_cannot_keep_are_hits_on_the_host(deterministic: bool) -> None:
    def answer(output: RequestOutput) -> Any:
        # Rounding may depend on how much of a prompt was a hit, but in deterministic mode.
        return essence(output) if deterministic else output.outputs[0].token_ids

    prompts = [ids(100, seed) for seed in range(5)]
    with engine(deterministic=deterministic) as large:
        expected = [answer(large.generate(prompt, GREEDY)) for prompt in prompts]
    with small(9, 64, deterministic=deterministic) as tight:
        for prompt, one in zip(prompts, expected, strict=True):
            assert answer(tight.generate(prompt, GREEDY)) == one
        for prompt, one in zip(prompts, expected, strict=True):
            output = tight.generate(prompt, GREEDY)
            assert answer(output) == one
            assert output.usage.cached_tokens >= 96, "six blocks, most of them from the host"
        stats = tight.stats()
        assert stats.demoted_blocks > 20 and stats.promoted_blocks > 20 and stats.host_blocks > 20
        assert stats.host_hit_tokens >= 16 * stats.promoted_blocks
        tight._core.audit()
        tight.clear_cache()
        assert tight.stats().host_blocks == tight.stats().cached_blocks == 0


def test_a_block_that_came_from_the_host_goes_back_without_a_copy() -> None:
    first, second = ids(100, 1), ids(100, 2)
    with small(9, 64) as tight:
        for _ in range(3):
            for prompt in (first, second):
                tight.generate(prompt, GREEDY)
        stats = tight.stats()
        # Full blocks of prompts and answers leave once; later turns compute nothing new but the end.
        assert stats.promoted_blocks >= 20 and stats.demoted_blocks < stats.promoted_blocks


@pytest.mark.parametrize("host_blocks", [2, 64])
def test_preempted_requests_come_back_from_the_host_and_give_the_same(host_blocks: int) -> None:
    prompts = [ids(20 + 7 * n, n) for n in range(8)]
    params = [SamplingParams(temperature=n % 2, seed=n, max_tokens=60, logprobs=1, ignore_eos=True) for n in range(8)]
    with engine(deterministic=True, enable_prefix_caching=False) as plain:
        expected = alone(plain, prompts, params)
    with small(14, host_blocks, deterministic=True, reserve_tokens=0) as crowded:
        assert together(crowded, prompts, params) == expected
        stats = crowded.stats()
        assert stats.num_preemptions > 0 and stats.demoted_blocks > 0
        assert stats.promoted_blocks > 0 or host_blocks < 64
        crowded._core.audit()


def test_a_plan_that_fails_leaves_nothing_on_the_host_that_was_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [ids(100, seed) for seed in range(4)]
    with engine(deterministic=True) as large:
        expected = [essence(large.generate(prompt, GREEDY)) for prompt in prompts]
    with small(9, 64, deterministic=True) as tight:
        pool = tight._runner.pool
        apply, failed = pool.apply, 0

        def breaks_once(plan: Plan) -> None:
            nonlocal failed
            if not failed and len(plan.block_copy) and (plan.block_copy[:, 0] == CopyDirection.TO_HOST).any():
                failed = len(plan.block_copy)
                raise RuntimeError("no copy was made")
            apply(plan)

        monkeypatch.setattr(pool, "apply", breaks_once)
        ended = [tight.generate(prompt, GREEDY).outputs[0].finish_reason for prompt in prompts]
        assert failed and ended.count("error") == 1
        for prompt, one in zip(prompts, expected, strict=True):
            assert essence(tight.generate(prompt, GREEDY)) == one
        tight._core.audit()
