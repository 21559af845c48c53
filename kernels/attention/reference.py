"""Paged attention in plain torch: the meaning that every other implementation is compared with.

Knows tensors only. One dense softmax per sequence in fp32 (float64 inputs stay float64); no tiles, no splits.
Called through `kvlite.ops` (backend "reference") and by the kernel tests.
"""

from itertools import pairwise

import torch


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
) -> None:
    """Attention of packed query rows over paged keys and values; writes `out` and `lse`.

    q, out [T, H, D] · k_cache, v_cache [B, block_size, KH, D], any strides · block_table [R, NB] int32 ·
    query_start [S+1], context_len [S], seq_row [S], last_key [T] int32 · lse [T, H] fp32 · window in keys, 0 = none.
    Row m of sequence s sees key n iff n <= last_key[m], n < context_len[s] and (no window or n > last_key[m] - window).
    A row that sees nothing gets out 0 and lse -inf. Rows outside query_start[0]..query_start[S] are left untouched.
    """
    block_size = k_cache.shape[1]
    groups = q.shape[1] // k_cache.shape[2]
    bounds, contexts, table_rows = query_start.tolist(), context_len.tolist(), seq_row.tolist()
    compute = torch.promote_types(q.dtype, torch.float32)
    for s, (first, end) in enumerate(pairwise(bounds)):
        if first == end:
            continue
        last = last_key[first:end].long()
        num_keys = max(0, min(contexts[s], int(last.max()) + 1))
        first_key = min(num_keys, max(0, int(last.min()) - window + 1)) if window else 0
        key = torch.arange(first_key, num_keys, device=q.device)
        block = block_table[table_rows[s]].index_select(0, key // block_size)
        k = k_cache[block, key % block_size].to(compute).repeat_interleave(groups, dim=1)
        v = v_cache[block, key % block_size].to(compute).repeat_interleave(groups, dim=1)
        score = torch.einsum("mhd,nhd->hmn", q[first:end].to(compute), k) * scale
        hidden = key[None, :] > last[:, None]
        if window:
            hidden |= key[None, :] <= last[:, None] - window
        score = score.masked_fill(hidden, float("-inf"))
        total = torch.logsumexp(score, dim=-1)
        weight = torch.exp(score - total.masked_fill(total.isneginf(), 0.0)[..., None])
        out[first:end] = torch.einsum("hmn,nhd->mhd", weight, v).to(out.dtype)
        lse[first:end] = total.T.to(lse.dtype)
