"""Attention received per key against a float64 loop over rows, heads and keys."""

import numpy as np
import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import INTERPRETER_DTYPES, Batch, Shape, ints, make_batch, oracle

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if not INTERPRETED or dtype in INTERPRETER_DTYPES]


def run(ops: Ops, batch: Batch, lse: torch.Tensor, rows: torch.Tensor, start: int, end: int) -> np.ndarray:
    tensors = [batch.q, lse, batch.k_cache, batch.block_table[batch.seq_row[0]], rows, batch.last_key]
    if ops.backend == "triton" and torch.cuda.is_available():
        tensors = [x.cuda() for x in tensors]
    return ops.key_mass(*tensors, start, end, batch.scale).cpu().double().numpy()


def naive(batch: Batch, lse: np.ndarray, rows: list[int], start: int, end: int) -> np.ndarray:
    mass = np.zeros(end - start)
    q, k = batch.q.double().numpy(), batch.keys[0].double().numpy()
    group = batch.shape.num_heads // batch.shape.kv_heads
    for m in rows:
        for h in range(batch.shape.num_heads):
            for n in range(start, min(end, int(batch.last_key[m]) + 1)):
                mass[n - start] += np.exp(float(q[m, h] @ k[n, h // group]) * batch.scale - lse[m, h])
    return mass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "end"), [(0, 101), (7, 50), (95, 96)])
def test_mass_equals_a_float64_loop(ops: Ops, dtype: torch.dtype, start: int, end: int) -> None:
    batch = make_batch(Shape(num_heads=6, head_dim=24, dtype=dtype), [(101, [100, 3, 40, -1, 95])])
    _, lse = oracle(batch)
    rows = [4, 0, 1, 3]
    found = run(ops, batch, torch.from_numpy(lse).float(), ints(*rows), start, end)
    np.testing.assert_allclose(found, naive(batch, lse, rows, start, end), rtol=2e-5, atol=2e-6)


def test_the_mass_of_every_key_adds_up_to_one_per_row_and_head(ops: Ops) -> None:
    batch = make_batch(Shape(), [(80, [79, 60, 5])])
    _, lse = batch.run(ops)
    assert run(ops, batch, lse, ints(0, 1, 2), 0, 80).sum() == pytest.approx(3 * 4, rel=1e-5)


def test_keys_after_last_key_receive_nothing(ops: Ops) -> None:
    batch = make_batch(Shape(), [(80, [30, 79])])
    _, lse = batch.run(ops)
    assert (run(ops, batch, lse, ints(0), 31, 80) == 0).all()
    assert (run(ops, batch, lse, ints(1), 31, 80) > 0).all()


def test_an_empty_range_has_an_empty_mass(ops: Ops) -> None:
    batch = make_batch(Shape(), [(80, [30])])
    assert run(ops, batch, torch.zeros(1, 4), ints(0), 5, 5).shape == (0,)


@pytest.mark.parametrize(("heads", "start", "end"), [(4, 6, 5), (4, -1, 5), (3, 0, 5)])
def test_a_bad_range_or_lse_is_refused(ops: Ops, heads: int, start: int, end: int) -> None:
    batch = make_batch(Shape(), [(80, [30])])
    with pytest.raises((ValueError, OverflowError)):
        run(ops, batch, torch.zeros(1, heads), ints(0), start, end)
