"""Probes: what watches some rows of a forward pass from inside, layer by layer, and lets them leave early.

A probe sees the rows of one sequence, contiguous in the batch. It is shown each layer twice: before that layer's new
keys and values are stored, and after its attention. Rows with a `depth` leave the batch between the two at that layer,
so that layers from there on never see them. Knows neither methods nor plans; `kvlite.reuse` has the probes, the runner
makes them. Called by `models.decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvlite.layers.attention import Attention
from kvlite.models.batch import ForwardBatch
from kvlite.models.scratch import Views


@dataclass(frozen=True)
class LayerState:
    """One layer of a forward pass, for all rows that are still in the batch."""

    index: int
    views: Views
    batch: ForwardBatch
    cache: tuple[torch.Tensor, torch.Tensor]
    """Keys and values of this layer, [B, block_size, KH, D] each."""
    attention: Attention


@dataclass(frozen=True)
class LayerRows:
    """The watched rows, R of them, at one layer. Tensors are views, valid during the call alone."""

    state: LayerState
    rows: slice
    """Of the batch as it is now."""
    block_table: torch.Tensor
    """[NB] blocks of the sequence."""

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.state.index

    @property
    def attention(self) -> Attention:
        """Scale and window of this layer."""
        return self.state.attention

    @property
    def k_cache(self) -> torch.Tensor:
        """Keys of this layer, [B, block_size, KH, D]."""
        return self.state.cache[0]

    @property
    def q(self) -> torch.Tensor:
        """[R, H, D]; rotated after attention."""
        return self.state.views.q[self.rows]

    @property
    def v(self) -> torch.Tensor:
        """[R, KH, D]: new values."""
        return self.state.views.v[self.rows]

    @property
    def lse(self) -> torch.Tensor:
        """[R, H] fp32; after attention only."""
        return self.state.views.lse[self.rows]

    @property
    def last_key(self) -> torch.Tensor:
        """[R] int32."""
        return self.state.batch.last_key[self.rows]

    @property
    def positions(self) -> torch.Tensor:
        """[R] int32."""
        return self.state.batch.positions[self.rows]

    def stored_v(self) -> torch.Tensor:
        """[R, KH, D]: values that lie where the rows' own go; before the store: the old ones."""
        values = self.state.cache[1]
        slots = self.state.batch.slot_mapping[self.rows].long()
        return values[slots // values.shape[1], slots % values.shape[1]]


class Probe(Protocol):
    """Watches `rows` of the batch, all of one sequence. Probes of one batch have no row in common."""

    @property
    def rows(self) -> range:
        """Rows of the whole batch, contiguous."""
        ...

    @property
    def seq_row(self) -> int:
        """The sequence's row in the block table."""
        ...

    @property
    def depth(self) -> int | None:
        """Layers that the rows run through; None = all. From 1 up: layer `depth` still shows its new values."""
        ...

    def before_store(self, at: LayerRows) -> None:
        """New values exist, q and k are not rotated yet, the cache holds what it held before."""
        ...

    def after_attention(self, at: LayerRows) -> None:
        """Keys and values are stored, q is rotated, lse is there."""
        ...

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, value), fp32, one each per key of the probe's range."""
        ...


class Watch:
    """The probes of one forward pass and where their rows are while others leave."""

    def __init__(self, probes: Sequence[Probe], num_rows: int) -> None:
        self._active = [(probe, slice(probe.rows.start, probe.rows.stop)) for probe in probes]
        self._num_rows = num_rows

    def before_store(self, state: LayerState) -> None:
        """Shows the layer to every probe whose rows are still there."""
        for probe, rows in self._active:
            probe.before_store(LayerRows(state, rows, state.batch.block_table[probe.seq_row]))

    def after_attention(self, state: LayerState) -> None:
        """As `before_store`."""
        for probe, rows in self._active:
            probe.after_attention(LayerRows(state, rows, state.batch.block_table[probe.seq_row]))

    def leave(self, layer: int) -> NDArray[np.int64] | None:
        """Lets go of probes whose depth is `layer`; the rows that stay, or None when nobody leaves."""
        if all(probe.depth != layer for probe, _ in self._active):
            return None
        stays = np.ones(self._num_rows, bool)
        for probe, rows in self._active:
            stays[rows] = probe.depth != layer
        before = np.concatenate([[0], np.cumsum(stays)]).tolist()
        self._num_rows = before[-1]
        self._active = [
            (probe, slice(before[rows.start], before[rows.stop]))
            for probe, rows in self._active
            if probe.depth != layer
        ]
        return np.flatnonzero(stays)


def rows_to_the_end(probes: Sequence[Probe], num_rows: int) -> NDArray[np.int64] | None:
    """Rows of the batch that come out of a forward pass with these probes, ascending; None = all."""
    leaving = [probe.rows for probe in probes if probe.depth is not None]
    if not leaving:
        return None
    return np.setdiff1d(np.arange(num_rows), np.concatenate([np.asarray(rows) for rows in leaving]))
