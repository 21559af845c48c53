"""Prefix groups end to end: running requests that share a long prefix read it together, and say what they say alone."""

from __future__ import annotations

from typing import Any

import pytest

from kvlite import Engine, SamplingParams, startup
from kvlite.runner.grouping import NEVER, PREFIXES, SPLIT, measure_group_cost
from tests.engines import SMALL, essence, ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
PROMPTS = [ids(600, 1)[:shared] + ids(30, 2 + n) for n, shared in enumerate((600, 600, 560, 300, 0, 600, 100))]


@pytest.fixture(autouse=True)
def _groups_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they pay is measured, and may come out either way on a busy machine."""
    monkeypatch.setattr(startup, "measure_group_cost", lambda *_: 0)


def shipped(**overrides: Any) -> Engine:
    return Engine(**(SMALL | {"deterministic": True, "kv_cache_bytes": 64 << 20} | overrides))


def answers(made: Engine) -> list[Any]:
    for prompt in PROMPTS:  # the prefixes are cached when all run at once
        made.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1))
    return [essence(output) for output in made.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("overrides", [{}, {"enforce_eager": True}, {"num_threads": 3, "block_size": 64}])
def test_grouped_requests_say_bit_for_bit_what_ungrouped_ones_say(overrides: dict[str, Any]) -> None:
    with shipped(prefix_grouping=False) as plain:
        expected = answers(plain)
        assert plain._core.stats()["shared_keys_total"] == 0
    with shipped(**overrides) as grouped:
        assert answers(grouped) == expected
        # Two of three with 512 keys, and three with 256 beside them, or all five with 256: in each of eleven decodes.
        assert grouped._core.stats()["shared_keys_total"] >= 11 * 4 * SPLIT
        grouped._core.audit()


def test_choices_of_one_request_share_its_prompt() -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=8, ignore_eos=True)
    with shipped(prefix_grouping=False) as plain, shipped() as grouped:
        assert essence(grouped.generate(PROMPTS[0], params)) == essence(plain.generate(PROMPTS[0], params))
        assert grouped._core.stats()["shared_keys_total"] >= 6 * 2 * 512


def test_the_cost_of_a_group_is_measured_and_whole_splits_or_never() -> None:
    with shipped() as made:
        decoder, ops = made._runner.decoder, startup.select(made._runner.decoder.device)
        cost = measure_group_cost(ops, decoder.config, decoder.dtype, decoder.device)
        assert cost in {0, *((splits - 1) * SPLIT for splits in PREFIXES), PREFIXES[-1] * SPLIT}
        reference = startup.select(decoder.device, "reference")
        assert measure_group_cost(reference, decoder.config, decoder.dtype, decoder.device) == NEVER
