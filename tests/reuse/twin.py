"""A second blend, as plain as can be: transformers' modules, dense attention over one array of keys per layer.

No blocks, no batches, no kernels: `run` computes some rows of one text over whatever keys the array holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class Text:
    """KV of one text by position, [layers, n, KH, D] each."""

    k: torch.Tensor
    raw_k: torch.Tensor
    """Before RoPE."""
    v: torch.Tensor


@dataclass(frozen=True)
class Seen:
    """What happened in one layer."""

    attention: torch.Tensor
    """[H, rows, n]; of layers that ran to their end."""
    new_v: torch.Tensor
    old_v: torch.Tensor


class Twin:
    """One transformers model; `windows` by layer, 0 = none."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[int]) -> None:
        self._model: Any = model
        self._windows = windows

    def text(self, length: int) -> Text:
        """Nothing computed yet."""
        c = self._model.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        shape = (c.num_hidden_layers, length, c.num_key_value_heads, head_dim)
        return Text(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))

    def place(self, text: Text, position: int, segment: Text, first: int) -> None:
        """The segment's rows from `first` on, rotated to where they are now."""
        length = segment.k.shape[1] - first
        at = slice(position, position + length)
        text.k[:, at] = self._rotate(segment.raw_k[:, first:], list(range(position, position + length)))
        text.v[:, at] = segment.v[:, first:]

    @torch.no_grad()
    def run(self, text: Text, positions: Sequence[int], ids: Sequence[int], depth: int | None = None) -> list[Seen]:
        """Computes rows, layer by layer; from layer `depth` on nothing is stored, and that layer shows its values."""
        p = torch.tensor(positions)
        x = self._model.model.embed_tokens(torch.tensor(ids))
        seen: list[Seen] = []
        for i, layer in enumerate(self._model.model.layers):
            a = layer.self_attn
            h = layer.input_layernorm(x)
            k_shape = (len(positions), *text.k.shape[2:])
            q, k, v = (
                a.q_proj(h).view(len(positions), -1, k_shape[-1]),
                a.k_proj(h).view(k_shape),
                a.v_proj(h).view(k_shape),
            )
            if hasattr(a, "q_norm"):
                q, k = a.q_norm(q), a.k_norm(k)
            old_v = text.v[i, p].clone()
            if i == depth:
                return [*seen, Seen(torch.empty(0), v, old_v)]
            text.raw_k[i, p], text.v[i, p] = k, v
            text.k[i, p] = self._rotate(k[None], positions)[0]
            groups = q.shape[1] // k.shape[1]
            keys = text.k[i].repeat_interleave(groups, 1)
            score = torch.einsum("rhd,nhd->hrn", self._rotate(q[None], positions)[0], keys) * a.scaling
            key = torch.arange(len(keys))
            hidden = key > p[:, None]
            if self._windows[i]:
                hidden |= key <= p[:, None] - self._windows[i]
            attention = torch.softmax(score.masked_fill(hidden, float("-inf")), -1)
            out = torch.einsum("hrn,nhd->rhd", attention, text.v[i].repeat_interleave(groups, 1))
            x = x + a.o_proj(out.reshape(len(positions), -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            seen.append(Seen(attention, v, old_v))
        return seen

    def _rotate(self, x: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """x [layers, n, heads, D]."""
        cos, sin = self._model.model.rotary_emb(x, torch.tensor([list(positions)]))
        low, high = x.chunk(2, -1)
        return x * cos[0][:, None] + torch.cat([-high, low], -1) * sin[0][:, None]
