"""What a move costs requests that stay: the slow-down of neighbours on both engines while one request leaves.

Neighbours decode at the source and at the destination. Each step that overlaps the time from the order to the first
token at the destination is compared with what it would have taken without a move and *with the same batch*: the mean
step of the same neighbour, beside that request or without it, while nothing moved. At the source the request is in the
batch up to its last token there, at the destination from its first one; so its own rows count as load, and what is left
(digests, copies, freezing, taking over) as the cost of the move. Both calm times lie around each move in the same run.
Called by `migrate`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

CALM = 12
"""Tokens of the request that moves, before the order and behind the move, while nothing moves."""
DRAWS = 2000


@dataclass(frozen=True)
class Times:
    """Of one move; seconds on the clock of the tokens."""

    since: float
    """The request decodes at the source from here on."""
    ordered: float
    left: float
    """Its last token from the source."""
    landed: float
    """Its first one from the destination."""
    over: float
    """The report was there."""
    until: float
    """It decodes at the destination up to here."""


@dataclass(frozen=True)
class Slowed:
    """What the steps of one neighbour during one move took, and what they would have taken."""

    took_s: float
    expected_s: float


def slowed(times: Sequence[float], at: Times, *, stays_at_source: bool) -> Slowed:
    """One neighbour, from when its tokens came."""
    steps = [(before, after) for before, after in pairwise(times) if after > before]
    before = [after - began for began, after in steps if at.since <= began and after <= at.ordered]
    behind = [after - began for began, after in steps if at.over <= began and after <= at.until]
    beside, alone = (before, behind) if stays_at_source else (behind, before)
    took = expected = 0.0
    for began, after in steps:
        if after <= at.ordered or began >= at.over:
            continue
        half = (after - began) / 2  # tokens of one step come within much less
        shares = after <= at.left + half if stays_at_source else after >= at.landed - half
        took += after - began
        expected += statistics.mean(beside if shares else alone)
    return Slowed(took, expected)


def slow_down(moves: Sequence[Sequence[Slowed]], draw: random.Random) -> tuple[float, float, float]:
    """(mean, low, high) of time taken over time expected, minus 1; bootstrap over moves, 95 %."""

    def of(some: Sequence[Sequence[Slowed]]) -> float:
        each = [one for move in some for one in move]
        return sum(one.took_s for one in each) / sum(one.expected_s for one in each) - 1

    drawn = sorted(of(draw.choices(moves, k=len(moves))) for _ in range(DRAWS))
    return of(moves), drawn[round(DRAWS * 0.025)], drawn[round(DRAWS * 0.975) - 1]
