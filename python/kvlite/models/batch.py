"""`ForwardBatch`: the rows of one forward pass, where their keys go and which keys they see.

Tensors only; built by the runner from one plan, read by the decoder and its attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class ForwardBatch:
    """T rows of S sequences, on the model's device; int32 except where noted. Built by the runner from one plan."""

    token_ids: torch.Tensor
    """[T] int32 or int64, each in [0, vocab)."""
    positions: torch.Tensor
    """[T] RoPE positions, each in [0, max_model_len)."""
    last_key: torch.Tensor
    """[T] largest key index each row may see."""
    slot_mapping: torch.Tensor
    """[T] where each row's key and value go, -1 = nowhere."""
    query_start: torch.Tensor
    """[S+1] first row of each sequence."""
    context_len: torch.Tensor
    """[S] keys of each sequence, this batch's rows included."""
    seq_row: torch.Tensor
    """[S] row of each sequence in the block table."""
    block_table: torch.Tensor
    """[R, NB] blocks by position."""
    prefix_group: torch.Tensor | None = None
    """[G, 3] first entry of `group_seqs`, sequences, keys that they share; rows without sequences are none; None = none
    at all. A matter of speed alone."""
    group_seqs: torch.Tensor | None = None
    """[M] sequences, group by group; beside `prefix_group`."""
    segment_slot: torch.Tensor | None = None
    """[T] where the key before RoPE and the value go as well, -1 = nowhere; None = nowhere for all rows."""

    def keep(self, rows: NDArray[np.int64]) -> ForwardBatch:
        """The batch of these rows alone, ascending and at least one; sequences without a row drop out."""
        device = self.token_ids.device
        index = torch.tensor(rows, device=device)
        bounds = np.searchsorted(rows, self.query_start.cpu().numpy())
        sequences = torch.tensor(np.flatnonzero(np.diff(bounds)), device=device)
        slots = self.segment_slot
        return replace(
            self,
            token_ids=self.token_ids[index],
            positions=self.positions[index],
            last_key=self.last_key[index],
            slot_mapping=self.slot_mapping[index],
            query_start=torch.tensor(np.unique(bounds), dtype=torch.int32, device=device),
            context_len=self.context_len[sequences],
            seq_row=self.seq_row[sequences],
            prefix_group=None,
            group_seqs=None,
            segment_slot=None if slots is None else slots[index],
        )
