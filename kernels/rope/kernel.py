"""Rotary position embedding in Triton: one program per row and tile of heads, q and k in one launch.

Knows tensors only. Called through `kvlite.ops` (backend "triton").
"""

import torch
import triton
import triton.language as tl

BLOCK_HEADS = 16


@triton.jit
def turn(low, high, cos, sin):
    """One pair turned by its angle, fp32. Whoever rotates keys calls this, so that equal inputs give equal bits."""
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rotate(x_ptr, head, num_heads, head_stride, pair, cos, sin, HALF: tl.constexpr):
    """Rotates heads `head` of one row in place; each program owns its heads, so loads precede stores."""
    mask = (head < num_heads)[:, None] & (pair < HALF)[None, :]
    low_ptrs = x_ptr + (head * head_stride)[:, None] + pair[None, :]
    low = tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    low, high = turn(low, high, cos, sin)
    tl.store(low_ptrs, low.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(low_ptrs + HALF, high.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, position_ptr, cos_ptr, sin_ptr, num_heads, kv_heads,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, table_stride,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Tiles 0..ceil(H / BLOCK_HEADS) of program_id(1) are q's, the rest k's."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position = tl.load(position_ptr + row).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + position * table_stride + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * table_stride + pair, mask=pair < HALF, other=0.0)[None, :]
    q_tiles = tl.cdiv(num_heads, BLOCK_HEADS)
    head = tl.arange(0, BLOCK_HEADS)
    if tile < q_tiles:
        _rotate(q_ptr + row * q_row_stride, tile * BLOCK_HEADS + head, num_heads, q_head_stride, pair, cos, sin, HALF)
    else:
        head += (tile - q_tiles) * BLOCK_HEADS
        _rotate(k_ptr + row * k_row_stride, head, kv_heads, k_head_stride, pair, cos, sin, HALF)


def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As `reference.rope`; the last dimension of q and k is contiguous, cos and sin have equal strides."""
    assert q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1 and cos.stride() == sin.stride()
    num_rows, num_heads, _ = q.shape
    if num_rows == 0:
        return
    kv_heads, half = k.shape[1], cos.shape[1]
    grid = (num_rows, triton.cdiv(num_heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS))
    rope_kernel[grid](
        q, k, positions, cos, sin, num_heads, kv_heads,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0),
        HALF=half, BLOCK_HALF=triton.next_power_of_2(half), BLOCK_HEADS=BLOCK_HEADS, num_warps=4,
    )  # fmt: skip
