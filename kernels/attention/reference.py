"""Paged attention in plain torch: the meaning that every other implementation is compared with.

Knows tensors only. One dense softmax per sequence in fp32 (float64 inputs stay float64), or two merged by log-sum-exp
where a group shares its first keys; no tiles, no splits. Called through `kvlite.ops` (backend "reference") and by the
kernel tests.
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
    prefix_group: torch.Tensor | None = None,
    group_seqs: torch.Tensor | None = None,
) -> None:
    """Attention of packed query rows over paged keys and values; writes `out` and `lse`.

    q, out [T, H, D] · k_cache, v_cache [B, block_size, KH, D], any strides · block_table [R, NB] int32 ·
    query_start [S+1], context_len [S], seq_row [S], last_key [T] int32 · lse [T, H] fp32 · window in keys, 0 = none.
    Row m of sequence s sees key n iff n <= last_key[m], n < context_len[s] and (no window or n > last_key[m] - window).
    A row that sees nothing gets out 0 and lse -inf. Rows outside query_start[0]..query_start[S] are left untouched.

    prefix_group [G, 3]: first entry of group_seqs [M], sequences, keys that those share: the same blocks, seen by all
    their rows; rows without sequences are none. It says how keys may be read, never which: a window ignores it.
    """
    bounds, contexts, table_rows = query_start.tolist(), context_len.tolist(), seq_row.tolist()
    caches, compute = (k_cache, v_cache), torch.promote_types(q.dtype, torch.float32)
    starts: dict[int, int] = {}
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if prefix_group is not None and group_seqs is not None and not window:
        for first, count, num_keys in prefix_group.tolist():
            members = group_seqs[first : first + count].tolist()
            rows = [torch.arange(bounds[s], bounds[s + 1], device=q.device) for s in members]
            if not count:
                continue
            k, v = _gather(caches, block_table[table_rows[members[0]]], range(num_keys), compute)
            queries = q[torch.cat(rows)].to(compute)
            part = _attend(queries, k, v, scale, torch.zeros(len(queries), num_keys, dtype=torch.bool, device=q.device))
            lengths = [len(some) for some in rows]
            parts |= dict(zip(members, zip(*(x.split(lengths) for x in part), strict=True), strict=True))
            starts |= dict.fromkeys(members, num_keys)
    for s, (first, end) in enumerate(pairwise(bounds)):
        if first == end:
            continue
        last = last_key[first:end].long()
        num_keys = max(0, min(contexts[s], int(last.max()) + 1))
        first_key = min(num_keys, max(0, int(last.min()) - window + 1)) if window else starts.get(s, 0)
        key = torch.arange(first_key, num_keys, device=q.device)
        k, v = _gather(caches, block_table[table_rows[s]], range(first_key, num_keys), compute)
        hidden = key[None, :] > last[:, None]
        if window:
            hidden |= key[None, :] <= last[:, None] - window
        result, total = _attend(q[first:end].to(compute), k, v, scale, hidden)
        if s in parts:
            shared, shared_total = parts[s]
            merged = torch.logaddexp(shared_total, total)
            result = shared * (shared_total - merged).exp()[..., None] + result * (total - merged).exp()[..., None]
            total = merged
        out[first:end] = result.to(out.dtype)
        lse[first:end] = total.to(lse.dtype)


def _gather(
    caches: tuple[torch.Tensor, torch.Tensor], blocks: torch.Tensor, keys: range, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, KH, D] of `keys` of the sequence whose blocks [NB] are given."""
    block_size = caches[0].shape[1]
    key = torch.arange(keys.start, keys.stop, device=blocks.device)
    block = blocks.index_select(0, key // block_size)
    k, v = (cache[block, key % block_size].to(dtype) for cache in caches)
    return k, v


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [M, H, D] and log-sum-exp [M, H] of queries [M, H, D] over the keys that `hidden` [M, N] does not hide."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    score = (torch.einsum("mhd,nhd->hmn", q, k) * scale).masked_fill(hidden, float("-inf"))
    total = torch.logsumexp(score, dim=-1)
    weight = torch.exp(score - total.masked_fill(total.isneginf(), 0.0)[..., None])
    return torch.einsum("hmn,nhd->mhd", weight, v), total.T
