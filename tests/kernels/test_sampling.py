"""Sampling: greedy ties, faults, filters against a sort, the distribution of seeded picks, independence of rows."""

import math

import numpy as np
import pytest
import torch

from kvlite.kernels.sampling import reference
from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED

NAN, INF = float("nan"), float("inf")


def run(
    ops: Ops,
    logits: torch.Tensor,
    temperature: float | list[float] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
) -> list[int]:
    rows = logits.shape[0]
    arguments = [
        logits,
        torch.tensor(temperature if isinstance(temperature, list) else [temperature] * rows),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.tensor(seeds or [0] * rows),
        torch.tensor(positions or list(range(rows))),
    ]
    if ops.backend == "triton" and torch.cuda.is_available():
        arguments = [x.cuda() for x in arguments]
    token = ops.sample(*arguments)
    assert token.dtype == torch.int32
    return token.tolist()


def python_hash(value: int) -> int:
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ value >> 16


def python_gumbel(token: int, seed: int, position: int) -> float:
    """The README's formula with unbounded integers and float64."""
    keys = []
    for stream in (0x9E3779B9, 0x243F6A88):
        state = stream
        for word in (seed, seed >> 32, position, position >> 32):
            state = python_hash(state ^ word % 2**32)
        keys.append(state)
    v = ((python_hash(python_hash(token ^ keys[0]) ^ keys[1]) >> 1) + 0.5) / 2**31
    return -math.log(-math.log1p(-min(v, 1 - 2.0**-24)))


def kept_by_sort(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that the filters leave, by sorting, in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = [i for i in order if not top_k or logits[i] >= logits[order[min(top_k, len(order)) - 1]]]
    mass = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    if top_p < 1.0:
        total, threshold = 0.0, -INF
        for i in kept:
            total += mass[i]
            if total >= top_p * sum(mass.values()):
                threshold = logits[i]
                break
        kept = [i for i in kept if logits[i] >= threshold]
    return {i for i in kept if mass[i] >= min_p}


def pick_by_sort(logits: list[float], temperature: float, kept: set[int], seed: int, position: int) -> int:
    scores = {i: (logits[i] - max(logits)) / temperature + python_gumbel(i, seed, position) for i in kept}
    return max(sorted(scores), key=lambda i: scores[i])


def test_greedy_ties_go_to_the_lowest_id_even_across_chunks(ops: Ops) -> None:
    logits = torch.zeros(3, 9000)
    logits[0, [5, 8999]] = 2.0
    logits[1, [8999, 4096, 4100]] = 2.0
    assert run(ops, logits, temperature=0.0) == [5, 4096, 0]


def test_rows_without_a_sound_maximum_give_minus_one_and_leave_the_others_alone(ops: Ops) -> None:
    logits = torch.full((6, 5000), -INF)
    logits[0, 4999] = NAN
    logits[2] = torch.arange(5000.0) / 5000
    logits[2, 100] = NAN
    logits[3, 7] = INF
    logits[4, 4321] = -3.0
    logits[5, 3] = -2.0
    for temperature in (0.0, 1.0):
        assert run(ops, logits, temperature=temperature, top_p=0.9) == [-1, -1, -1, -1, 4321, 3]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.6, 0.0), (0, 0.999, 0.0), (0, 1.0, 0.1), (12, 0.8, 0.05),
     (9999, 0.0, 1.0)],
)  # fmt: skip
def test_filtered_picks_equal_those_of_a_sort(ops: Ops, top_k: int, top_p: float, min_p: float) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = 8 if INTERPRETED else 60
    logits = (torch.randn(rows, 700, generator=generator) * 3).round(decimals=1)
    seeds, positions = [2**40 + 3 * i for i in range(rows)], [2**33 + i for i in range(rows)]
    picks = run(ops, logits, 0.7, top_k, top_p, min_p, seeds, positions)
    for row, pick in enumerate(picks):
        values = logits[row].tolist()
        kept = kept_by_sort(values, float(torch.tensor(0.7)), top_k, top_p, min_p)
        assert pick == pick_by_sort(values, float(torch.tensor(0.7)), kept, seeds[row], positions[row])


def test_ties_at_the_threshold_are_all_kept(ops: Ops) -> None:
    logits = torch.full((16, 600), -9.0)
    logits[:, [3, 77, 500, 599]] = 1.0
    for filters in ({"top_k": 2}, {"top_p": 0.3}):
        assert set(run(ops, logits, **filters)) == {3, 77, 500, 599}


def test_top_p_looks_past_the_first_few_hundred_ids_when_the_mass_is_spread(ops: Ops) -> None:
    rows = 3 if INTERPRETED else 16
    picks = run(ops, torch.linspace(0.0, 1e-3, 5000).repeat(rows, 1), top_p=0.5)
    assert min(picks) >= 2495 and len(set(picks)) > rows // 2


@pytest.mark.skipif(INTERPRETED, reason="4,000 rows; the picks themselves are compared with the reference above")
@pytest.mark.parametrize(
    ("temperature", "filters", "alive"),
    [(1.0, {}, 8), (0.6, {}, 8), (1.0, {"top_k": 4}, 4), (1.0, {"top_p": 0.8}, 4), (1.3, {"min_p": 0.3}, 4)],
)
def test_seeded_picks_follow_the_filtered_softmax(
    ops: Ops, temperature: float, filters: dict[str, float], alive: int
) -> None:
    logits = torch.tensor([1.9, -1.0, 0.4, 2.0, -0.3, 1.4, 0.9, -2.0])
    draws = 4000
    picks = np.bincount(run(ops, logits.repeat(draws, 1), temperature, **filters), minlength=8)
    kept = kept_by_sort(logits.tolist(), temperature, *(filters.get(name, off) for name, off in
                        (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))))  # fmt: skip
    weights = np.array([math.exp(logits[i] / temperature) if i in kept else 0.0 for i in range(8)])
    expected = draws * weights / weights.sum()
    assert len(kept) >= alive and picks[expected == 0].sum() == 0
    chi_square = ((picks - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 24.3  # the 0.1 % point for 7 degrees of freedom


def test_seed_position_and_nothing_else_decide_a_draw(ops: Ops) -> None:
    logits = torch.zeros(1, 3000)
    base = run(ops, logits, seeds=[5], positions=[9])
    batch = run(ops, logits.repeat(6, 1), seeds=[1, 5, 5, 6, 5 + 2**32, 5], positions=[9, 9, 10, 9, 9, 9 + 2**32])
    assert batch[1] == base[0]
    assert len({batch[0], *batch[2:], base[0]}) == 6


def test_a_row_gets_the_same_token_alone_and_among_others(ops: Ops) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4100, generator=generator)
    temperatures = [0.0, 0.8, 1.2]
    together = run(ops, logits, temperatures, top_k=300, top_p=0.95, seeds=[11, 12, 13])
    alone = [
        run(ops, logits[i : i + 1], temperatures[i], 300, 0.95, seeds=[11 + i], positions=[i])[0] for i in range(3)
    ]
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_are_read_as_the_fp32_that_they_are(ops: Ops, dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 4500, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    temperatures = [0.0, 0.5, 1.0, 2.0]
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        assert run(ops, logits, temperatures, **filters) == run(ops, logits.float(), temperatures, **filters)


def test_a_temperature_near_zero_is_greedy(ops: Ops) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(2))
    assert run(ops, logits, temperature=1e-30) == run(ops, logits, temperature=0.0)


def test_the_noise_is_the_formula_of_the_readme() -> None:
    seeds, positions = torch.tensor([-1, 2**62 + 5, 0]), torch.tensor([0, 2**35 + 1, 77])
    keys = reference.noise_keys(seeds, positions)
    for row in range(3):
        noise = reference.gumbel(torch.arange(400, dtype=torch.int32), keys[row])
        expected = [python_gumbel(i, int(seeds[row]), int(positions[row])) for i in range(400)]
        np.testing.assert_allclose(noise.numpy(), expected, rtol=2e-6, atol=2e-6)
