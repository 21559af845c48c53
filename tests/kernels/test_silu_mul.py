"""SiLU times up: against float64 over the whole range of exponents, with the same bits whatever the batch."""

import math

import numpy as np
import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import INTERPRETER_DTYPES, poison

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [dtype for dtype in ROUNDING if not INTERPRETED or dtype in INTERPRETER_DTYPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 64, 1100])
def test_output_is_silu_of_the_first_half_times_the_second(
    ops: Ops, device: torch.device, dtype: torch.dtype, width: int
) -> None:
    gate_up = torch.randn(3, 2 * width).mul(4).to(dtype)
    gate_up[0, :4] = torch.tensor([-120.0, 120.0, 0.0, -0.0])
    out = poison(3, width, dtype=dtype).to(device)
    ops.silu_mul(gate_up.to(device), out)
    for t in range(3):
        gate, up = gate_up[t, :width].tolist(), gate_up[t, width:].tolist()
        expected = [g / (1.0 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
        np.testing.assert_allclose(out[t].cpu().double(), expected, rtol=ROUNDING[dtype], atol=1e-7)


def test_a_row_gets_the_same_bits_alone_and_among_others(ops: Ops, device: torch.device) -> None:
    num_rows = 9 if INTERPRETED else 700
    gate_up, out = torch.randn(num_rows, 2 * 37, device=device), torch.empty(num_rows, 37, device=device)
    ops.silu_mul(gate_up, out)
    for first, end in ((0, 1), (3, 8), (num_rows - 1, num_rows)):
        some = torch.empty(end - first, 37, device=device)
        ops.silu_mul(gate_up[first:end], some)
        assert torch.equal(some, out[first:end])
