"""No row is computed again: positions are repaired, nothing else (Prompt Cache; KVLink without link tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvlite.reuse.base import Span, Static, checked_ratio


@dataclass(frozen=True)
class NoRows(Static):
    """`none`: whatever ratio is asked, no reused row is computed."""

    name = "none"

    def ratio(self, asked: float) -> float:
        """0."""
        checked_ratio(asked)
        return 0.0

    def scores(self, prompt_len: int, spans: Sequence[Span]) -> NDArray[np.float32]:
        """All alike."""
        return np.zeros(prompt_len, np.float32)
