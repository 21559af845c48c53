"""RMSNorm, plain, per head and with the residual: against float64, with the same bits whatever the batch."""

import numpy as np
import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import INTERPRETER_DTYPES, poison

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [dtype for dtype in ROUNDING if not INTERPRETED or dtype in INTERPRETER_DTYPES]
EPS = 1e-5


def naive(x: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    rows, scale = x.double().numpy(), weight.double().numpy()
    out = np.empty_like(rows)
    for index in np.ndindex(rows.shape[:-1]):
        mean = sum(float(value) ** 2 for value in rows[index]) / rows.shape[-1]
        out[index] = rows[index] / np.sqrt(mean + EPS) * scale
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 64, 300, 1500])
def test_rows_are_scaled_to_unit_mean_square(ops: Ops, device: torch.device, dtype: torch.dtype, width: int) -> None:
    x, weight = (torch.randn(5, width) * 3).to(dtype), torch.linspace(0.5, 1.5, width).to(dtype)
    out = poison(5, width, dtype=dtype).to(device)
    ops.rms_norm(x.to(device), weight.to(device), EPS, out)
    np.testing.assert_allclose(out.cpu().double().numpy(), naive(x, weight), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_heads_inside_a_wider_row_are_normed_where_they_lie(ops: Ops, device: torch.device) -> None:
    qkv, weight = torch.randn(6, 100, device=device), torch.linspace(0.5, 1.5, 20, device=device)
    heads = qkv[:, :60].view(6, 3, 20)
    expected = naive(heads.cpu(), weight.cpu())
    rest = qkv[:, 60:].clone()
    ops.rms_norm(heads, weight, EPS, heads)
    np.testing.assert_allclose(heads.cpu().double().numpy(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(qkv[:, 60:], rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_is_updated_and_its_norm_returned(ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
    x, residual = torch.randn(4, 90).to(dtype), torch.randn(4, 90).to(dtype)
    weight = torch.linspace(0.5, 1.5, 90).to(dtype)
    summed = residual + x
    moved, out = residual.to(device), poison(4, 90, dtype=dtype).to(device)
    ops.add_rms_norm(x.to(device), moved, weight.to(device), EPS, out)
    assert torch.equal(moved.cpu(), summed)
    np.testing.assert_allclose(
        out.cpu().double().numpy(), naive(summed, weight), rtol=ROUNDING[dtype], atol=ROUNDING[dtype]
    )


@pytest.mark.parametrize("width", [37, 300])
def test_a_row_gets_the_same_bits_alone_and_among_others(ops: Ops, device: torch.device, width: int) -> None:
    num_rows = 9 if INTERPRETED else 700
    x, weight = torch.randn(num_rows, width, device=device), torch.randn(width, device=device)
    out = torch.empty_like(x)
    ops.rms_norm(x, weight, EPS, out)
    for first, end in ((0, 1), (3, 8), (num_rows - 1, num_rows)):
        some = torch.empty(end - first, width, device=device)
        ops.rms_norm(x[first:end], weight, EPS, some)
        assert torch.equal(some, out[first:end])
