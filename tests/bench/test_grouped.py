"""Together and apart: right before timed, and the figures that come of paired times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvlite.bench import grouped
from kvlite.bench.errors import BenchError
from kvlite.bench.grouped import check, lower, measure, pair, ratios
from kvlite.bench.kernel_cases import Maker
from kvlite.bench.kernels import Clock
from kvlite.bench.make_model import Shape
from kvlite.ops import select

CPU = torch.device("cpu")
MAKE = Maker(CPU, torch.float32, Shape("llama", 1, 64, 4, 2, 16, 96, 512))


@torch.inference_mode()
def test_all_ways_agree_and_a_difference_gets_no_speed() -> None:
    each = pair(MAKE, 3, 256)
    check(each, select(CPU))
    assert each.ways.apart.num_bytes == 3 * (256 + 64) * 256 and each.ways.together.num_bytes == (256 + 3 * 64) * 256
    wrong = replace(each.ways.together, run=lambda ops: each.ways.apart.outputs[0].fill_(0.5))
    for ways in (replace(each.ways, together=wrong), replace(each.ways, told_none=wrong)):
        with pytest.raises(BenchError, match="together and apart differ"):
            check(replace(each, ways=ways), select(CPU))


@torch.inference_mode()
def test_ratios_are_of_calls_that_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    each = pair(MAKE, 2, 256)
    now = 0.0

    def takes(seconds: float) -> object:
        def run(ops: object) -> None:
            nonlocal now
            now += seconds

        return run

    clock = Clock.__new__(Clock)
    clock.device = CPU
    monkeypatch.setattr(grouped.time, "perf_counter", lambda: now)
    apart, together = replace(each.ways.apart, run=takes(3.0)), replace(each.ways.together, run=takes(2.0))
    timed = replace(each, ways=replace(each.ways, apart=apart))
    assert ratios(timed, together, select(CPU), clock, 0.0) == [1.5] * grouped.LEAST_PAIRS
    assert lower([1.5] * 9) == pytest.approx(1.5) and lower([1.0, 2.0, 1.0, 2.0]) < 1.2


def test_every_shape_gives_a_gain_its_bound_and_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "BATCHES", (2,))
    monkeypatch.setattr(grouped, "PREFIXES", (256,))
    figures = measure(MAKE, 1, 0.001)
    assert set(figures) == {
        f"{name}{suffix}_2_256{end}"
        for suffix in ("", "_mha")
        for name, end in (("x_group", ""), ("x_group", "_low"), ("group_share", ""))
    }
    assert all(value > 0 for value in figures.values())
