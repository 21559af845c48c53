"""Every case is right before it is timed, on every backend; bounds are the larger of bytes and operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvlite.bench import kernels
from kvlite.bench.errors import BenchError
from kvlite.bench.kernel_cases import Case, Maker, attention, key_mass, linear, place_kv, row_ops, sample
from kvlite.bench.kernels import MORE_TURNS, Clock, backends, check, measure

MAKE = Maker(torch.device("cpu"), torch.float32)


class FixedClock(Clock):
    """Every call takes 1 ms, reads 1 GB/s, computes 1 GFLOP/s."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.flop_rate = self.rate = 1e9
        self.num_turns = 0

    def seconds(self, run: object) -> float:
        return 1e-3

    def read_rate(self, size: int) -> float:
        return self.rate

    def measure_again(self) -> None:
        self.num_turns += 1


def small_cases(make: Maker) -> list[Case]:
    found = [attention(make, 1, 40, 1), attention(make, 2, 33, 5), key_mass(make, 3, 32), linear(make, 2)]
    return [*found, *row_ops(make, 3), place_kv(make, 32), sample(make, 2, 0.0, 1.0), sample(make, 2, 1.0, 0.9)]


def names() -> list[str]:
    return [case.name for case in small_cases(MAKE)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("idx", range(len(names())), ids=names())
@torch.inference_mode()
def test_a_backend_gives_the_references_outputs(backend: str, idx: int) -> None:
    ops = backends(MAKE.device)
    want, have = small_cases(MAKE)[idx], small_cases(MAKE)[idx]
    want.run(ops["reference"])
    have.run(ops[backend])  # type: ignore[index]
    check(want, have, backend, torch.float32)
    assert not any(bool(out.float().isnan().any()) for out in have.outputs)


def test_an_output_that_is_wrong_or_not_written_gets_no_speed() -> None:
    want = Case("op", 8, 0, lambda ops: None, [torch.ones(4)])
    for wrong in (torch.tensor([1.0, 1.0, 1.0, 1.1]), torch.full((4,), float("nan"))):
        with pytest.raises(BenchError, match="op on cpu: output 0 is not the reference's"):
            check(want, replace(want, outputs=[wrong]), "cpu", torch.float32)


def test_an_id_that_is_not_the_references_gets_no_speed_and_an_infinity_hides_nothing() -> None:
    want = Case("op", 8, 0, lambda ops: None, [torch.tensor([5, 70_000])])
    with pytest.raises(BenchError, match="output 0 is not"):
        check(want, replace(want, outputs=[torch.tensor([5, 70_001])]), "cpu", torch.bfloat16)
    lse = Case("op", 8, 0, lambda ops: None, [torch.tensor([1.0, float("-inf")])])
    check(lse, lse, "cpu", torch.float32)
    with pytest.raises(BenchError, match="output 0 is not"):
        check(lse, replace(lse, outputs=[torch.tensor([1.1, float("-inf")])]), "cpu", torch.float32)


def test_a_bound_is_the_larger_of_bytes_and_operations() -> None:
    clock = FixedClock()
    assert clock.bound_s(Case("op", 5_000_000, 1e6, lambda ops: None, [])) == 5e-3
    assert clock.bound_s(Case("op", 5_000_000, 7e6, lambda ops: None, [])) == 7e-3


def test_what_a_case_must_move_and_compute_is_counted_from_its_shape() -> None:
    decode = attention(MAKE, 8, 64, 1)
    assert (decode.num_bytes, decode.flops) == (8 * 64 * 2 * 2 * 64 * 4, 4 * 8 * 64 * 14 * 64)
    prefill = attention(MAKE, 1, 48, 48)
    assert prefill.flops == 4 * (48 * 49 // 2) * 14 * 64
    assert {case.name: case.num_bytes for case in row_ops(MAKE, 2)}["silu_mul_2"] == 3 * 2 * 4864 * 4
    assert place_kv(MAKE, 16).num_bytes == 4 * 16 * 24 * 2 * 64 * 4


def test_every_case_is_measured_on_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "timed_small", small_cases)
    clock = FixedClock()
    clock.flop_rate = clock.rate = 1e12
    figures = measure(MAKE, clock)
    backed = [f"{name}_{backend}" for name in names() for backend in ("reference", "cpu")]
    wanted = {f"{unit}_{name}" for unit in ("us", "share") for name in backed}
    assert set(figures) == wanted
    assert figures["us_rope_3_cpu"] == 1000.0


def test_a_share_above_one_fails_after_its_limit_had_more_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(1)
    monkeypatch.setattr(kernels, "timed_small", lambda make: [Case("op", 2_000_000, 0, lambda ops: None, [out])])
    clock = FixedClock()
    with pytest.raises(BenchError, match=r"op on reference took 1\.000 ms, 2\.000 of its limit"):
        measure(MAKE, clock)
    assert clock.num_turns == MORE_TURNS


@pytest.mark.parametrize(
    ("arguments", "complaint"), [("--op nothing", "no case begins so"), ("--op linear --grouped", "only attention")]
)
def test_an_op_without_a_case_is_refused(arguments: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "Clock", lambda *_: FixedClock())
    with pytest.raises(BenchError, match=complaint):
        kernels.main(["--device", "cpu", *arguments.split()])
