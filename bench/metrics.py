"""What a client saw, as figures: percentiles of waiting, tokens per second, goodput under an objective.

Pure: records in, numbers out; knows neither clocks nor sockets. Waiting is counted from the moment a request was due,
so a client that falls behind its schedule hides nothing (no coordinated omission).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass
class Record:
    """One request as its client saw it; seconds on one clock."""

    due_s: float
    """When the schedule wanted it sent; in a closed loop, when it was sent."""
    sent_s: float
    piece_s: list[float] = field(default_factory=list[float])
    """When each piece with tokens arrived."""
    num_tokens: int = 0
    """Output tokens, as the client counted them."""
    usage_tokens: int | None = None
    """Output tokens, as the server says."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    end_s: float = 0.0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.piece_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first piece; 0 for a single token."""
        return (self.piece_s[-1] - self.piece_s[0]) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True)
class Objective:
    """What a user calls good: both must hold for a request to count."""

    ttft_ms: float
    tpot_ms: float

    def met(self, record: Record) -> bool:
        """Whether a request ended well and in time."""
        if record.error is not None:
            return False
        return record.ttft_s * 1e3 <= self.ttft_ms and record.tpot_s * 1e3 <= self.tpot_ms


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks; `values` in any order, at least one. O(n log n)."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name_p50: ..., name_p90: ..., name_p99: ...} in milliseconds; empty without values."""
    if not values:
        return {}
    return {f"{name}_ms_p{percent}": round(percentile(values, percent) * 1e3, 3) for percent in PERCENTILES}


def summary(records: Sequence[Record], objective: Objective) -> dict[str, Any]:
    """Every figure of one run. Failed requests count in `errors` and in no percentile; the duration spans all."""
    good = [record for record in records if record.error is None]
    duration = max(r.end_s for r in records) - min(r.due_s for r in records) if records else 0.0
    tokens = sum(record.num_tokens for record in good)
    gaps = [after - before for record in good for before, after in pairwise(record.piece_s)]
    met = sum(objective.met(record) for record in records)
    figures: dict[str, Any] = {
        "requests": len(records),
        "errors": len(records) - len(good),
        "duration_s": round(duration, 4),
        "output_tokens": tokens,
        "prompt_tokens": sum(record.prompt_tokens for record in good),
        "cached_tokens": sum(record.cached_tokens for record in good),
        "tokens_per_s": _rate(tokens, duration),
        "requests_per_s": _rate(len(good), duration),
        "goodput_rps": _rate(met, duration),
        "slo_share": round(met / len(records), 4) if records else 0.0,
    }
    figures |= spread("ttft", [record.ttft_s for record in good])
    figures |= spread("itl", gaps)
    figures |= spread("tpot", [record.tpot_s for record in good if record.num_tokens > 1])
    figures |= spread("e2e", [record.end_s - record.due_s for record in good])
    figures |= spread("lag", [record.sent_s - record.due_s for record in records])
    disagree = sum(record.usage_tokens not in (None, record.num_tokens) for record in good)
    if disagree:
        figures["count_disagreements"] = disagree
    kinds = Counter(record.error for record in records if record.error is not None)
    if kinds:
        figures["error_kinds"] = dict(kinds.most_common(5))
    return figures


def _rate(count: float, duration: float) -> float:
    return round(count / duration, 3) if duration > 0 else 0.0
