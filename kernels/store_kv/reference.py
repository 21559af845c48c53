"""Scatter of new keys and values into the paged cache, in plain torch.

Knows tensors only. Called through `kvlite.ops` and by the tests.
"""

import torch


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Writes row t of k and v to slot slot_mapping[t]; slot -1 writes nothing.

    k, v [T, KH, D] · k_cache, v_cache [B, block_size, KH, D], any strides · slot_mapping [T] int32,
    slot = block * block_size + offset. The non-negative slots of one call are distinct.
    """
    block_size = k_cache.shape[1]
    row = (slot_mapping >= 0).nonzero().squeeze(1)
    slot = slot_mapping.index_select(0, row).long()
    block, offset = slot // block_size, slot % block_size
    k_cache[block, offset] = k.index_select(0, row)
    v_cache[block, offset] = v.index_select(0, row)
