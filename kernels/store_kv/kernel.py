"""Scatter of new keys and values into the paged cache in Triton: one program per row copies its K and its V.

Knows tensors only; int64 addresses. Called through `kvlite.ops` (backend "triton").
"""

import torch
import triton
import triton.language as tl


@triton.jit
def store_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    k_block_stride, k_slot_stride, k_cache_head_stride, v_block_stride, v_slot_stride, v_cache_head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Row program_id(0), all heads; slot -1 writes nothing."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    if slot < 0:
        return
    block = (slot // BLOCK_SIZE).to(tl.int64)
    offset = (slot % BLOCK_SIZE).to(tl.int64)
    element = tl.arange(0, BLOCK)
    head, dim = element // HEAD_DIM, element % HEAD_DIM
    mask = element < KV_HEADS * HEAD_DIM
    k = tl.load(k_ptr + row * k_row_stride + head * k_head_stride + dim, mask=mask)
    v = tl.load(v_ptr + row * v_row_stride + head * v_head_stride + dim, mask=mask)
    k_target = k_cache_ptr + block * k_block_stride + offset * k_slot_stride
    v_target = v_cache_ptr + block * v_block_stride + offset * v_slot_stride
    tl.store(k_target + head * k_cache_head_stride + dim, k, mask=mask)
    tl.store(v_target + head * v_cache_head_stride + dim, v, mask=mask)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """As `reference.store_kv`; the last dimension of every tensor is contiguous."""
    assert k.stride(-1) == v.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    num_rows, kv_heads, head_dim = k.shape
    if num_rows == 0:
        return
    store_kv_kernel[(num_rows,)](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK=triton.next_power_of_2(kv_heads * head_dim),
        BLOCK_SIZE=k_cache.shape[1], num_warps=4,
    )  # fmt: skip
