"""The question's last row, then one hop along the links inside each segment.

The row that holds the answer is found by the question; the row that it leans on ("He" of "He lives in Oslo.") the
question cannot see before repair, but the answer's row looked at it when the segment was computed alone (`links.py`).
Rows that missed something then weigh more, a lead of the design notes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlite.models import LayerRows, Probe
from kvlite.reuse.base import Dynamic, Round, Scope, ScoreEntry, Tools
from kvlite.reuse.links import hop
from kvlite.reuse.mass import Mass

MISS_WEIGHT = 3.0
"""How much attention on the canonical prefix raises a row; tried on models of 6 and 12 layers."""


@dataclass(frozen=True)
class Hybrid(Dynamic):
    """`hybrid`: attention m of the last scoring row over all heads and layers, raised by (1 + 3 miss); a row's score is
    the larger of its own m and strength * m of any row whose parent it is.
    """

    name = "hybrid"

    def rounds(self, num_layers: int, ratio: float) -> tuple[Round, ...]:
        """One, over the new rows, through all layers."""
        return (Round(Scope.NEW, 1.0, ratio),)

    def probe(self, entry: ScoreEntry, tools: Tools) -> Probe:
        """Adds up attention of one row in every layer."""
        return _HybridProbe(entry, Mass(entry, tools.key_mass), tools)


class _HybridProbe:
    depth = None

    def __init__(self, entry: ScoreEntry, mass: Mass, tools: Tools) -> None:
        self.rows = entry.rows[-1:]
        self.seq_row = entry.seq_row
        self._mass = mass
        self._tools = tools
        self._links = tools.links_of(entry)

    def before_store(self, at: LayerRows) -> None:
        """Nothing to see."""

    def after_attention(self, at: LayerRows) -> None:
        """Every layer counts the same."""
        self._mass.add(at)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight: the score. Value: 1."""
        weight = hop(self._mass.total() * (1 + MISS_WEIGHT * self._links[:, 2]), self._links)
        return weight, torch.ones_like(weight)
