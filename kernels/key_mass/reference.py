"""Attention received per key, in plain torch: the meaning of `key_mass`.

Knows tensors only; `lse` comes from `attention` over the same cache. Called through `kvlite.ops` and by the tests.
"""

import torch


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
    """Attention that each key in [start, end) of one sequence receives, summed over `rows` and heads.

    q [T, H, D] · lse [T, H] fp32 · k_cache [B, block_size, KH, D] · block_table_row [NB] int32 · rows [R] int32, rows
    of q · last_key [T] int32. Returns [end - start] fp32. p = exp(q.k * scale - lse) for keys n <= last_key[row], else
    0; a row whose lse is -inf saw nothing and gives nothing. Cost R*H*(end-start)*D. Raises ValueError when q and lse
    disagree or the range is negative.
    """
    if q.shape[:2] != lse.shape:
        raise ValueError(f"q has rows and heads {tuple(q.shape[:2])}, lse {tuple(lse.shape)}: they must be equal")
    if not 0 <= start <= end:
        raise ValueError(f"key range [{start}, {end}) must start at 0 or later and not end before it starts")
    block_size = k_cache.shape[1]
    groups = q.shape[1] // k_cache.shape[2]
    key = torch.arange(start, end, device=q.device)
    block = block_table_row.index_select(0, key // block_size)
    k = k_cache[block, key % block_size].float().repeat_interleave(groups, dim=1)
    score = torch.einsum("rhd,nhd->rhn", q[rows].float(), k) * scale
    chosen_lse = lse[rows][..., None]
    visible = (key <= last_key[rows].long()[:, None])[:, None, :] & ~chosen_lse.isneginf()
    return torch.exp(score - chosen_lse).masked_fill(~visible, 0.0).sum(dim=(0, 1))
