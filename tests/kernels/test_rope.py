"""Rotary embedding: half-split pairs, partial rotation, in place on views, the same bits whatever the batch."""

import math

import numpy as np
import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import INTERPRETER_DTYPES, ints

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [dtype for dtype in ROUNDING if not INTERPRETED or dtype in INTERPRETER_DTYPES]


def tables(rot: int, positions: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, rot, 2) / rot)
    return angle.cos(), angle.sin()


def rotated(x: np.ndarray, position: int, rot: int) -> np.ndarray:
    out = x.copy()
    for i in range(rot // 2):
        angle = position * 10000.0 ** (-2 * i / rot)
        out[i] = x[i] * math.cos(angle) - x[i + rot // 2] * math.sin(angle)
        out[i + rot // 2] = x[i + rot // 2] * math.cos(angle) + x[i] * math.sin(angle)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_dim", "rot"), [(4, 2, 16, 16), (17, 1, 24, 12), (3, 3, 20, 20)]
)
def test_each_pair_turns_by_its_angle_and_the_rest_stays(
    ops: Ops, device: torch.device, dtype: torch.dtype, num_heads: int, kv_heads: int, head_dim: int, rot: int
) -> None:
    qkv = torch.randn(5, num_heads + 2 * kv_heads, head_dim).to(dtype)
    before = qkv.double().numpy()
    positions = [39, 0, 7, 7, 1]
    cos, sin = (x.to(device) for x in tables(rot))
    moved = qkv.to(device)
    ops.rope(moved[:, :num_heads], moved[:, num_heads : num_heads + kv_heads], ints(*positions).to(device), cos, sin)
    after = moved.cpu().double().numpy()
    for t, position in enumerate(positions):
        for h in range(num_heads + kv_heads):
            expected = rotated(before[t, h], position, rot)
            np.testing.assert_allclose(after[t, h], expected, rtol=ROUNDING[dtype], atol=4 * ROUNDING[dtype])
            assert (after[t, h, rot:] == before[t, h, rot:]).all()
    assert (after[:, num_heads + kv_heads :] == before[:, num_heads + kv_heads :]).all()


def test_a_row_gets_the_same_bits_alone_and_among_others(ops: Ops, device: torch.device) -> None:
    num_rows = 9 if INTERPRETED else 700
    q, k = torch.randn(num_rows, 3, 24, device=device), torch.randn(num_rows, 1, 24, device=device)
    positions = (torch.arange(num_rows, device=device) % 40).to(torch.int32)
    cos, sin = (x.to(device) for x in tables(24))
    all_q, all_k = q.clone(), k.clone()
    ops.rope(all_q, all_k, positions, cos, sin)
    for first, end in ((0, 1), (3, 8), (num_rows - 1, num_rows)):
        some_q, some_k = q[first:end].clone(), k[first:end].clone()
        ops.rope(some_q, some_k, positions[first:end], cos, sin)
        assert torch.equal(some_q, all_q[first:end]) and torch.equal(some_k, all_k[first:end])
