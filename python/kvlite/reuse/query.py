"""Attention of the question: the question's rows run once over the reused text as it is, and the rows that they look at
are computed again. ProphetKV (arXiv 2602.02579), InfoFlow-KV (2603.05353), A3 (2511.17560). The hop is ours: the row
that holds the answer leans on one that the question cannot see before repair, and `links.py` knows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlite.models import LayerRows, Probe
from kvlite.reuse.base import Dynamic, Round, Scope, ScoreEntry, Tools
from kvlite.reuse.links import hop
from kvlite.reuse.mass import Mass


@dataclass(frozen=True)
class Query(Dynamic):
    """`query`: attention received from every scoring row, summed over heads and layers.

    `hop`: a row that another row of its segment leans on counts with that one's attention as well, times the strength
    of the link. `window` (odd) averages over so many neighbours first, which keeps values of several tokens whole.
    """

    hop: bool = True
    window: int = 1
    name = "query"

    def rounds(self, num_layers: int, ratio: float) -> tuple[Round, ...]:
        """One, over the new rows, through all layers."""
        return (Round(Scope.NEW, 1.0, ratio),)

    def probe(self, entry: ScoreEntry, tools: Tools) -> Probe:
        """Adds up attention in every layer."""
        links = tools.links_of(entry) if self.hop else None
        return _QueryProbe(entry, Mass(entry, tools.key_mass), self.window, links)


class _QueryProbe:
    depth = None

    def __init__(self, entry: ScoreEntry, mass: Mass, window: int, links: torch.Tensor | None) -> None:
        self.rows = entry.rows
        self.seq_row = entry.seq_row
        self._mass = mass
        self._window = window
        self._links = links

    def before_store(self, at: LayerRows) -> None:
        """Nothing to see."""

    def after_attention(self, at: LayerRows) -> None:
        """Every layer counts the same."""
        self._mass.add(at)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight: the attention, after the hop. Value: 1."""
        weight = smooth(self._mass.total(), self._window)
        if self._links is not None:
            weight = hop(weight, self._links)
        return weight, torch.ones_like(weight)


def smooth(weight: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over `window` (odd) keys around each one, fewer at the ends; weight [n]. Linear, so chunks still add up."""
    if window == 1 or not len(weight):
        return weight
    half = window // 2
    sums = torch.nn.functional.pad(weight.double().cumsum(0), (1, 0))
    at = torch.arange(len(weight), device=weight.device)
    first, end = (at - half).clamp(min=0), (at + half + 1).clamp(max=len(weight))
    return ((sums[end] - sums[first]) / (end - first)).float()
