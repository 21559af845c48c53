"""Paged attention as a layer: writes the new keys and values, then reads every visible one through the block table.

Owns the scale and the window of its layer; knows neither projections nor RoPE. New rows are stored before they are
read, so prefill, chunks and decode are one path. Called by `models.decoder`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvlite.ops import Ops


class KeyIndex(Protocol):
    """Which keys each row may see and where they lie; int32 tensors. `models.batch.ForwardBatch` is one."""

    @property
    def last_key(self) -> torch.Tensor:
        """[T] largest visible key index of each row."""
        ...

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[T] slot of each row's own key and value, -1 = not stored."""
        ...

    @property
    def query_start(self) -> torch.Tensor:
        """[S+1] first row of each sequence."""
        ...

    @property
    def context_len(self) -> torch.Tensor:
        """[S] keys of each sequence."""
        ...

    @property
    def seq_row(self) -> torch.Tensor:
        """[S] row of the block table."""
        ...

    @property
    def prefix_group(self) -> torch.Tensor | None:
        """[G, 3] first entry of `group_seqs`, sequences, keys that they share."""
        ...

    @property
    def group_seqs(self) -> torch.Tensor | None:
        """[M] sequences, group by group."""
        ...

    @property
    def block_table(self) -> torch.Tensor:
        """[R, NB] blocks by position."""
        ...


class Attention:
    """Attention of one layer. `window` in keys, 0 = none; `scale` multiplies q.k."""

    def __init__(self, scale: float, window: int, ops: Ops) -> None:
        self.scale = scale
        self.window = window
        self._store_kv = ops.store_kv
        self._attention = ops.attention

    def __call__(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        keys: KeyIndex,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Writes `out` [T, H, D] and `lse` [T, H] fp32; `qkv` is q [T, H, D], k and v [T, KH, D]; `cache` is keys and
        values of this layer, [B, block_size, KH, D] each, any strides.
        """
        q, k, v = qkv
        k_cache, v_cache = cache
        self.store(k, v, cache, keys.slot_mapping)
        self._attention(
            q, k_cache, v_cache, keys.block_table, keys.query_start, keys.context_len, keys.seq_row, keys.last_key,
            self.scale, self.window, out, lse, keys.prefix_group, keys.group_seqs,
        )  # fmt: skip

    def store(
        self, k: torch.Tensor, v: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor
    ) -> None:
        """Writes k and v [T, KH, D] to slots [T] int32 of `cache`; -1 writes nothing."""
        self._store_kv(k, v, *cache, slots)
