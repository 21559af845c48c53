"""Orders of admission: the mix is what the header says, ratios point the right way, bad options are named."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

import pytest

from bench import policies
from bench.errors import BenchError
from bench.policies import Kind, Seen


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def test_the_mix_has_the_shares_and_warm_prefixes_that_it_says() -> None:
    prefixes, requests = policies.mix(2_000, 128, 1394, seed=3)
    kinds = Counter(request.kind for request in requests)
    assert [round(kinds[kind] / 2_000, 1) for kind in (Kind.HIT, Kind.HALF, Kind.COLD)] == [0.6, 0.2, 0.2]
    assert round(sum(request.tenant for request in requests) / 2_000, 2) == pytest.approx(0.25, abs=0.02)
    expected = {Kind.HIT: 120, Kind.HALF: 64, Kind.COLD: 0}
    for request in requests[:200]:
        warm = max(common(request.job.prompt, prefix) for prefix in prefixes)
        assert len(request.job.prompt) == 128
        assert expected[request.kind] <= warm <= expected[request.kind] + 3


def test_a_mix_is_a_function_of_its_seed() -> None:
    assert policies.mix(20, 128, 1394, seed=3) == policies.mix(20, 128, 1394, seed=3)
    assert policies.mix(20, 128, 1394, seed=3) != policies.mix(20, 128, 1394, seed=4)


def test_above_one_is_better_for_waiting_and_for_tokens() -> None:
    assert policies.ratio("ttft_p50", policy=10.0, fcfs=40.0) == 4.0
    assert policies.ratio("tokens_per_s", policy=40.0, fcfs=10.0) == 4.0


def test_figures_count_the_light_tenant_and_the_cold_requests_alone() -> None:
    _, requests = policies.mix(50, 128, 1394, seed=1)
    seen = [Seen(ttft_s=1.0 + number, end_s=60.0, tokens=(7, 7)) for number in range(50)]
    figures = policies.figures_of(requests, seen)
    cold = [number for number, request in enumerate(requests) if request.kind is Kind.COLD]
    light = [number for number, request in enumerate(requests) if request.tenant == 1]
    assert figures["ttft_max_cold"] == (1.0 + max(cold)) * 1e3
    assert light[0] * 1e3 < figures["ttft_p50_light"] < (light[-1] + 2) * 1e3
    assert figures["tokens_per_s"] == 100 / 60.0


@pytest.mark.parametrize("flags", ["--load 0", "--rounds 0", "--length 63", "--num-requests 7", "--max-passes -1"])
def test_bad_options_are_named_with_their_value(flags: str) -> None:
    with pytest.raises(BenchError, match=flags):
        policies.parse(flags.split())


def test_every_policy_gives_the_same_tokens() -> None:
    arguments = ["--num-requests", "12", "--length", "64", "--threads", "1", "--dtype", "float32"]
    options = policies.parse(arguments)
    directory = policies.model_directory(options.model)
    prefixes, requests = policies.mix(12, 64, 1394, seed=0)
    assert policies.gate(directory, prefixes, requests, options) == 12
