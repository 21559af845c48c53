"""The reference ops made invariant by construction: a row's attention is a call of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvlite import ops

CPU = torch.device("cpu")


def rows_alone() -> ops.Ops:
    """The reference ops with attention called once per row, which makes it invariant by construction."""
    reference = ops.select(CPU, "reference")

    def attention(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
        query_start: torch.Tensor, context_len: torch.Tensor, seq_row: torch.Tensor, last_key: torch.Tensor,
        scale: float, window: int, out: torch.Tensor, lse: torch.Tensor, *groups: torch.Tensor | None,
    ) -> None:  # fmt: skip
        one = torch.tensor([0, 1], dtype=torch.int32)
        for s, (first, end) in enumerate(zip(query_start.tolist(), query_start.tolist()[1:], strict=False)):
            for row in range(first, end):
                at, sequence = slice(row, row + 1), slice(s, s + 1)
                reference.attention(
                    q[at], k_cache, v_cache, block_table, one, context_len[sequence], seq_row[sequence],
                    last_key[at], scale, window, out[at], lse[at],
                )  # fmt: skip

    return replace(reference, attention=attention)
