"""store_kv: what a slot names is written, everything else stays as it was."""

import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.paged import ints, poison


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 48])
def test_rows_land_in_their_slots_and_nowhere_else(
    ops: Ops, device: torch.device, dtype: torch.dtype, block_size: int
) -> None:
    qkv = torch.randn(6, (3 + 3 + 3) * 20).to(dtype)
    k, v = qkv[:, 60:120].view(6, 3, 20), qkv[:, 120:].view(6, 3, 20)
    pool = poison(5, 2, 2, block_size, 3, 20, dtype=dtype)
    slots = [3, -1, 4 * block_size + 15, block_size, -1, 2 * block_size - 1]
    expected = pool.clone()
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // block_size, 1, 0, slot % block_size] = k[t]
            expected[slot // block_size, 1, 1, slot % block_size] = v[t]
    pool = pool.to(device)
    ops.store_kv(k.to(device), v.to(device), pool[:, 1, 0], pool[:, 1, 1], ints(*slots).to(device))
    assert torch.equal(pool.cpu().nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))


def test_a_batch_of_padding_writes_nothing(ops: Ops, device: torch.device) -> None:
    pool = poison(2, 2, 16, 1, 8).to(device)
    rows = torch.ones(3, 1, 8, device=device)
    ops.store_kv(rows, rows, pool[:, 0], pool[:, 1], ints(-1, -1, -1).to(device))
    assert pool.isnan().all()
