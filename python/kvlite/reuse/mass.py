"""Attention that a sequence's keys receive from the watched rows, added up over layers.

The one place that knows how the op for it meets sliding windows. Called by the probes of this folder.
"""

from __future__ import annotations

from typing import cast

import torch

from kvlite.models import LayerRows
from kvlite.ops import KeyMassOp
from kvlite.reuse.base import ScoreEntry


class Mass:
    """A sum over the layers that were added, [len(entry.keys)] fp32; keys that nobody sees keep 0."""

    def __init__(self, entry: ScoreEntry, key_mass: KeyMassOp) -> None:
        self._keys = entry.keys
        self._key_mass = key_mass
        self._total: torch.Tensor | None = None

    def add(self, at: LayerRows) -> None:
        """Adds one layer, after its attention. Cost: rows x heads x keys x head_dim multiply-adds."""
        window, keys = at.attention.window, self._keys
        last = cast("list[int]", at.last_key.tolist()) if window else []  # pyright: ignore[reportUnknownMemberType]
        if window and max(last) - window >= keys.start:
            found = self._windowed(at, last)
        else:
            rows = torch.arange(len(at.q), dtype=torch.int32, device=at.q.device)
            found = self._call(at, rows, keys.start, keys.stop)
        self._total = found if self._total is None else self._total.add_(found)

    def total(self) -> torch.Tensor:
        """The sum; at least one layer was added."""
        assert self._total is not None, "a probe is shown every layer that it counts"
        return self._total

    def _windowed(self, at: LayerRows, last: list[int]) -> torch.Tensor:
        """Row by row over the keys inside its window, because the op knows no window."""
        found = torch.zeros(len(self._keys), dtype=torch.float32, device=at.q.device)
        for n, last_key in enumerate(last):
            first = max(self._keys.start, last_key - at.attention.window + 1)
            end = min(self._keys.stop, last_key + 1)
            if first < end:
                row = torch.tensor([n], dtype=torch.int32, device=at.q.device)
                found[first - self._keys.start : end - self._keys.start] += self._call(at, row, first, end)
        return found

    def _call(self, at: LayerRows, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        scale = at.attention.scale
        return self._key_mass(at.q, at.lse, at.k_cache, at.block_table, rows, at.last_key, start, end, scale)
