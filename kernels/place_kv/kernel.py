"""Copy of unrotated cache rows to other slots, keys rotated, in Triton: one program per row and layer.

Knows tensors only; int64 addresses. Rotates by the same function as `rope`. Called through `kvlite.ops` (backend
"triton").
"""

import torch
import triton
import triton.language as tl

from kvlite.kernels.rope.kernel import turn


@triton.jit
def place_kv_kernel(
    pool_ptr, source_ptr, target_ptr, position_ptr, cos_ptr, sin_ptr,
    block_stride, layer_stride, side_stride, head_stride, slot_stride, table_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of layer program_id(1), all heads."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64) * layer_stride
    source = tl.load(source_ptr + row)
    target = tl.load(target_ptr + row)
    position = tl.load(position_ptr + row).to(tl.int64)
    source_at = (source // BLOCK_SIZE).to(tl.int64) * block_stride + (source % BLOCK_SIZE).to(tl.int64) * slot_stride
    target_at = (target // BLOCK_SIZE).to(tl.int64) * block_stride + (target % BLOCK_SIZE).to(tl.int64) * slot_stride
    source_row = pool_ptr + source_at + layer
    target_row = pool_ptr + target_at + layer

    head = tl.arange(0, BLOCK_HEADS) * head_stride
    used = tl.arange(0, BLOCK_HEADS) < KV_HEADS
    pair = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + position * table_stride + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * table_stride + pair, mask=pair < HALF, other=0.0)[None, :]
    mask = used[:, None] & (pair < HALF)[None, :]
    at = head[:, None] + pair[None, :]
    low = tl.load(source_row + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source_row + at + HALF, mask=mask, other=0.0).to(tl.float32)
    low, high = turn(low, high, cos, sin)
    tl.store(target_row + at, low.to(pool_ptr.dtype.element_ty), mask=mask)
    tl.store(target_row + at + HALF, high.to(pool_ptr.dtype.element_ty), mask=mask)
    if HEAD_DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        mask = used[:, None] & (rest < HEAD_DIM)[None, :]
        at = head[:, None] + rest[None, :]
        tl.store(target_row + at, tl.load(source_row + at, mask=mask), mask=mask)

    element = tl.arange(0, BLOCK)
    mask = element < KV_HEADS * HEAD_DIM
    at = side_stride + element // HEAD_DIM * head_stride + element % HEAD_DIM
    tl.store(target_row + at, tl.load(source_row + at, mask=mask), mask=mask)


def place_kv_config(kv_heads: int, head_dim: int, half: int) -> dict[str, int]:
    """Tile and launch sizes of `place_kv_kernel`."""
    return {
        "BLOCK_HEADS": triton.next_power_of_2(kv_heads),
        "BLOCK_HALF": triton.next_power_of_2(half),
        "BLOCK_REST": triton.next_power_of_2(max(head_dim - 2 * half, 1)),
        "BLOCK": triton.next_power_of_2(kv_heads * head_dim),
        "num_warps": 4,
    }


def place_kv(
    kv_pool: torch.Tensor,
    source_slot: torch.Tensor,
    target_slot: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """As `reference.place_kv`; dimensions are contiguous, cos and sin have equal strides."""
    _, num_layers, _, kv_heads, block_size, head_dim = kv_pool.shape
    block_stride, layer_stride, side_stride, head_stride, slot_stride, _ = kv_pool.stride()
    assert kv_pool.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1 and cos.stride() == sin.stride()
    num_rows, half = source_slot.shape[0], cos.shape[1]
    if num_rows == 0:
        return
    place_kv_kernel[(num_rows, num_layers)](
        kv_pool, source_slot, target_slot, positions, cos, sin,
        block_stride, layer_stride, side_stride, head_stride, slot_stride, cos.stride(0),
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half, BLOCK_SIZE=block_size,
        **place_kv_config(kv_heads, head_dim, half),
    )  # fmt: skip
