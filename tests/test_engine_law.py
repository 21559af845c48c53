"""The law of deterministic mode: tokens, texts and log-probabilities keep their bits however a request is computed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvlite import Engine, SamplingParams
from tests.engines import alone, engine, essence, ids, pool_of, single, together

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 48, 70, 100)
STYLES = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=-3),
    SamplingParams(temperature=0.5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3, seed=11),
    SamplingParams(temperature=0, logit_bias={9: 3.0, 10: -100.0}, min_tokens=4),
)


def workload(seed: int, max_tokens: int = 12) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of every awkward length, some with a common beginning that ends inside a block."""
    rng = random.Random(seed)
    common = ids(40, seed)
    prompts: list[list[int]] = []
    params: list[SamplingParams] = []
    for n, length in enumerate(LENGTHS):
        shared = rng.choice([0, 16, 23, 40])
        prompts.append((common[:shared] + ids(length, 1000 * seed + n))[: max(length, 1)])
        style = vars(STYLES[n % len(STYLES)])
        changed: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": rng.choice([0, 3]), "ignore_eos": True}
        if n % 4 == 1:
            changed["prompt_logprobs"] = 2
        params.append(SamplingParams(**(style | changed)))
    return prompts, params


@pytest.fixture(scope="module")
def truth() -> dict[int, list[Any]]:
    """Each request alone, nothing cached, everything in one chunk."""
    with engine(deterministic=True, enable_prefix_caching=False) as plain:
        return {seed: alone(plain, *workload(seed)) for seed in range(3)}


def test_seeded_requests_differ_from_greedy_ones_and_from_each_other(truth: dict[int, list[Any]]) -> None:
    with engine(deterministic=True) as one:
        prompt = ids(20)
        texts = {one.generate(prompt, SamplingParams(temperature=t, seed=s, max_tokens=12)).token_ids
                 for t, s in ((0, 0), (1, 0), (1, 1), (1, 2))}  # fmt: skip
    assert len(texts) == 4


def test_a_batch_gives_what_each_request_gives_alone(truth: dict[int, list[Any]]) -> None:
    with engine(deterministic=True, enable_prefix_caching=False) as batched:
        for seed, expected in truth.items():
            assert together(batched, *workload(seed)) == expected


@pytest.mark.parametrize("budget", [16, 19, 64, 97])
def test_chunked_prompts_give_the_same(truth: dict[int, list[Any]], budget: int) -> None:
    with engine(deterministic=True, max_num_batched_tokens=budget, enable_prefix_caching=False) as chunked:
        assert together(chunked, *workload(0)) == truth[0]


def test_a_cold_and_a_warm_prefix_cache_give_the_same(truth: dict[int, list[Any]]) -> None:
    with engine(deterministic=True) as cached:
        for seed, expected in truth.items():
            assert alone(cached, *workload(seed)) == expected, "cold"
        for seed, expected in truth.items():
            assert alone(cached, *workload(seed)) == expected, "warm"
            assert together(cached, *workload(seed)) == expected, "warm and batched"
        assert cached.stats().cached_tokens > 500


@pytest.mark.parametrize("shared", [1, 15, 16, 17, 24, 31, 32, 47])
def test_a_hit_that_ends_inside_a_block_gives_the_same(shared: int) -> None:
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=8, logprobs=1, ignore_eos=True)
    first, other = ids(64, 1), ids(64, 2)
    prompt = first[:shared] + other[shared:]
    with engine(deterministic=True, enable_prefix_caching=False) as plain:
        expected = essence(plain.generate(prompt, params))
    with engine(deterministic=True) as cached:
        cached.generate(first, params)
        output = cached.generate(prompt, params)
        assert essence(output) == expected
        # The diverging block is copied, so tokens short of a block's end are hits too, but for a prompt's first block.
        assert output.usage.cached_tokens == (shared if shared >= 16 else 0)
        assert essence(cached.generate(first, params)) == essence(cached.generate(first, params))


def test_a_prompt_that_is_cached_whole_computes_one_token_and_gives_the_same() -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)
    with engine(deterministic=True) as cached:
        for length in (16, 32, 33):
            prompt = ids(length, length)
            cold, warm = cached.generate(prompt, params), cached.generate(prompt, params)
            assert essence(cold) == essence(warm)
            assert cold.usage.cached_tokens == 0
            assert 16 * ((length - 1) // 16) <= warm.usage.cached_tokens <= length - 1


def test_choice_0_of_several_is_the_single_choice_and_others_do_not_depend_on_n(truth: dict[int, list[Any]]) -> None:
    prompts, styles = workload(0)
    forked = [SamplingParams(**(vars(one) | {"n": 4})) for one in styles]
    with engine(deterministic=True) as one:
        every = together(one, prompts[:8], forked[:8])
        for got, expected in zip(every, truth[0], strict=False):
            assert got[0] == expected[0], "prompt logprobs"
            assert got[1][0] == expected[1][0], "choice 0"
        pair = essence(one.generate(prompts[1], SamplingParams(**(vars(styles[1]) | {"n": 2}))))
        assert pair[1] == every[1][1][:2]
        assert len({choice[1] for choice in every[1][1]}) == 4, "seeded choices differ"
    with engine(deterministic=True, enable_prefix_caching=False, max_num_batched_tokens=16) as chunked:
        assert together(chunked, prompts[:8], forked[:8]) == every


def preempting(num_blocks: int, **overrides: Any) -> Engine:
    return engine(deterministic=True, kv_cache_bytes=pool_of(num_blocks), reserve_tokens=0, **overrides)


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_requests_give_the_same(caching: bool) -> None:
    prompts, styles = workload(1, max_tokens=40)
    with engine(deterministic=True, enable_prefix_caching=False) as plain:
        expected = alone(plain, prompts, styles)
    with preempting(12, enable_prefix_caching=caching) as crowded:
        assert together(crowded, prompts, styles) == expected
        assert crowded.stats().num_preemptions > 0
        crowded._core.audit()


def test_preempted_forks_give_the_same() -> None:
    prompts, styles = workload(2, max_tokens=40)
    forked = [SamplingParams(**(vars(one) | {"n": 3})) for one in styles]
    with engine(deterministic=True, enable_prefix_caching=False) as plain:
        expected = alone(plain, prompts, forked)
    with preempting(14) as crowded:
        assert together(crowded, prompts, forked) == expected
        assert crowded.stats().num_preemptions > 0
    assert [single(one) for one in forked] == styles


def test_random_mixes_of_everything_give_the_same(truth: dict[int, list[Any]]) -> None:
    """Arrivals at any step, aborted neighbours, small budgets and pools, over one cache."""
    for seed in range(6):
        rng = random.Random(seed)
        prompts, styles = workload(seed % 3)
        with preempting(rng.choice([12, 16, 30]), max_num_batched_tokens=rng.choice([16, 33, 128])) as mixed:
            order = rng.sample(range(len(prompts)), len(prompts))
            texts: dict[int, list[int]] = {}
            handles: dict[int, int] = {}
            while order or mixed.num_unfinished:
                if order and rng.random() < 0.5:
                    n = order.pop()
                    handles[mixed.add(prompts[n], styles[n])] = n
                    noise = mixed.add(ids(30, rng.randrange(100)), SamplingParams(max_tokens=30, temperature=1))
                for delta in mixed.step():
                    if delta.handle in handles:
                        texts.setdefault(handles[delta.handle], []).extend(delta.token_ids)
                    elif rng.random() < 0.2:
                        mixed.abort(noise)
            for n, got in texts.items():
                assert tuple(got) == truth[seed % 3][n][1][0][1], (seed, n)
            assert len(texts) == len(prompts)
            mixed._core.audit()
