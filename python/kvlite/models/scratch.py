"""The scratch buffers of one decoder: allocated once for the most rows seen, cut into views for each number of rows.

Every batch writes over the same memory; nothing in it outlives a forward pass. Knows sizes alone. Called by
`models.decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvlite.layers.linear import padded_rows
from kvlite.models.config import ModelConfig

MAX_CACHED_VIEWS = 64
"""Row counts whose buffer views are kept: decode batches come back with the same few."""


@dataclass(frozen=True)
class Views:
    """The scratch buffers cut to T rows; P = T, padded to whole tiles where products take tiles."""

    residual: torch.Tensor
    """[P, W]."""
    embedded: torch.Tensor
    """residual [T, W]."""
    unused: torch.Tensor
    """residual [P - T, W], kept at zero so that nothing overflows in rows that nobody reads."""
    hidden: torch.Tensor
    """[P, W]: normalised input of a projection."""
    update: torch.Tensor
    """[P, W]: what a projection adds to the residual."""
    qkv: torch.Tensor
    """[P, (H + 2 KH) D]."""
    q: torch.Tensor
    """qkv [T, H, D]."""
    k: torch.Tensor
    """qkv [T, KH, D]."""
    v: torch.Tensor
    """qkv [T, KH, D]."""
    heads: torch.Tensor
    """[T, H, D]: output of attention."""
    merged: torch.Tensor
    """[P, H D]: the same memory, padded."""
    lse: torch.Tensor
    """[T, H] fp32."""
    gate_up: torch.Tensor
    """[P, 2F]."""
    activation: torch.Tensor
    """[P, F]."""


class Scratch:
    """Buffers for the largest T seen; growing them drops the old views."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, tiled: bool) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._tiled = tiled
        self._capacity = 0
        self._views: dict[int, Views] = {}
        self._logits = torch.empty(0)
        self.reserve(1)

    def reserve(self, num_rows: int) -> None:
        """Makes room for `num_rows`; addresses stay while the capacity suffices."""
        capacity = padded_rows(num_rows, self._tiled)
        if capacity <= self._capacity:
            return
        c = self._config
        # Normal tensors, not inference tensors: callers may change results in place outside inference mode.
        with torch.inference_mode(mode=False):
            self._residual, self._hidden, self._update = (self._zeros(capacity, c.hidden_size) for _ in range(3))
            self._qkv = self._zeros(capacity, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
            self._merged = self._zeros(capacity, c.num_heads * c.head_dim)
            self._lse = torch.zeros(capacity, c.num_heads, dtype=torch.float32, device=self._device)
            self._gate_up = self._zeros(capacity, 2 * c.intermediate_size)
            self._activation = self._zeros(capacity, c.intermediate_size)
        self._capacity = capacity
        self._views.clear()

    @property
    def capacity(self) -> int:
        """Rows that there is room for; while it stays, so do the addresses."""
        return self._capacity

    def views(self, num_rows: int) -> Views:
        """Views for T = num_rows."""
        views = self._views.get(num_rows)
        if views is None:
            self.reserve(num_rows)
            if len(self._views) >= MAX_CACHED_VIEWS:
                self._views.pop(next(iter(self._views)))
            views = self._views[num_rows] = self._cut(num_rows, padded_rows(num_rows, self._tiled))
        return views

    def compact(self, views: Views, rows: NDArray[np.int64]) -> Views:
        """Views for the `rows` (ascending) of `views`: their residual and qkv move up, all else is not kept."""
        index = torch.tensor(rows, device=self._device)
        smaller = self.views(len(rows))
        smaller.embedded.copy_(views.embedded[index])
        smaller.qkv[: len(rows)].copy_(views.qkv[index])
        smaller.unused.zero_()
        return smaller

    def _cut(self, rows: int, padded: int) -> Views:
        c = self._config
        qkv = self._qkv[:padded]
        sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        q, k, v = torch.split(qkv[:rows].view(rows, sum(sizes), c.head_dim), sizes, dim=1)
        merged = self._merged[:padded]
        residual = self._residual[:padded]
        return Views(
            residual=residual,
            embedded=residual[:rows],
            unused=residual[rows:],
            hidden=self._hidden[:padded],
            update=self._update[:padded],
            qkv=qkv,
            q=q,
            k=k,
            v=v,
            heads=merged[:rows].view(rows, c.num_heads, c.head_dim),
            merged=merged,
            lse=self._lse[:rows],
            gate_up=self._gate_up[:padded],
            activation=self._activation[:padded],
        )

    def logits(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows padded to whole tiles [P, W], logits [P, V] in the engine's dtype)."""
        padded = padded_rows(num_rows, self._tiled)
        if self._logits.shape[0] < padded:
            with torch.inference_mode(mode=False):
                self._logits = self._zeros(padded, self._config.vocab_size)
                self._logit_rows = self._zeros(padded, self._config.hidden_size)
        return self._logit_rows[:padded], self._logits[:padded]

    def _zeros(self, rows: int, width: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=self._dtype, device=self._device)
