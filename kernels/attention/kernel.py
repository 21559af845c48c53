"""Paged attention in Triton: a prefill kernel, a decode kernel with split keys, and the merge of its splits.

Knows tensors only; never reads device memory from the host, so a call can be captured in a CUDA graph. A row's bits
depend on its own keys, and on whether its sequence brings one row (decode) or more (prefill), never on other sequences
nor on who shares a prefix with it. Addresses are int64. Called through `kvlite.ops` (backend "triton"), tests and
`kernels/aot.py`.
"""

import torch
import triton
import triton.language as tl

from kvlite.kernels.attention.splits import entry_of, group_at, row_of, row_splits, split_start, whole_splits

SPLIT = 256
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


@triton.jit(do_not_specialize=["num_seqs", "num_groups", "num_entries"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, start_ptr, context_ptr, seq_row_ptr, last_ptr, group_ptr, member_ptr,
    part_ptr, part_lse_ptr, num_seqs, num_groups, num_entries, num_heads, q_row_stride, q_head_stride, table_stride,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride, scale_log2, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr, ALL_ROWS: tl.constexpr, SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Splits program_id(2), + num_programs(2), ... of one KV head; each row's partial of each split is stored.

    The first num_entries programs of axis 0 take the shared splits of BLOCK_M // GROUP members of a group, from that
    entry of group_seqs on, or nothing. Each other takes one row, in the same tile, less the splits that its group has.
    One loop serves both, so that a row's arithmetic is what it is alone.
    """
    TILE_SEQS: tl.constexpr = BLOCK_M // GROUP
    m = tl.arange(0, BLOCK_M)
    index = tl.program_id(0) - num_entries
    shared_keys = 0
    if index < 0:
        entry = tl.program_id(0)
        first_entry, end_entry, shared_keys = group_at(entry, group_ptr, num_groups)
        end_entry = tl.where((entry - first_entry) % TILE_SEQS == 0, end_entry, 0)
        place = entry + m // GROUP
        seq = tl.load(member_ptr + place, mask=(m < TILE_SEQS * GROUP) & (place < end_entry), other=-1)
        leader = tl.max(tl.where(m == 0, seq, -1), 0)
        row = tl.load(start_ptr + seq, mask=seq >= 0, other=0)
        # Who brings several rows is no member: a tile has room for one of each.
        used = (seq >= 0) & (tl.load(start_ptr + seq + 1, mask=seq >= 0, other=0) == row + 1)
    else:
        its_row, leader, num_rows = row_of(index, start_ptr, num_seqs, ALL_ROWS)
        used = m < tl.minimum(num_rows, 1) * GROUP
        row = tl.where(used, its_row, 0)
        seq = tl.where(used, leader, 0)
        if GROUPED and num_rows == 1:
            entry = entry_of(leader, member_ptr, num_entries)
            _, _, shared_keys = group_at(entry, group_ptr, num_groups)
    if tl.max(used.to(tl.int32), 0) == 0:
        return

    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    dim = tl.arange(0, BLOCK_D)
    row_mask = used[:, None] & (dim < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + (row.to(tl.int64) * q_row_stride + head * q_head_stride)[:, None] + dim[None, :]
    q = tl.load(q_ptrs, mask=row_mask, other=0.0)
    last = tl.max(tl.load(last_ptr + row, mask=used, other=-1), 0)
    context = tl.load(context_ptr + leader)
    start_key, end_key, origin, end_split = row_splits(last, context, window, WINDOWED, SPLIT, MAX_SPLITS)
    first_split = whole_splits(shared_keys // SPLIT, MAX_SPLITS)
    if index < 0:
        first_split, end_split, end_key = 0, first_split, shared_keys
    table_row = table_ptr + tl.load(seq_row_ptr + leader).to(tl.int64) * table_stride
    k_base = k_ptr + kv_head * k_head_stride
    v_base = v_ptr + kv_head * v_head_stride
    part_row = (row if ALL_ROWS else seq) * (MAX_SPLITS * num_heads) + head.to(tl.int32)
    # Keys from start_key to the end of a split are seen by every row of the tile: no mask of a row's own.
    no_last = tl.full((BLOCK_M,), 2147483647, dtype=tl.int32)
    for split in range(first_split + tl.program_id(2), end_split, tl.num_programs(2)):
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        split_end = tl.minimum(origin + split_start(split + 1, SPLIT), end_key)
        for first in range(origin + split_start(split, SPLIT), split_end, BLOCK_N):
            acc, top, total = _attend_block(
                q, acc, top, total, first, no_last, start_key, split_end, k_base, v_base, table_row,
                k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, scale_log2, window,
                HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, False, True, PRECISION,
            )  # fmt: skip
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        part = part_row + split * num_heads
        tl.store(part_ptr + (part.to(tl.int64) * HEAD_DIM)[:, None] + dim[None, :], out, mask=row_mask)
        tl.store(part_lse_ptr + part, top + tl.log2(total), mask=used)


@triton.jit(do_not_specialize=["num_seqs"])
def merge_kernel(
    part_ptr, part_lse_ptr, start_ptr, context_ptr, last_ptr, out_ptr, lse_ptr,
    num_seqs, num_heads, out_row_stride, out_head_stride, lse_row_stride, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr, ALL_ROWS: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Splits of one row and query head, 32 at a time in ascending order, whoever computed them."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    row, seq, num_rows = row_of(index, start_ptr, num_seqs, ALL_ROWS)
    if num_rows == 0:
        return
    dim = tl.arange(0, BLOCK_D)
    last, context = tl.load(last_ptr + row), tl.load(context_ptr + seq)
    _, _, _, num_splits = row_splits(last, context, window, WINDOWED, SPLIT, MAX_SPLITS)
    out = tl.zeros((BLOCK_D,), dtype=tl.float32)
    top = float("-inf")
    total = 0.0
    for base in range(0, num_splits, 32):
        split = base + tl.arange(0, 32)
        part = (index.to(tl.int64) * MAX_SPLITS + split) * num_heads + head
        part_lse = tl.load(part_lse_ptr + part, mask=split < num_splits, other=float("-inf"))
        mask = (split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(part_ptr + part[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(part_lse - reference)
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(weight, 0)
        out = out * fade + tl.sum(values * weight[:, None], 0)
        top = new_top
    row = row.to(tl.int64)
    out = out / tl.where(total == 0.0, 1.0, total)
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


def decode_config(dtype: torch.dtype, head_dim: int, group: int) -> dict[str, int]:
    """Tile and launch sizes of `decode_kernel`; BLOCK_N divides SPLIT.

    Five stages, because the block table's load takes two: fewer leave K and V single-buffered. Wide heads need
    registers that only the smaller tile has to spare: at head dim 128 the larger one spills under Triton 3.6, and three
    of its programs fit on a multiprocessor where four of the smaller one do. BLOCK_M is what a row alone needs: members
    of a group fill it, so that nobody's bits depend on company.
    """
    block_m = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32 or head_dim > 128:
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": block_m, "BLOCK_N": 32 if head_dim > 64 else 64, "num_warps": 4, "num_stages": 5}


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

    A group's shared splits are read once for as many of its one-row members as a tile of `decode_kernel` holds; where
    that is one, and in the rows of longer chunks, each reads its own.
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
    config = decode_config(q.dtype, head_dim, group)
    tables, sizes = (query_start, query_start), (0, 0)
    if prefix_group is not None and group_seqs is not None and not window and config["BLOCK_M"] >= 2 * group:
        assert prefix_group.is_contiguous() and group_seqs.is_contiguous()
        tables, sizes = (prefix_group, group_seqs), (prefix_group.shape[0], group_seqs.shape[0])
    decode_kernel[(sizes[1] + parts[0], kv_heads, workers)](
        *inputs, *tables, part, part_lse, num_seqs, *sizes, num_heads, q.stride(0), q.stride(1), block_table.stride(0),
        *cache_strides, scale * _LOG2_E, window,
        GROUPED=tables[0] is prefix_group, **shape, **tiles, **splits, **config,
    )  # fmt: skip
    merge_kernel[(parts[0], num_heads)](
        part, part_lse, query_start, context_len, last_key, out, lse, num_seqs,
        num_heads, out.stride(0), out.stride(1), lse.stride(0), window, **shape, **splits, num_warps=4,
    )  # fmt: skip


def max_splits(table_keys: int) -> int:
    """Splits that a row may have when a block table holds `table_keys` keys: 32 up to 8,192, 16 more per double."""
    units = triton.cdiv(table_keys, SPLIT)
    octave = max(0, (units - 1).bit_length() - 5)
    return triton.cdiv(units, 1 << octave) + 16 * octave
