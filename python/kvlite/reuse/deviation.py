"""Rows whose values change most in the first layers: CacheBlend (arXiv 2405.16444).

All rows run the layers below the check layer, which leaves fresh KV there; at the check layer their new values are
compared with the reused ones, and the rows leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlite.models import LayerRows, Probe
from kvlite.reuse.base import Dynamic, Round, Scope, ScoreEntry, Tools

QKV_COST = 0.2
"""What a layer costs whose values are made but not used, in layers (reuse.md counts check layer 1 as 1.2 layers)."""


@dataclass(frozen=True)
class Deviation(Dynamic):
    """`deviation`: sum over heads and dimensions of (new value - reused value)^2 at layer `check_layer`.

    `max_over_layers`: the largest over layers 1 to the check layer, each relative to the row's own squared values.
    `gradual`: so many rounds; each looks one layer deeper, at the rows that the round before kept. Their ratios fall
    geometrically down to the request's.
    """

    check_layer: int = 1
    max_over_layers: bool = False
    gradual: int = 1
    name = "deviation"

    def rounds(self, num_layers: int, ratio: float) -> tuple[Round, ...]:
        """`gradual` rounds over all rows that are left, each up to its check layer."""
        n = self.gradual
        costs = [(self.check_layer + i + QKV_COST) / num_layers for i in range(n)]
        return tuple(Round(Scope.ALL, min(cost, 1.0), ratio ** ((i + 1) / n)) for i, cost in enumerate(costs))

    def probe(self, entry: ScoreEntry, tools: Tools) -> Probe:
        """Compares values."""
        return _DeviationProbe(entry, self.check_layer + entry.round, self.max_over_layers)


class _DeviationProbe:
    def __init__(self, entry: ScoreEntry, depth: int, max_over_layers: bool) -> None:
        self.rows = entry.rows
        self.seq_row = entry.seq_row
        self.depth = depth
        self._max_over_layers = max_over_layers
        self._scored = ScoredRows(entry)

    def before_store(self, at: LayerRows) -> None:
        """The cache still holds the reused values of these rows."""
        if at.layer == self.depth or (self._max_over_layers and at.layer >= 1):
            old = at.stored_v().float()
            change = (at.v.float() - old).square().sum((1, 2))
            if self._max_over_layers:
                change /= old.square().sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
            self._scored.take(change, at)

    def after_attention(self, at: LayerRows) -> None:
        """Nothing to see."""

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight: 1 for the rows of this chunk. Value: their change."""
        return self._scored.seen(), self._scored.values()


class ScoredRows:
    """One value per row of a chunk, laid out over the entry's keys; other keys have 0."""

    def __init__(self, entry: ScoreEntry) -> None:
        self._keys = entry.keys
        self._best: torch.Tensor | None = None
        self._index = torch.empty(0)

    def take(self, values: torch.Tensor, at: LayerRows) -> None:
        """Keeps the larger of these values [R] fp32 and those taken before."""
        self._best = values if self._best is None else torch.maximum(self._best, values)
        offset = at.positions.long() - self._keys.start
        inside = (offset >= 0) & (offset < len(self._keys))
        self._index = torch.where(inside, offset, len(self._keys))

    def values(self) -> torch.Tensor:
        """[len(entry.keys)] fp32."""
        assert self._best is not None, "a probe is shown its check layer"
        return self._lay_out(self._best)

    def seen(self) -> torch.Tensor:
        """1 for the keys that have a value."""
        assert self._best is not None, "a probe is shown its check layer"
        return self._lay_out(torch.ones_like(self._best))

    def _lay_out(self, values: torch.Tensor) -> torch.Tensor:
        # One place more than there are keys takes what lies outside of them.
        return values.new_zeros(len(self._keys) + 1).index_put_((self._index,), values)[:-1]
