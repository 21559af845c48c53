"""Copy of unrotated cache rows to other slots, keys rotated, in plain torch: `rope`, then `store_kv`, for every layer.

Knows tensors only. Called through `kvlite.ops` and by the tests.
"""

import torch

from kvlite.kernels.rope.reference import rope
from kvlite.kernels.store_kv.reference import store_kv


def place_kv(
    kv_pool: torch.Tensor,
    source_slot: torch.Tensor,
    target_slot: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Row target_slot[i] of every layer becomes row source_slot[i]: K rotated to positions[i], V as is.

    kv_pool [B, L, 2, KH, block_size, D] · source_slot, target_slot [P] int32, slot = block * block_size + offset ·
    positions [P] int32 · cos, sin [positions, rot/2] fp32. Targets are distinct and never a source of the same call.
    """
    block_size = kv_pool.shape[4]
    block, offset = source_slot.long() // block_size, source_slot.long() % block_size
    for layer in range(kv_pool.shape[1]):
        k_cache, v_cache = kv_pool[:, layer].transpose(2, 3).unbind(1)
        k, v = k_cache[block, offset], v_cache[block, offset]
        rope(k[:, :0], k, positions, cos, sin)
        store_kv(k, v, k_cache, v_cache, target_slot)
