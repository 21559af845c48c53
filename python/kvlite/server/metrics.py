"""/metrics: vLLM's names under `kvlite:`, so that its dashboards need one prefix changed.

Owns the registry and the clock of a stream (time to first token, between tokens, whole). Counters and gauges are read
from EngineStats when somebody asks, never kept twice. Labels are a closed set. Called by app.py.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvlite.types import Delta, EngineStats, FinishReason

PREFIX = "kvlite:"
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Meter:
    """Measures the streams of one server and prints them beside the engine's own numbers."""

    def __init__(self, model: str, stats: Callable[[], EngineStats], clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model, stats))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, help, ("model_name",), buckets=buckets, registry=self.registry)
            return made.labels(model)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of one choice.", ITL_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", E2E_BUCKETS)

    async def watch(self, deltas: AsyncGenerator[Delta, None], arrival: float) -> AsyncGenerator[Delta, None]:
        """The same deltas, timed. Closing this closes them. `arrival` is `now()` when the request came."""
        last: dict[int, float] = {}
        async with aclosing(deltas):
            async for delta in deltas:
                now = self._clock()
                if delta.token_ids:
                    if not last:
                        self._ttft.observe(now - arrival)
                    elif delta.index in last:
                        self._itl.observe((now - last[delta.index]) / len(delta.token_ids))
                    last[delta.index] = now
                if delta.usage is not None:
                    self._e2e.observe(now - arrival)
                yield delta

    def now(self) -> float:
        """The meter's clock, seconds."""
        return self._clock()

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """EngineStats as metrics, read at scrape time."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family per number."""
        stats = self._stats()
        gauges = {
            "num_requests_running": (stats.num_running, "Sequences in the running batch."),
            "num_requests_waiting": (stats.num_waiting, "Requests that wait for admission."),
            "kv_cache_usage_perc": (stats.kv_cache_usage, "Share of KV blocks that running sequences own, 0 to 1."),
            "kv_blocks_free": (stats.free_blocks, "KV blocks that hold nothing."),
            "kv_blocks_cached": (stats.cached_blocks, "KV blocks kept for later prompts."),
            "kv_blocks_host": (stats.host_blocks, "Blocks of the host tier that hold KV."),
            "kv_blocks_segments": (stats.segment_blocks, "KV blocks that hold segments."),
            "kv_blocks_pinned": (stats.pinned_blocks, "KV blocks of segments that are never evicted."),
            "num_segments": (stats.num_segments, "Segments in the store."),
            "num_documents": (stats.num_documents, "Documents kept by id."),
        }
        # Unknown until something was sampled: an absent gauge is not a perfect one.
        if stats.agreement is not None:
            gauges["blend_agreement_ratio"] = (stats.agreement, "Share of sampled blends with the exact first token.")
        if stats.kl_divergence is not None:
            gauges["blend_kl_divergence"] = (stats.kl_divergence, "KL(exact || blended) of first tokens, mean, nats.")
        for name, (value, help) in gauges.items():
            family = GaugeMetricFamily(PREFIX + name, help, labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family
        source = CounterMetricFamily(
            PREFIX + "prompt_tokens", "Prompt tokens by where their KV came from.", labels=("model_name", "source")
        )
        reused = stats.cached_tokens + stats.blended_tokens + stats.recomputed_tokens
        source.add_metric((self._model, "computed"), stats.prompt_tokens - reused)
        source.add_metric((self._model, "prefix"), stats.cached_tokens)
        source.add_metric((self._model, "blend"), stats.blended_tokens)
        source.add_metric((self._model, "recomputed"), stats.recomputed_tokens)
        yield source
        counters = {
            "blend_recomputed_tokens": (stats.recomputed_tokens, "Reused tokens that were computed in full context."),
            "segment_hits_tokens": (stats.segment_hit_tokens, "Prompt tokens placed from segments, kept or not."),
            "blend_samples": (stats.num_agreement_samples, "Blended requests that were computed exactly too."),
            "blend_fallbacks": (stats.num_fallbacks, "Blended requests that the quality floor changed."),
            "generation_tokens": (stats.generated_tokens, "Tokens generated."),
            "host_hits_tokens": (stats.host_hit_tokens, "Tokens whose KV was copied back from the host tier."),
            "kv_blocks_demoted": (stats.demoted_blocks, "KV blocks copied to the host tier."),
            "kv_blocks_promoted": (stats.promoted_blocks, "KV blocks copied back from the host tier."),
            "num_preemptions": (stats.num_preemptions, "Sequences put back to wait for memory."),
            "num_steps": (stats.num_steps, "Engine steps."),
            "num_failed_steps": (stats.num_failed_steps, "Engine steps that failed; their requests ended with error."),
        }
        for name, (value, help) in counters.items():
            family = CounterMetricFamily(PREFIX + name, help, labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family
        ended = CounterMetricFamily(
            PREFIX + "request_success", "Ended choices by reason.", labels=("model_name", "finished_reason")
        )
        for reason in FinishReason:
            ended.add_metric((self._model, reason.value), stats.finished.get(reason, 0))
        yield ended
