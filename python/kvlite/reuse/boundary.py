"""The first rows of every segment but the first: where text computed alone differs most (EPIC, arXiv 2410.15332)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvlite.reuse.base import Span, Static


@dataclass(frozen=True)
class Boundary(Static):
    """`boundary`: nearest to its segment's start first, as many of each; the first segment comes last."""

    name = "boundary"

    def scores(self, prompt_len: int, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Falls by 1 per row of a segment; any row of the first segment is below all others."""
        scores = np.zeros(prompt_len, np.float32)
        for n, (start, length) in enumerate(spans):
            best = 2 * prompt_len if n else prompt_len
            scores[start : start + length] = best - np.arange(length)
        return scores
