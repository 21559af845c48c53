"""Rows drawn at random: the control that every method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvlite.reuse.base import Span, Static

MAX_SEED = 1023
"""Few, because each seed is a method of its own and methods are remembered."""


@dataclass(frozen=True)
class RandomRows(Static):
    """`random`: a shuffle that seed and prompt length decide."""

    seed: int = 0
    name = "random"

    def scores(self, prompt_len: int, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Distinct ranks from 1 to prompt_len."""
        return np.random.default_rng(self.seed).permutation(prompt_len).astype(np.float32) + 1
