"""The sampler against plain loops: every row alone, whatever is beside it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvlite import SamplingParams
from kvlite.ops import select
from kvlite.runner.plan import SampleKind
from kvlite.runner.sampler import RowSampling, Sampled, Sampler, choice_seed
from kvlite.types import GenerationDefaults

CPU = torch.device("cpu")
VOCAB = 50
PROMPT = np.array([3, 4, 4, 9], np.int32)
FIRST = len(PROMPT) - 1
"""Key index of the row whose logits give the first output token."""


def sampler(num_rows: int = 8) -> Sampler:
    return Sampler(num_rows=num_rows, vocab_size=VOCAB, max_logprobs=5, device=CPU, ops=select(CPU))


def row(outputs: tuple[int, ...] = (), banned: tuple[int, ...] = (), seed: int = 0, **params: Any) -> RowSampling:
    return RowSampling(SamplingParams(**params).resolved(GenerationDefaults()), seed, PROMPT, outputs, banned)


def logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def ask(
    made: Sampler, values: torch.Tensor, rows: list[int], at: int = FIRST, kind: SampleKind = SampleKind.SAMPLE
) -> Sampled:
    count = len(rows)
    return made.sample(
        values.clone(), np.array(rows, np.int32), np.full(count, kind, np.int32), np.full(count, at, np.int32)
    )


STATES = (
    row(temperature=0),
    row(temperature=1, seed=1),
    row(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, seed=2, logprobs=3),
    row(temperature=1, seed=3, repetition_penalty=1.5, outputs=(7, 7, 8)),
    row(temperature=0, presence_penalty=1.0, frequency_penalty=0.5, outputs=(7, 7, 8), logprobs=0),
    row(temperature=0, logit_bias={11: 100.0}, logprobs=5),
    row(temperature=0, min_tokens=3, banned=(1, 2), seed=9),
)


def test_a_rows_answer_does_not_depend_on_its_neighbours_or_its_place() -> None:
    rng = random.Random(0)
    values = logits(len(STATES))
    expected: list[Any] = []
    for n, state in enumerate(STATES):
        alone = sampler()
        alone.admit(5, state)
        got = ask(alone, values[n : n + 1], [5])
        expected.append((int(got.tokens[0]), got.logprobs.get(0)))
    for _ in range(20):
        order = rng.sample(range(len(STATES)), rng.randrange(1, len(STATES) + 1))
        made = sampler()
        places = rng.sample(range(8), len(order))
        for place, n in zip(places, order, strict=True):
            made.admit(place, STATES[n])
        got = ask(made, values[order], places)
        assert [(int(token), got.logprobs.get(at)) for at, token in enumerate(got.tokens)] == [
            expected[n] for n in order
        ]


def test_noise_depends_on_seed_and_position_alone() -> None:
    flat = torch.zeros(1, VOCAB)
    made = sampler()
    seen: dict[tuple[int, int], int] = {}
    for seed in range(6):
        made.admit(0, row(temperature=1, seed=seed))
        for at in range(FIRST, FIRST + 6):
            seen[seed, at] = int(ask(made, flat, [0], at).tokens[0])
    made.admit(3, row(temperature=1, seed=2))
    assert all(seen[2, at] == int(ask(made, flat, [3], at).tokens[0]) for at in range(FIRST, FIRST + 6))
    assert len(set(seen.values())) > 15


def test_penalties_count_what_was_sampled_since_admission() -> None:
    values = logits(1)
    made = sampler()
    made.admit(2, row(temperature=0, frequency_penalty=1.5, repetition_penalty=1.2, outputs=(7,)))
    tokens = [7]
    for at in range(12):
        expected = values[0].clone()
        for token in {*PROMPT.tolist(), *tokens}:
            expected[token] = expected[token] / 1.2 if expected[token] > 0 else expected[token] * 1.2
        for token in tokens:
            expected[token] -= 1.5
        got = int(ask(made, values, [2], FIRST + at).tokens[0])
        assert got == int(expected.argmax()), at
        tokens.append(got)
    assert len(set(tokens)) > 4


def test_a_row_given_away_forgets_its_penalties() -> None:
    values = logits(1)
    best = int(values.argmax())
    made = sampler()
    for _ in range(40):
        made.admit(0, row(temperature=0, presence_penalty=2.0, outputs=(best,) * 3))
        assert made._penalties._counts.shape[0] == 4, "slots are used again"
    made.admit(0, row(temperature=0))
    assert int(ask(made, values, [0]).tokens[0]) == best


def test_ending_ids_are_impossible_until_min_tokens_are_out() -> None:
    values = torch.zeros(1, VOCAB)
    values[0, 6] = 50
    made = sampler()
    made.admit(0, row(temperature=0, min_tokens=2, banned=(6,)))
    assert [int(ask(made, values, [0], FIRST + n).tokens[0]) == 6 for n in range(4)] == [False, False, True, True]


def test_logprobs_are_of_the_raw_logits_and_ties_are_ordered_by_id() -> None:
    values = torch.zeros(1, VOCAB)
    values[0, [9, 5, 30]] = 2.0
    made = sampler()
    made.admit(0, row(temperature=0, logit_bias={40: 90.0}, logprobs=3))
    found = ask(made, values, [0]).logprobs[0]
    expected = torch.log_softmax(values[0], -1)
    assert (found.token_id, found.rank) == (40, 4)
    assert found.logprob == pytest.approx(float(expected[40])) and found.top_ids == (5, 9, 30)
    assert found.top_logprobs == pytest.approx([float(expected[5])] * 3)


def test_prompt_rows_report_the_prompts_own_next_token_and_draw_nothing() -> None:
    values = logits(1)
    made = sampler()
    made.admit(0, row(temperature=1, prompt_logprobs=2, presence_penalty=1.0))
    got = ask(made, values, [0], at=1, kind=SampleKind.PROMPT_LOGPROB)
    assert got.tokens.tolist() == [0]
    assert got.logprobs[0].token_id == PROMPT[2] and len(got.logprobs[0].top_ids) == 2
    assert not made._penalties._counts.any()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", list(SampleKind))
def test_unusable_logits_are_below_zero_and_have_no_logprobs(bad: float, kind: SampleKind) -> None:
    values = logits(2)
    values[0] = bad
    made = sampler()
    for n in range(2):
        made.admit(n, row(temperature=n, logprobs=1, prompt_logprobs=1, frequency_penalty=0.1, seed=4))
    got = ask(made, values, [0, 1], at=1, kind=kind)
    assert got.tokens[0] < 0 <= got.tokens[1] and list(got.logprobs) == [1]


def test_choice_seeds_start_with_the_requests_own_and_differ() -> None:
    seeds = [choice_seed(seed, choice) for seed in (0, 1, -5, (1 << 63) - 1) for choice in range(8)]
    assert seeds[::8] == [0, 1, -5, (1 << 63) - 1]
    assert len(set(seeds)) == len(seeds) and all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)
    assert replace(STATES[0], seed=seeds[1]).seed == seeds[1]
