"""Attention received per key in Triton: one program per key tile and KV head, looping over the chosen rows.

Knows tensors only. No atomics: the sum's order is fixed by the shapes. Called through `kvlite.ops` (backend "triton").
"""

import torch
import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_rows", "start", "end"])
def key_mass_kernel(
    q_ptr, lse_ptr, k_ptr, table_ptr, rows_ptr, last_ptr, mass_ptr, num_rows, start, end,
    q_row_stride, q_head_stride, lse_row_stride, k_block_stride, k_slot_stride, k_head_stride, mass_stride, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass[kv_head, key - start] = sum over rows and the GROUP query heads of this KV head."""
    kv_head = tl.program_id(1).to(tl.int64)
    key = start + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
    slot = (key % BLOCK_SIZE).to(tl.int64)
    k_ptrs = k_ptr + kv_head * k_head_stride + (block * k_block_stride + slot * k_slot_stride)[:, None] + dim[None, :]
    k = tl.load(k_ptrs, mask=(key < end)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, num_rows * GROUP, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        used = m < num_rows * GROUP
        row = tl.load(rows_ptr + m // GROUP, mask=used, other=0).to(tl.int64)
        head = kv_head * GROUP + m % GROUP
        last = tl.load(last_ptr + row, mask=used, other=-1)
        lse = tl.load(lse_ptr + row * lse_row_stride + head, mask=used, other=float("-inf"))
        q_ptrs = q_ptr + (row * q_row_stride + head * q_head_stride)[:, None] + dim[None, :]
        q = tl.load(q_ptrs, mask=used[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = (key[None, :] <= last[:, None]) & (lse != float("-inf"))[:, None]
        # Masked before exp2: score - (-inf) and unwritten keys must not reach the sum.
        mass += tl.sum(tl.exp2(tl.where(visible, (score - lse[:, None]) * _LOG2_E, float("-inf"))), 0)
    tl.store(mass_ptr + kv_head * mass_stride + key - start, mass, mask=key < end)


def key_mass_config(dtype: torch.dtype, group: int) -> dict[str, int]:
    """Tile and launch sizes of `key_mass_kernel`."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def key_mass(
    q: torch.Tensor,
    lse: torch.Tensor,
    k_cache: torch.Tensor,
    block_table_row: torch.Tensor,
    rows: torch.Tensor,
    last_key: torch.Tensor,
    start: int,
    end: int,
    scale: float,
) -> torch.Tensor:
    """As `reference.key_mass`."""
    if q.shape[:2] != lse.shape:
        raise ValueError(f"q has rows and heads {tuple(q.shape[:2])}, lse {tuple(lse.shape)}: they must be equal")
    if not 0 <= start <= end:
        raise ValueError(f"key range [{start}, {end}) must start at 0 or later and not end before it starts")
    assert q.stride(-1) == k_cache.stride(-1) == lse.stride(-1) == 1
    _, num_heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    config = key_mass_config(q.dtype, num_heads // kv_heads)
    mass = torch.empty((kv_heads, end - start), dtype=torch.float32, device=q.device)
    if start == end:
        return mass.sum(dim=0)
    key_mass_kernel[(triton.cdiv(end - start, config["BLOCK_N"]), kv_heads)](
        q, lse, k_cache, block_table_row, rows, last_key, mass, rows.shape[0], start, end,
        q.stride(0), q.stride(1), lse.stride(0), *k_cache.stride()[:3], mass.stride(0), scale,
        GROUP=num_heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    return mass.sum(dim=0)
