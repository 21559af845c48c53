"""A share above 1 stops a scenario, limits only rise, and a product loop that computes wrongly is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvlite.bench import decode, limits
from kvlite.bench.__main__ import main
from kvlite.bench.decode import Point
from kvlite.bench.errors import BenchError
from kvlite.bench.limits import (
    FEW_ROWS,
    Copies,
    Limits,
    Product,
    best_s,
    kv_bytes_per_token,
    product_loops,
    products,
    read_loops,
    share,
)
from kvlite.bench.options import integers, pairs
from kvlite.models import load_config
from kvlite.ops import select
from kvlite.startup import SHIPPED_MODEL

CONFIG = load_config(SHIPPED_MODEL)[0]


def test_a_share_above_one_fails_and_says_what_was_too_fast() -> None:
    assert share("a step", 1.0, 2.0) == 0.5
    assert share("a step", 1.0, 1.0) == 1.0
    with pytest.raises(BenchError, match=r"a step took 1000\.000 ms, 1\.010 of its limit"):
        share("a step", 1.01, 1.0)


def test_a_scenario_whose_share_is_above_one_ends_with_one_line_and_no_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "floor_s", lambda *arguments: 1e6)
    monkeypatch.setattr(decode, "ROUNDS", 1)
    monkeypatch.setattr(
        sys, "argv", ["bench", "decode", "--points", "1x8", "--steps", "1", "--threads", "1", "--peer-batches", "0"]
    )
    assert main() == 1
    printed = capsys.readouterr()
    assert "the limit was measured too low" in printed.err
    assert "{" not in printed.out


def test_the_products_are_the_weights_of_the_model_and_kv_bytes_its_cache() -> None:
    by_name = {product.name: product for product in products(CONFIG)}
    assert by_name["qkv"] == Product("qkv", 512, 256, 12)
    assert by_name["gate_up"] == Product("gate_up", 1408, 256, 12)
    assert by_name["head"] == Product("head", 1394, 256, 1)
    assert sum(p.num_weights * p.count for p in products(CONFIG)) == 9_204_224
    assert kv_bytes_per_token(CONFIG, torch.bfloat16) == 12 * 2 * 2 * 64 * 2


def test_limits_only_rise_and_name_the_loop_that_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"slow": 4.0, "fast": 2.0}
    loops: dict[str, Callable[[], object]] = {name: lambda: None for name in seconds}
    monkeypatch.setattr(limits, "read_loops", lambda size, threads, linear: loops)
    turns = iter([4.0, 2.0, 8.0, 16.0, 1.0, 4.0])
    monkeypatch.setattr(limits, "best_s", lambda loop, budget: next(turns))
    found = Limits(CONFIG, torch.float32, 1)
    assert (found.read_rate(8), found.loops) == (4.0, {"read 8": "fast"})
    assert (found.read_rate(8), found.loops) == (4.0, {"read 8": "fast"})
    assert (found.read_rate(8), found.loops) == (8.0, {"read 8": "slow"})


@pytest.mark.parametrize("threads", [1, 2])
def test_every_read_loop_reads_every_byte(threads: int) -> None:
    count = 16 * 1024
    found = {name: loop() for name, loop in read_loops(4 * count, threads).items()}
    assert float(found["torch sum"]) == float(found["torch mv"].sum()) == count  # type: ignore[attr-defined, arg-type]
    assert float(found["torch amax"]) == 1.0  # type: ignore[arg-type]
    assert found["numpy or"] == 0x3F800000, "the bits of 1.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [3, FEW_ROWS + 1])
def test_product_loops_agree_with_float64_and_a_wrong_one_is_refused(
    dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies.of(Product("down", 24, 40, 9), dtype, 2 * 24 * 40 * dtype.itemsize).used(num_rows)
    assert len(copies.stored) == len(copies.transposed) == (2 if num_rows == 3 else 1)
    few = {"kvlite, row by row"} if num_rows == 3 else set()
    assert set(product_loops("down", copies, num_rows)) == {"torch", "torch transposed", "kvlite"} | few
    ops = select(torch.device("cpu"))
    wrong = replace(ops, linear=lambda x, weight, bias, out: out.zero_())
    monkeypatch.setattr(limits, "select", lambda device: wrong)
    with pytest.raises(BenchError, match=f"kvlite: down with {num_rows} rows is wrong"):
        product_loops("down", copies, num_rows)


def test_copies_of_a_weight_fill_more_than_a_cache_but_no_more_than_the_whole_model() -> None:
    size = 512 * 1024 * 4
    assert len(Copies.of(Product("down", 512, 1024, 2), torch.float32, 9 * size).stored) == 9
    assert len(Copies.of(Product("head", 1 << 13, 1 << 12, 9), torch.float32, 1 << 40).stored) == 2


def test_the_best_of_at_least_three_calls_counts_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    calls: list[int] = []
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(times))
    assert best_s(lambda: calls.append(0), budget_s=1.0) == 2.0
    assert len(calls) == 4


def test_a_decode_step_costs_at_least_its_weights_and_its_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Limits(CONFIG, torch.float32, 1)
    monkeypatch.setattr(Limits, "read_rate", lambda self, size=None: found.weight_bytes / 2.0)
    seconds = {1: 3.0, 2: 5.0}
    monkeypatch.setattr(Limits, "product_s", lambda self, rows, head_rows: seconds[rows])
    assert found.decode_s(1, found.weight_bytes) == 2.0 + 2.0, "one row: a bare read was faster than the products"
    assert found.decode_s(2, 0) == 5.0, "more rows: the best products, though a bare read is faster"
    seconds[1] = 1.0
    assert found.decode_s(1, 0) == 1.0, "a product that beats the bare read is the limit"


def test_a_prompts_operations_are_two_per_weight_and_token_and_causal_attention() -> None:
    attention = 2 * 4 * 64 * 12 * 100 * 100
    assert limits.prompt_flops(CONFIG, 1000, 100) == 2 * 1000 * 100 + attention


def test_more_context_is_charged_with_its_own_bytes() -> None:
    assert decode.context_cost(0.013, 0.010, 1_000_000, 1e9) == pytest.approx(3.0)


def test_the_first_point_of_a_batch_gives_its_keys() -> None:
    points = [Point(1, 64), Point(8, 64), Point(1, 1024)]
    assert decode.first_of_each_batch(points) == points[:2]


def test_points_beyond_the_models_positions_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.fitting([Point(1, 64), Point(1, 4096)], 2048, 16) == [Point(1, 64)]
    assert "context 4096 is left out" in capsys.readouterr().out
    with pytest.raises(BenchError, match="no point fits"):
        decode.fitting([Point(1, 4096)], 2048, 16)


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,-2", "1.5"])
def test_a_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="--rows"):
        integers("--rows", text)


@pytest.mark.parametrize("text", ["8", "8x", "x64", "8x64x2", "8*64"])
def test_a_point_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="--points"):
        pairs("--points", text)
    assert pairs("--points", "8x64,1x4096") == [(8, 64), (1, 4096)]
