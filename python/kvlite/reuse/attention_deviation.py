"""Change of a row's values, weighted by the attention that the row receives: KVShare's DHD (arXiv 2503.16525)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlite.models import LayerRows, Probe
from kvlite.reuse.base import Dynamic, Round, Scope, ScoreEntry, Tools
from kvlite.reuse.deviation import QKV_COST, ScoredRows
from kvlite.reuse.mass import Mass


@dataclass(frozen=True)
class AttentionDeviation(Dynamic):
    """`attention-deviation`: attention received at layer `check_layer` - 1, times sum |new - reused value| at it.

    With `decode_rows`, each decode step asks again what its row attends to and computes so many further rows.
    """

    check_layer: int = 1
    decode_rows: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]
    name = "attention-deviation"

    def rounds(self, num_layers: int, ratio: float) -> tuple[Round, ...]:
        """One, over all rows, up to the check layer."""
        return (Round(Scope.ALL, min((self.check_layer + QKV_COST) / num_layers, 1.0), ratio),)

    def probe(self, entry: ScoreEntry, tools: Tools) -> Probe:
        """Both factors for a chunk of the prompt; a decode step's row goes on and gives the first factor alone."""
        return _Probe(entry, Mass(entry, tools.key_mass), self.check_layer, is_decode=entry.round > 0)


class _Probe:
    def __init__(self, entry: ScoreEntry, mass: Mass, check_layer: int, *, is_decode: bool) -> None:
        self.rows = entry.rows
        self.seq_row = entry.seq_row
        self.depth = None if is_decode else check_layer
        self._check_layer = check_layer
        self._mass = mass
        self._scored = ScoredRows(entry)

    def before_store(self, at: LayerRows) -> None:
        """The cache still holds the reused values of these rows."""
        if at.layer == self.depth:
            self._scored.take((at.v.float() - at.stored_v().float()).abs().sum((1, 2)), at)

    def after_attention(self, at: LayerRows) -> None:
        """Attention over keys that are fresh in this layer, so far as they were computed."""
        if at.layer == self._check_layer - 1:
            self._mass.add(at)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight: attention from these rows. Value: their own change."""
        weight = self._mass.total()
        return weight, torch.zeros_like(weight) if self.depth is None else self._scored.values()
