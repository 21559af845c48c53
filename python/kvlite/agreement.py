"""`AgreementMonitor`: the quality floor. Which blended requests are also computed exactly, and what follows from it.

A pure state machine: no clock, no randomness, no request. Each (method, ratio) that is asked for has its own floor,
so that one caller's choice never changes another's. Below the floor the ratio is doubled, then doubled again, then
the request is computed exactly; it recovers step by step, each time more slowly. Called by twins.py.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

SAMPLES_MIN = 8
"""Samples before a floor is judged."""
WINDOW = 32
"""Samples that count; as many must be good before a step back is tried."""
PATIENCE_LIMIT = 32
"""Windows that a recovery waits for at most."""
FLOORS_LIMIT = 64
"""Different (method, ratio) that are followed; the one unused for longest goes."""


@dataclass(frozen=True)
class Decision:
    """What is done with one blended request."""

    ratio: float | None
    """The recompute ratio; None: the request is computed exactly."""
    sampled: bool = False
    """Whether its first token is computed the other way as well, to be compared."""
    fallback: str | None = None
    """Why it is not done as asked."""


@dataclass
class _Floor:
    """What is known of one (method, ratio)."""

    ratios: tuple[float, ...]
    """By level; one level more is exact."""
    level: int = 0
    patience: int = 1
    num_requests: int = 0
    num_good_windows: int = 0
    window: deque[bool] = field(default_factory=lambda: deque[bool](maxlen=WINDOW))
    seen: float = 1.0
    """Agreement when the level was raised."""


class AgreementMonitor:
    """Off when `min_agreement` is None; 0 measures and never interferes."""

    def __init__(self, min_agreement: float | None, sample_ratio: float) -> None:
        self._min_agreement = min_agreement
        self._interval = max(round(1 / sample_ratio), 1)
        self._floors: OrderedDict[Hashable, _Floor] = OrderedDict()
        self._recent: deque[tuple[bool, float]] = deque(maxlen=1024)
        self.num_samples = 0
        self.num_fallbacks = 0

    @property
    def agreement(self) -> float | None:
        """Share of the last samples with the same most likely first token."""
        return self._mean(0)

    @property
    def kl_divergence(self) -> float | None:
        """Mean KL(exact || blended) of the last samples, nats."""
        return self._mean(1)

    def _mean(self, column: int) -> float | None:
        recent = tuple(self._recent)  # one step of the interpreter: another thread may be adding
        return sum(sample[column] for sample in recent) / len(recent) if recent else None

    def decide(self, method: Hashable, ratio: float) -> Decision:
        """For the next request that asks for this. Every 1/sample_ratio-th of them is sampled."""
        if self._min_agreement is None:
            return Decision(ratio)
        floor = self._floor(method, ratio)
        sampled = floor.num_requests % self._interval == 0
        floor.num_requests += 1
        if floor.level == 0:
            return Decision(ratio, sampled)
        self.num_fallbacks += 1
        used = floor.ratios[floor.level] if floor.level < len(floor.ratios) else None
        instead = "computed exactly" if used is None else f"recompute ratio {used:g} instead of {ratio:g}"
        reason = f"agreement {floor.seen:.2f} is below min_agreement={self._min_agreement:g}: {instead}"
        return Decision(used, sampled, reason)

    def probe_ratio(self, method: Hashable, ratio: float) -> float:
        """The ratio with which a request that is computed exactly is compared: that of the level below."""
        return self._floor(method, ratio).ratios[-1]

    def record(self, method: Hashable, ratio: float, equal: bool, kl: float) -> None:
        """One sample: whether both found the same first token most likely, and KL(exact || blended)."""
        self.num_samples += 1
        self._recent.append((equal, kl))
        if self._min_agreement is None:
            return
        floor = self._floor(method, ratio)
        floor.window.append(equal)
        share = sum(floor.window) / len(floor.window)
        if floor.level < len(floor.ratios) and len(floor.window) >= SAMPLES_MIN and share < self._min_agreement:
            floor.seen = share
            self._move(floor, 1)
            floor.patience = min(floor.patience * 2, PATIENCE_LIMIT)
        elif floor.level > 0 and len(floor.window) == WINDOW:
            floor.num_good_windows = floor.num_good_windows + 1 if share >= self._min_agreement else 0
            floor.window.clear()
            if floor.num_good_windows >= floor.patience:
                self._move(floor, -1)

    def _move(self, floor: _Floor, by: int) -> None:
        floor.level += by
        floor.num_good_windows = 0
        floor.window.clear()

    def _floor(self, method: Hashable, ratio: float) -> _Floor:
        key = (method, ratio)
        floor = self._floors.get(key)
        if floor is None:
            steps = (ratio, min(2 * ratio, 1.0), min(4 * ratio, 1.0))
            floor = self._floors[key] = _Floor(tuple(dict.fromkeys(steps)))
            if len(self._floors) > FLOORS_LIMIT:
                self._floors.popitem(last=False)
        self._floors.move_to_end(key)
        return floor
