"""Lists of prompts: the same answers as one by one, every shared prefix computed once, bounded memory, any order."""

from __future__ import annotations

import random
from contextlib import closing
from itertools import pairwise

import pytest

from kvlite import Engine, SamplingParams, workload
from kvlite.errors import InvalidRequestError
from kvlite.workload import feeding_order, num_tokens_of
from tests.engines import engine, essence, ids, pool_of

GROUPS, DEGREE, SHARED = 4, 6, 48
PROMPTS = [ids(SHARED, group) + ids(5 + member, 100 + member) for member in range(DEGREE) for group in range(GROUPS)]
PARAMS = [SamplingParams(temperature=n % 2, seed=n, max_tokens=3 + n % 5, ignore_eos=True) for n in range(len(PROMPTS))]


def one_by_one() -> list[object]:
    with engine(deterministic=True) as made:
        return [essence(made.generate(prompt, own)) for prompt, own in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("policy", ["fcfs", "prefix-grouped"])
def test_a_list_is_answered_as_one_by_one_greedy_and_seeded_in_any_order(policy: str) -> None:
    expected = one_by_one()
    order = list(range(len(PROMPTS)))
    with engine(deterministic=True, policy=policy, max_num_seqs=5) as made:
        for _ in range(2):
            outputs = made.generate([PROMPTS[n] for n in order], [PARAMS[n] for n in order])
            assert [essence(output) for output in outputs] == [expected[n] for n in order]
            random.Random(1).shuffle(order)
            made.clear_cache()


def test_prompts_that_come_in_the_worst_order_save_what_an_infinite_cache_saves() -> None:
    # The pool holds one group and a half, so another order would evict what it needs again.
    with engine(max_num_seqs=4, kv_cache_bytes=pool_of(24)) as made:
        made.generate(PROMPTS, PARAMS)
        assert made.stats().cached_tokens == GROUPS * (DEGREE - 1) * SHARED


def test_a_group_that_is_larger_than_the_pool_runs_in_parts() -> None:
    prompts = [ids(40, 1) + ids(40, 2 + n) for n in range(12)]
    with engine(kv_cache_bytes=pool_of(14)) as made:
        assert sum(len(prompt) for prompt in prompts) > 14 * 16 * 2
        outputs = made.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        assert all(len(output.token_ids) == 20 for output in outputs)
        assert made.stats().cached_tokens >= 11 * 32


def test_the_view_is_bounded_in_tokens_and_everything_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "VIEW_TOKENS", 150)
    with engine() as made:
        requests = [made.validate(prompt, own) for prompt, own in zip(PROMPTS, PARAMS, strict=True)]
        live: set[int] = set()
        fed = iter(requests)

        def feeding() -> object:
            for number, request in enumerate(fed):
                live.add(number)
                yield request

        most = 0
        for number, outcome in made.run(feeding(), is_workload=True):  # pyright: ignore[reportArgumentType]
            # The one at hand has been taken from the list, not yet by the core.
            most = max(most, sum(num_tokens_of(requests[n]) for n in sorted(live)[:-1]))
            assert not isinstance(outcome, InvalidRequestError)
            if outcome.usage is not None:
                live.discard(number)
        assert not live and 75 < most <= 150


def test_a_list_beyond_the_view_is_fed_by_prefix_and_one_that_fits_as_it_is() -> None:
    with engine() as made:
        requests = [made.validate(prompt) for prompt in PROMPTS]
    assert list(feeding_order(requests, len(requests))) == list(range(len(PROMPTS)))
    order = feeding_order(requests, len(requests) - 1)
    groups = [number % GROUPS for number in order]
    assert sorted(order) == list(range(len(PROMPTS)))
    assert sum(a != b for a, b in pairwise(groups)) == GROUPS - 1


def test_order_of_arrival_is_back_when_a_list_is_done_or_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    enter, leave = Engine._enter_workload, Engine._leave_workload

    def watch(made: Engine, is_workload: bool) -> None:
        enter(made, is_workload)
        told.append(made._num_workloads > 0)

    def watch_end(made: Engine, is_workload: bool) -> None:
        leave(made, is_workload)
        told.append(made._num_workloads > 0)

    monkeypatch.setattr(Engine, "_enter_workload", watch)
    monkeypatch.setattr(Engine, "_leave_workload", watch_end)
    with engine() as made:
        made.generate(PROMPTS[:2], PARAMS[:2])
        made.generate(PROMPTS[0], PARAMS[0])
        requests = [made.validate(prompt, own) for prompt, own in zip(PROMPTS, PARAMS, strict=True)]
        with closing(made.run(requests, is_workload=True)) as outcomes:
            next(outcomes)
        assert told == [True, False, False, False, True, False]
        assert made.generate(PROMPTS[0], PARAMS[0]).token_ids
