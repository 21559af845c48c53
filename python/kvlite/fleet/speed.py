"""How fast an engine is alone: tokens per second of a prefill, seconds of a decode step; measured once, at start.

The front-end weighs a copy against a replay with them. Owns the trial and takes what it left in the statistics out
again. Called by worker.py before anybody else uses the engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from kvlite.engine import Engine
from kvlite.reuse_types import Reuse
from kvlite.types import EngineStats, SamplingParams

PROMPT_TOKENS = 256
"""Long enough for products of many rows, short enough for a second on a slow machine."""
STEPS = 8
_COUNTERS = ("prompt_tokens", "cached_tokens", "generated_tokens", "num_steps")


@dataclass(frozen=True)
class Speed:
    """What was measured; zeros: nothing was."""

    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    trial: EngineStats = field(default_factory=EngineStats)
    """Statistics right after the trial."""

    def without(self, stats: EngineStats) -> EngineStats:
        """`stats` as if there had been no trial."""
        counters = {name: getattr(stats, name) - getattr(self.trial, name) for name in _COUNTERS}
        finished = {reason: count - self.trial.finished.get(reason, 0) for reason, count in stats.finished.items()}
        return replace(stats, finished=finished, **counters)


def measure(engine: Engine) -> Speed:
    """Two requests, the first to warm up; nothing stays in the cache. Zeros when the pool is too small for a trial."""
    limits = engine.limits
    room = min(limits.max_model_len, limits.pool_tokens) - STEPS - 1
    if room < 1:
        return Speed()
    ids = [2 + n % max(limits.vocab_size - 2, 1) for n in range(min(PROMPT_TOKENS, room))]
    ids = [min(id, limits.vocab_size - 1) for id in ids]
    params = SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True)
    _trial(engine, ids[:8], params)
    seconds, step_s = _trial(engine, ids, params)
    engine.clear_cache()
    return Speed(len(ids) / seconds, step_s, engine.stats())


def _trial(engine: Engine, ids: list[int], params: SamplingParams) -> tuple[float, float]:
    """Seconds to the first token, and per token behind it."""
    start = time.perf_counter()
    times = [time.perf_counter() for delta in engine.stream(ids, params, reuse=Reuse.OFF) if delta.token_ids]
    return times[0] - start, (times[-1] - times[0]) / max(len(times) - 1, 1)
