"""Products with weights: against float64 in every format, biased, strided; which form the cpu backend takes when."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvlite import _core
from kvlite import ops as ops_module
from kvlite.ops import ANY_ROWS, FEW_ROWS, MANY_ROWS, WIDENED_ROWS, LinearOp, Ops, select
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import poison

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ROWS = [1, 3, *FEW_ROWS, FEW_ROWS[-1] + 1, 100]
WIDE = 2 * WIDENED_ROWS + 37
FORMATS = [(x, w) for x in ROUNDING for w in ROUNDING if x in (w, torch.float32)]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(("dtype", "weight_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_sum_of_its_products(
    ops: Ops, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, num_rows: int, biased: bool
) -> None:
    x, weight = numbers(num_rows, 100, dtype=dtype).to(device), numbers(37, 100, dtype=weight_dtype).to(device)
    bias = numbers(37, dtype=weight_dtype).to(device) if biased else None
    out = poison(num_rows, 40, dtype=dtype).to(device)
    ops.linear(x, weight, bias, out[:, :37])
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    np.testing.assert_allclose(
        out[:, :37].cpu().double(), expected.cpu(), rtol=ROUNDING[dtype], atol=20 * ROUNDING[dtype]
    )
    assert out[:, 37:].isnan().all()


@pytest.mark.parametrize(("dtype", "weight_dtype"), FORMATS, ids=str)
def test_the_invariant_form_gives_a_row_the_same_bits_alone_and_among_others(
    ops: Ops, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    if ops.invariant_linear is None:
        assert ops.backend != "cpu"
        return
    x, weight = numbers(70, 100, dtype=dtype), numbers(37, 100, dtype=weight_dtype)
    together = poison(70, 37, dtype=dtype)
    ops.invariant_linear(x, weight, None, together)
    for first, end in ((0, 1), (3, 8), (20, 61), (69, 70)):
        alone = poison(end - first, 37, dtype=dtype)
        ops.invariant_linear(x[first:end], weight, None, alone)
        assert torch.equal(alone, together[first:end])


@pytest.mark.parametrize("biased", [False, True])
def test_many_fp32_rows_take_wide_16_bit_weights_piece_by_piece(ops: Ops, device: torch.device, biased: bool) -> None:
    x, weight = numbers(FEW_ROWS[-1] + 1, 24).to(device), numbers(WIDE, 24, dtype=torch.bfloat16).to(device)
    bias = numbers(WIDE, dtype=torch.bfloat16).to(device) if biased else None
    out = poison(FEW_ROWS[-1] + 1, WIDE, dtype=torch.float32).to(device)
    ops.linear(x, weight, bias, out)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    np.testing.assert_allclose(out.cpu().double(), expected.cpu(), rtol=1e-6, atol=2e-5)


@pytest.mark.skipif(INTERPRETED, reason="the forms of the CPU")
@pytest.mark.parametrize("most", [*FEW_ROWS, ANY_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_up_to_the_crossing_take_our_own_form_and_no_more(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_module, "_crossings", {})
    monkeypatch.setattr(ops_module, "_few_rows", lambda *_: most)
    cpu, reference = select(torch.device("cpu"), "cpu"), select(torch.device("cpu"), "reference")
    weight = numbers(256, 1000, dtype=dtype)
    own = ops_module._RustKernels(_core).linear
    few_and_more = ((most, own), (most + 1, reference.linear))
    for num_rows, form in ((MANY_ROWS, own),) if most == ANY_ROWS else few_and_more:
        x = numbers(num_rows, 1000, dtype=dtype)
        out, expected = (poison(num_rows, 256, dtype=dtype) for _ in range(2))
        cpu.linear(x, weight, None, out)
        form(x, weight, None, expected)
        assert torch.equal(out, expected)


@pytest.mark.skipif(INTERPRETED, reason="the forms of the CPU")
@pytest.mark.parametrize("crossing", [*FEW_ROWS, MANY_ROWS])
def test_the_crossing_is_where_the_other_form_becomes_faster(crossing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def costing(seconds_of: Callable[[int], float]) -> LinearOp:
        def multiply(x: torch.Tensor, *_others: torch.Tensor | None) -> None:
            nonlocal clock
            clock += seconds_of(x.shape[0])

        return multiply

    monkeypatch.setattr("kvlite.ops.time.perf_counter", lambda: clock)
    few, many = costing(float), costing(lambda num_rows: crossing + 0.5)
    found = ops_module._few_rows(torch.float32, torch.bfloat16, few, many)
    assert found == (ANY_ROWS if crossing == MANY_ROWS else crossing)
