"""Paged attention in Triton: a prefill kernel, a decode kernel with split keys, and the merge of its splits.

Knows tensors only; never reads device memory from the host, so a call can be captured in a CUDA graph. A row's bits
depend on its own keys, and on whether its sequence brings one row (decode) or more (prefill), never on other sequences.
Addresses are int64. Called through `kvlite.ops` (backend "triton"), tests and `kernels/aot.py`.
"""

import torch
import triton
import triton.language as tl

SPLIT = 256
MAX_SPLITS = 32
# Decode programs aimed at per launch: four waves of an H200's 132 multiprocessors at four programs each.
_DECODE_PROGRAMS = 132 * 16
_LOG2_E = 1.4426950408889634
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend_block(
    q, acc, top, total, first, last, start_key, end_key, k_ptr, v_ptr, table_ptr,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, scale_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first..first+BLOCK_N; a block that a row cannot see leaves that row's bits alone."""
    key = first + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    # Slots outside [start_key, end_key) may never have been written: not loading them keeps NaNs out of 0 * v.
    live = (key >= start_key) & (key < end_key) if MASKED else key >= 0
    load_mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    slot = (key % BLOCK_SIZE).to(tl.int64)
    k_ptrs = k_ptr + (block * k_block_stride + slot * k_slot_stride)[:, None] + dim[None, :]
    v_ptrs = v_ptr + (block * v_block_stride + slot * v_slot_stride)[:, None] + dim[None, :]
    if MASKED or BLOCK_D != HEAD_DIM:
        k = tl.load(k_ptrs, mask=load_mask, other=0.0)
        v = tl.load(v_ptrs, mask=load_mask, other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASKED:
        visible = live[None, :] & (key[None, :] <= last[:, None])
        if WINDOWED:
            visible &= key[None, :] > last[:, None] - window
        score = tl.where(visible, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - reference[:, None])
    fade = tl.exp2(top - reference)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_seqs"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, start_ptr, context_ptr, seq_row_ptr, last_ptr, out_ptr, lse_ptr, num_seqs,
    q_row_stride, q_head_stride, out_row_stride, out_head_stride, lse_row_stride, table_stride,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride, scale_log2, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_SEQS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M // GROUP rows of one sequence times the GROUP query heads of one KV head."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)

    # Tiles of sequence s start at query_start[s] // BLOCK_Q + s; rounding leaves at most one idle tile per sequence.
    index = tl.arange(0, BLOCK_SEQS)
    tile_start = tl.load(start_ptr + index, mask=index < num_seqs, other=0) // BLOCK_Q + index
    seq = tl.sum(((tile_start <= tile) & (index < num_seqs)).to(tl.int32), 0) - 1
    if seq < 0:
        return
    seq_start = tl.load(start_ptr + seq)
    seq_end = tl.load(start_ptr + seq + 1)
    first_row = seq_start + (tile - seq_start // BLOCK_Q - seq) * BLOCK_Q
    if (first_row >= seq_end) | (seq_end - seq_start == 1):
        return

    m = tl.arange(0, BLOCK_M)
    row = (first_row + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    used = (m < BLOCK_Q * GROUP) & (row < seq_end)
    dim = tl.arange(0, BLOCK_D)
    row_mask = used[:, None] & (dim < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + (row * q_row_stride + head * q_head_stride)[:, None] + dim[None, :]
    q = tl.load(q_ptrs, mask=row_mask, other=0.0)
    last = tl.load(last_ptr + row, mask=used, other=-1)
    context = tl.load(context_ptr + seq)
    smallest_last = tl.min(tl.where(used, last, 2147483646), 0)
    end_key = tl.minimum(tl.max(last, 0) + 1, context)
    table_row = table_ptr + tl.load(seq_row_ptr + seq).to(tl.int64) * table_stride
    k_base = k_ptr + kv_head * k_head_stride
    v_base = v_ptr + kv_head * v_head_stride

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if WINDOWED:
        start_key = tl.maximum(smallest_last - window + 1, 0)
        masked_from = start_key // BLOCK_N * BLOCK_N
    else:
        start_key = 0
        masked_from = tl.maximum(tl.minimum(smallest_last + 1, context), 0) // BLOCK_N * BLOCK_N
        for first in range(0, masked_from, BLOCK_N):
            acc, top, total = _attend_block(
                q, acc, top, total, first, last, start_key, end_key, k_base, v_base, table_row,
                k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, scale_log2, window,
                HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOWED, False, PRECISION,
            )  # fmt: skip
    for first in range(masked_from, end_key, BLOCK_N):
        acc, top, total = _attend_block(
            q, acc, top, total, first, last, start_key, end_key, k_base, v_base, table_row,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, scale_log2, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOWED, True, PRECISION,
        )  # fmt: skip

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptrs = out_ptr + (row * out_row_stride + head * out_head_stride)[:, None] + dim[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask)
    tl.store(lse_ptr + row * lse_row_stride + head, (top + tl.log2(total)) * _LN_2, mask=used)


@triton.jit
def _row_splits(last, context, window, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(first visible key, end, key where split 0 starts, keys per split, splits): functions of this row alone."""
    end_key = tl.maximum(tl.minimum(last + 1, context), 0)
    start_key = 0
    if WINDOWED:
        start_key = tl.maximum(last - window + 1, 0)
    origin = start_key // SPLIT * SPLIT
    segments = tl.maximum(tl.cdiv(end_key, SPLIT) - start_key // SPLIT, 0)
    keys_per_split = tl.maximum(tl.cdiv(segments, MAX_SPLITS), 1) * SPLIT
    return start_key, end_key, origin, keys_per_split, tl.cdiv(tl.maximum(end_key - origin, 0), keys_per_split)


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, start_ptr, context_ptr, seq_row_ptr, last_ptr, part_ptr, part_lse_ptr,
    num_heads, q_row_stride, q_head_stride, table_stride,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride, scale_log2, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr, ALL_ROWS: tl.constexpr, SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Splits program_id(2), + num_programs(2), ... of one sequence and KV head; each split's partial is stored."""
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row_start = tl.load(start_ptr + seq).to(tl.int64)
    row_end = tl.load(start_ptr + seq + 1).to(tl.int64)
    if not ALL_ROWS:
        row_end = tl.where(row_end - row_start == 1, row_end, row_start)
    context = tl.load(context_ptr + seq)
    table_row = table_ptr + tl.load(seq_row_ptr + seq).to(tl.int64) * table_stride
    k_base = k_ptr + kv_head * k_head_stride
    v_base = v_ptr + kv_head * v_head_stride
    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + m
    row_mask = (m < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]

    for row in range(row_start, row_end):
        row_last = tl.load(last_ptr + row)
        last = tl.zeros((BLOCK_M,), dtype=tl.int32) + row_last
        start_key, end_key, origin, keys_per_split, num_splits = _row_splits(
            row_last, context, window, WINDOWED, SPLIT, MAX_SPLITS
        )
        q_ptrs = q_ptr + row * q_row_stride + (head * q_head_stride)[:, None] + dim[None, :]
        q = tl.load(q_ptrs, mask=row_mask, other=0.0)
        part_row = (row if ALL_ROWS else seq) * MAX_SPLITS
        for split in range(tl.program_id(2), num_splits, tl.num_programs(2)):
            acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            split_start = origin + split * keys_per_split
            split_end = tl.minimum(split_start + keys_per_split, end_key)
            for first in range(split_start, split_end, BLOCK_N):
                acc, top, total = _attend_block(
                    q, acc, top, total, first, last, start_key, split_end, k_base, v_base, table_row,
                    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, scale_log2, window,
                    HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOWED, True, PRECISION,
                )  # fmt: skip
            out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            part = (part_row + split) * num_heads + head
            tl.store(part_ptr + part[:, None] * HEAD_DIM + dim[None, :], out, mask=row_mask)
            tl.store(part_lse_ptr + part, top + tl.log2(total), mask=m < GROUP)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, start_ptr, context_ptr, last_ptr, out_ptr, lse_ptr,
    num_heads, out_row_stride, out_head_stride, lse_row_stride, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr, ALL_ROWS: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Splits of one sequence and query head, summed in one order that MAX_SPLITS alone fixes."""
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row_start = tl.load(start_ptr + seq).to(tl.int64)
    row_end = tl.load(start_ptr + seq + 1).to(tl.int64)
    if not ALL_ROWS:
        row_end = tl.where(row_end - row_start == 1, row_end, row_start)
    context = tl.load(context_ptr + seq)
    dim = tl.arange(0, BLOCK_D)
    split = tl.arange(0, MAX_SPLITS)
    for row in range(row_start, row_end):
        _, _, _, _, num_splits = _row_splits(tl.load(last_ptr + row), context, window, WINDOWED, SPLIT, MAX_SPLITS)
        part = ((row if ALL_ROWS else seq) * MAX_SPLITS + split) * num_heads + head
        part_lse = tl.load(part_lse_ptr + part, mask=split < num_splits, other=float("-inf"))
        mask = (split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(part_ptr + part[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        top = tl.max(part_lse, 0)
        weight = tl.exp2(part_lse - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight, 0)
        out = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        out_ptrs = out_ptr + row * out_row_stride + head * out_head_stride + dim
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
        tl.store(lse_ptr + row * lse_row_stride + head, (top + tl.log2(total)) * _LN_2)


def prefill_config(dtype: torch.dtype, head_dim: int, group: int) -> dict[str, int]:
    """Tile and launch sizes of `prefill_kernel`; chosen by shape alone, so that bits do not depend on the batch."""
    if dtype == torch.float32:
        # Triton 3.6 spills with the larger tile of keys at head dim 128.
        block_n = 32 if head_dim <= 64 else 16
        return {"BLOCK_M": max(32, triton.next_power_of_2(group)), "BLOCK_N": block_n, "num_warps": 8, "num_stages": 1}
    block_m = max(128, triton.next_power_of_2(group))
    if head_dim > 128:
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def decode_config(dtype: torch.dtype, head_dim: int, group: int, windowed: bool) -> dict[str, int]:
    """Tile and launch sizes of `decode_kernel`; BLOCK_N divides SPLIT.

    Five stages, because the block table's load takes two: fewer leave K and V single-buffered. The window's mask and
    wide heads need registers that only the smaller tile has to spare: at head dim 128 the larger one spills under
    Triton 3.6, and three of its programs fit on a multiprocessor where four of the smaller one do.
    """
    block_m = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32 or head_dim > 128:
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": block_m, "BLOCK_N": 32 if windowed or head_dim > 64 else 64, "num_warps": 4, "num_stages": 5}


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    seq_row: torch.Tensor,
    last_key: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix_group: torch.Tensor | None = None,
    group_seqs: torch.Tensor | None = None,
) -> None:
    """As `reference.attention`. One launch pair for one-row sequences, one more when T > S; no host synchronisation.

    Groups are not used yet: every sequence reads its own keys.
    The last dimension of every tensor is contiguous. Scratch: min(T, S) * max_splits * H * (D + 1) floats.
    """
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == out.stride(-1) == lse.stride(-1) == 1
    num_rows, num_heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    num_seqs = context_len.shape[0]
    if num_rows == 0 or num_seqs == 0:
        return
    group = num_heads // kv_heads
    all_rows = num_rows <= num_seqs
    inputs = (q, k_cache, v_cache, block_table, query_start, context_len, seq_row, last_key)
    cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    shape = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "WINDOWED": window > 0,
    }
    tiles = {
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    if not all_rows:
        config = prefill_config(q.dtype, head_dim, group)
        grid = (num_rows // (config["BLOCK_M"] // group) + num_seqs, kv_heads)
        prefill_kernel[grid](
            *inputs, out, lse, num_seqs,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), lse.stride(0), block_table.stride(0),
            *cache_strides, scale * _LOG2_E, window,
            BLOCK_SEQS=triton.next_power_of_2(num_seqs), **shape, **tiles, **config,
        )  # fmt: skip

    splits = {"ALL_ROWS": all_rows, "SPLIT": SPLIT, "MAX_SPLITS": max_splits(block_table.shape[1] * block_size)}
    parts = (min(num_rows, num_seqs), splits["MAX_SPLITS"], num_heads)
    part = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
    workers = min(splits["MAX_SPLITS"], triton.cdiv(_DECODE_PROGRAMS, num_seqs * kv_heads))
    decode_kernel[(num_seqs, kv_heads, workers)](
        *inputs, part, part_lse, num_heads, q.stride(0), q.stride(1), block_table.stride(0),
        *cache_strides, scale * _LOG2_E, window,
        **shape, **tiles, **splits, **decode_config(q.dtype, head_dim, group, window > 0),
    )  # fmt: skip
    merge_kernel[(num_seqs, num_heads)](
        part, part_lse, query_start, context_len, last_key, out, lse,
        num_heads, out.stride(0), out.stride(1), lse.stride(0), window, **shape, **splits, num_warps=4,
    )  # fmt: skip


def max_splits(table_keys: int) -> int:
    """Splits that a row may have when a block table holds `table_keys` keys: a power of two, at most MAX_SPLITS."""
    return min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(table_keys, SPLIT)))
