"""Links inside a segment: which of its rows each row leans on, found while the segment is computed alone.

Three numbers per row, kept beside its KV and moved with it: how many rows back its parent lies (0: none), how strongly
it looks there, and how much of its attention fell on the canonical prefix, where a look-up ends that finds nothing.
The parent is the earlier row of the segment with the most attention in any layer, mean over heads; a row does not
count itself nor the segment's first row, where attention rests that has nothing to do. Made by the runner for rows that
make a segment; read by `query` and `hybrid`.
"""

from __future__ import annotations

import torch

from kvlite.models import LayerRows

NUM_LINKS = 3
"""Columns: offset, strength, miss."""
TILE_ROWS = 256
"""Rows whose attention is looked at at once: bounds memory, and keys behind the last of them are left out."""


def hop(mass: torch.Tensor, links: torch.Tensor) -> torch.Tensor:
    """The larger of each row's own mass and of strength * mass of any row whose parent it is.

    mass [n] fp32, not negative; links [n, 3] as above. Returns [n].
    """
    offset, strength, _ = links.unbind(1)
    parent = (torch.arange(len(mass), device=mass.device) - offset.long()).clamp(min=0)
    return torch.maximum(mass, torch.zeros_like(mass).scatter_reduce(0, parent, strength * mass, "amax"))


class LinkProbe:
    """Watches rows of a maker in one plan. `first`: where the segment begins, behind the canonical prefix."""

    depth = None

    def __init__(self, rows: range, seq_row: int, first: int, positions: range) -> None:
        self.rows = rows
        self.seq_row = seq_row
        self._first = first
        self._positions = positions
        self._best = torch.empty(0)
        self._parent = torch.empty(0)
        self._miss = torch.empty(0)
        self._num_layers = 0

    def before_store(self, at: LayerRows) -> None:
        """Nothing to see."""

    def after_attention(self, at: LayerRows) -> None:
        """Every layer may hold a row's parent. Cost: rows x heads x keys x head_dim multiply-adds."""
        if not self._num_layers:
            self._best, self._miss = (torch.zeros(len(self.rows), device=at.q.device) for _ in range(2))
            self._parent = torch.zeros(len(self.rows), dtype=torch.int64, device=at.q.device)
        self._num_layers += 1
        for start in range(0, len(self.rows), TILE_ROWS):
            self._add(at, slice(start, min(start + TILE_ROWS, len(self.rows))))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Not asked for: `links` is."""
        raise AssertionError("rows that make a segment score nothing")

    def links(self) -> torch.Tensor:
        """[R, 3] fp32: offset, strength, miss."""
        place = torch.tensor(self._positions, device=self._parent.device)
        offset = torch.where(self._best > 0, place - self._parent, 0)
        return torch.stack([offset.float(), self._best, self._miss / self._num_layers], 1)

    def _add(self, at: LayerRows, tile: slice) -> None:
        own = torch.tensor(self._positions[tile], device=at.q.device)[:, None]
        key = torch.arange(self._positions[tile][-1] + 1, device=at.q.device)
        attention = _mean_over_heads(at, tile, key)
        window = at.attention.window
        if window:
            attention.masked_fill_(key <= own - window, 0.0)
        self._miss[tile] += attention[:, : self._first].sum(1)
        attention.masked_fill_((key <= self._first) | (key >= own), 0.0)
        most, parent = attention.max(1)
        old, old_parent = self._best[tile], self._parent[tile]
        better = (most > old) | ((most == old) & (parent < old_parent))
        self._best[tile] = torch.where(better, most, old)
        self._parent[tile] = torch.where(better, parent, old_parent)


def _mean_over_heads(at: LayerRows, tile: slice, key: torch.Tensor) -> torch.Tensor:
    """Attention [tile rows, keys] fp32; wrong for keys that a row cannot see."""
    q, lse, scale = at.q[tile].float(), at.lse[tile], at.attention.scale
    block_size, kv_heads = at.k_cache.shape[1:3]
    k = at.k_cache[at.block_table[key // block_size].long(), key % block_size].float()
    num_heads = q.shape[1]
    total = torch.zeros(q.shape[0], len(key), device=q.device)
    for head in range(num_heads):
        score = torch.addmm(lse[:, head, None], q[:, head], k[:, head * kv_heads // num_heads].T, beta=-1, alpha=scale)
        total += score.exp_()
    return total.div_(num_heads)
