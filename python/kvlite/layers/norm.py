"""RMSNorm as a layer: a weight and an epsilon around the op.

Knows neither where it stands in the stack nor the batch. Called by `models.decoder`.
"""

from __future__ import annotations

import torch

from kvlite.ops import Ops


class RmsNorm:
    """Normalises the last dimension, width W, by its root mean square; weight [W]."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: Ops) -> None:
        self.weight = weight
        self.eps = eps
        self._rms_norm = ops.rms_norm
        self._add_rms_norm = ops.add_rms_norm

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = norm(x); x, out [..., W], may be the same tensor."""
        self._rms_norm(x, self.weight, self.eps, out)

    def add(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """residual += x in place, then out = norm(residual); all [T, W]."""
        self._add_rms_norm(x, residual, self.weight, self.eps, out)
