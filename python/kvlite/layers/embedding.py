"""Token embedding: rows of a table, gathered into a buffer.

Ids are checked long before (every id is in [0, vocab)); this layer trusts them. Called by `models.decoder`.
"""

from __future__ import annotations

import torch


class Embedding:
    """out[t] = weight[token_ids[t]]; weight [V, W], token_ids [T] int32 or int64, out [T, W] as wide or wider."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `out`."""
        if out.dtype == self.weight.dtype:
            torch.index_select(self.weight, 0, token_ids, out=out)
        else:
            out.copy_(self.weight.index_select(0, token_ids))
