"""place_kv: the bits of `rope` and then `store_kv`, in every layer; sources and all other slots stay as they were."""

import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import ints, poison
from tests.kernels.test_rope import rotated, tables

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = 3


def bits(pool: torch.Tensor) -> torch.Tensor:
    return pool.cpu().contiguous().view(torch.uint8)


def poisoned_pool(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, source: list[int]
) -> torch.Tensor:
    """NaN but for the rows at `source`."""
    pool = poison(num_blocks, LAYERS, 2, kv_heads, block_size, head_dim, dtype=dtype)
    noise = torch.Generator().manual_seed(head_dim)
    for slot in source:
        row = torch.randn(LAYERS, 2, kv_heads, head_dim, generator=noise).to(dtype)
        pool[slot // block_size, :, :, :, slot % block_size] = row
    return pool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "rot", "block_size"), [(2, 16, 16, 16), (1, 24, 12, 5), (3, 20, 20, 1), (5, 7, 2, 48)]
)
def test_a_placed_row_has_the_bits_of_rope_and_store_kv(
    ops: Ops, device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int, rot: int, block_size: int
) -> None:
    source, target, positions = [0, 11, 3, 3, 47], [95, 60, 61, 50, 79], [0, 39, 7, 8, 1]
    pool = poisoned_pool(-(-96 // block_size), block_size, kv_heads, head_dim, dtype, source).to(device)
    expected = pool.clone()
    cos, sin = (x.to(device) for x in tables(rot))
    slots, where = ints(*target).to(device), ints(*positions).to(device)
    for layer in range(LAYERS):
        k, v = (
            torch.stack([pool[slot // block_size, layer, side, :, slot % block_size] for slot in source])
            for side in (0, 1)
        )
        ops.rope(torch.zeros_like(k), k, where, cos, sin)
        ops.store_kv(k, v, *expected[:, layer].transpose(2, 3).unbind(1), slots)
    ops.place_kv(pool, ints(*source).to(device), slots, where, cos, sin)
    assert torch.equal(bits(pool), bits(expected))


def test_keys_turn_by_the_angle_of_their_new_position_and_values_stay(ops: Ops, device: torch.device) -> None:
    before = poisoned_pool(4, 8, 2, 12, torch.float32, [5])
    cos, sin = tables(8)
    pool = before.to(device)
    ops.place_kv(pool, ints(5).to(device), ints(30).to(device), ints(37).to(device), cos.to(device), sin.to(device))
    after = pool.cpu()
    for layer in range(LAYERS):
        for head in range(2):
            expected = rotated(before[0, layer, 0, head, 5].double().numpy(), 37, 8)
            torch.testing.assert_close(after[3, layer, 0, head, 6].double(), torch.from_numpy(expected))
        assert torch.equal(after[3, layer, 1, :, 6], before[0, layer, 1, :, 5])


def test_rows_that_were_never_written_are_neither_hidden_nor_mixed_with_others(ops: Ops, device: torch.device) -> None:
    pool = poisoned_pool(4, 8, 1, 8, torch.float32, [1]).to(device)
    cos, sin = (x.to(device) for x in tables(8))
    ops.place_kv(pool, ints(0, 1).to(device), ints(16, 17).to(device), ints(3, 4).to(device), cos, sin)
    assert pool[2, :, :, :, 0].isnan().all()
    assert pool[2, :, :, :, 1].isfinite().all()


def test_a_row_gets_the_same_bits_alone_and_among_others(ops: Ops, device: torch.device) -> None:
    num_rows = 9 if INTERPRETED else 300
    pool = poisoned_pool(num_rows, 2, 2, 24, torch.float32, list(range(num_rows))).to(device)
    alone = pool.clone()
    source = torch.arange(num_rows, dtype=torch.int32, device=device)
    positions = source % 40
    cos, sin = (x.to(device) for x in tables(24))
    ops.place_kv(pool, source, source + num_rows, positions, cos, sin)
    for first, end in ((0, 1), (3, 8), (num_rows - 1, num_rows)):
        part = slice(first, end)
        ops.place_kv(alone, source[part], source[part] + num_rows, positions[part], cos, sin)
        for slot in range(num_rows + first, num_rows + end):
            assert torch.equal(alone[slot // 2, ..., slot % 2, :], pool[slot // 2, ..., slot % 2, :])


def test_no_rows_is_no_work(ops: Ops, device: torch.device) -> None:
    pool = poison(2, 2, 2, 1, 4, 8).to(device)
    none = ints().to(device)
    cos, sin = (x.to(device) for x in tables(8))
    ops.place_kv(pool, none, none, none, cos, sin)
    assert pool.isnan().all()
