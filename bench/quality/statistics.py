"""Shares with their uncertainty: Wilson intervals, and the gap that a method recovers with a paired bootstrap.

Pure: answers in, numbers out. The same questions are asked under every method, and several stand in one context, so
the bootstrap draws contexts, not answers, and takes all methods' answers of a context together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964
DRAWS = 1000


@dataclass(frozen=True)
class Share:
    """How many of how many, as a share with its 95 % interval after Wilson."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        """The share itself; 0 of nothing is 0."""
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies in 95 of 100 cases; (0, 1) of nothing."""
        if not self.asked:
            return 0.0, 1.0
        n, p, z = self.asked, self.value, Z_95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


def share(answers: Sequence[bool]) -> Share:
    """Of right answers."""
    return Share(sum(answers), len(answers))


def gap_recovered(method: float, none: float, full: float) -> float | None:
    """(method - none) / (full - none) of three shares; None where there is no gap to recover."""
    return (method - none) / (full - none) if full > none else None


def gap_interval(
    groups: Sequence[int], method: Sequence[bool], none: Sequence[bool], full: Sequence[bool], seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the gap recovered, by drawing contexts with replacement; None where the gap may be nothing.

    `groups` names each answer's context; the four sequences run over the same questions. Raises ValueError when their
    lengths differ or there is no answer.
    """
    sums: dict[int, list[int]] = {}
    for group, *row in zip(groups, method, none, full, strict=True):
        total = sums.setdefault(group, [0, 0, 0])
        for at, right in enumerate(row):
            total[at] += right
    if not sums:
        raise ValueError("no interval of no answers")
    rows, draw, found = list(sums.values()), random.Random(seed), list[float]()
    for _ in range(DRAWS):
        drawn = draw.choices(rows, k=len(rows))
        right = [sum(row[at] for row in drawn) for at in range(3)]
        if right[2] <= right[1]:
            return None
        found.append((right[0] - right[1]) / (right[2] - right[1]))
    found.sort()
    return found[round(0.025 * (DRAWS - 1))], found[round(0.975 * (DRAWS - 1))]
