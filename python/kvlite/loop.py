"""`Loop`: the core plans, the runner computes, the core commits, deltas come out; and again.

Owns the plan at hand and everything between `add` and the last delta, never what the core or the runner knows. One
thread at a time. Every request that was added ends exactly once, with a finish reason. Engine is built on it;
AsyncEngine turns it on a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvlite import _core
from kvlite.agreement import AgreementMonitor
from kvlite.config import EngineConfig, Policy
from kvlite.documents import DocumentStore
from kvlite.errors import CapacityError, EngineClosedError, EngineError, InvalidRequestError
from kvlite.inflight import REASONS, InFlight, Tracked
from kvlite.migration import Migration
from kvlite.request import PRIORITY_LIMIT, RequestLimits, ValidatedRequest
from kvlite.reuse_types import ReuseMode, ReuseReport, SegmentHit, SegmentReport
from kvlite.runner.plan import Plan
from kvlite.runner.sampler import choice_seed
from kvlite.startup import Parts, Startup
from kvlite.tokenizer import Tokenizer
from kvlite.twins import Start, Twins
from kvlite.types import Delta, EngineStats, FinishReason

SPAN_HITS = (SegmentHit.PREFIX, SegmentHit.DEVICE, SegmentHit.MADE, SegmentHit.COMPUTED, SegmentHit.RECIPE)
"""By the core's number."""

IDLE_STEPS_LIMIT = 1000
"""Steps in a row without a plan, while requests live, after which the engine gives up."""


class Loop:
    """The engine without its front ends."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self.config = config
        self.tokenizer: Tokenizer = parts.tokenizer
        self.limits: RequestLimits = parts.limits
        self.startup: Startup = parts.startup
        self.documents = DocumentStore(config.max_stored_documents)
        """Documents that requests may name by id."""
        self._core = parts.core
        self._runner = parts.runner
        self._arenas = parts.arenas
        self._arena_idx = 0
        self._plan: Plan | None = None
        self._inflight = InFlight(parts.tokenizer, parts.runner.sampler, parts.runner.captured, self._report_of)
        self._monitor = AgreementMonitor(config.min_agreement, config.agreement_sample_ratio)
        self._twins = Twins(self._start, self._abort, self._inflight.first_logits, self._monitor)
        self.migration = Migration(parts.core, parts.runner, self._inflight, self._twins, parts.limits, parts.tokenizer)
        """How requests leave for other engines and arrive from them."""
        self._last_level = PRIORITY_LIMIT if config.policy is Policy.PRIORITY else 0
        self._num_waiting = 0
        self._num_added = 0
        self._num_idle_steps = 0
        self._failed = False
        """Whether the plan that was computed last failed."""
        self._dead: str | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_validated(self, request: ValidatedRequest) -> int:
        """Queues a request that has passed `validate`; returns its handle. Raises CapacityError."""
        self._check_open()
        return self._twins.add(request)

    def resume(self, request: ValidatedRequest, outputs: Sequence[NDArray[np.int32] | None] | None = None) -> int:
        """Queues a raw request that goes on behind `outputs`, ids per choice, None for one that has ended.

        Without `outputs`: as `add_validated`. Its seed is `params.seed`. Raises InvalidRequestError or CapacityError.
        """
        self._check_open()
        if outputs is None:
            return self._twins.add(request)
        seed = request.params.seed
        assert request.raw and seed is not None, "text and seed begin where the request did"
        if request.reuse.mode is ReuseMode.VERIFY:
            request = replace(request, blending=None, fallback="not verified: it was replayed on another engine")
        deadline_ms = _deadline_of(request)
        begun = outputs[0] is None or len(outputs[0]) > 0
        handle = self._add(request, Start(), deadline_ms, outputs, prompt_logprobs=not begun)
        self._num_added += 1
        tracked = self._inflight.add(handle, request, seed, deadline_ms=deadline_ms)
        tracked.resume([None if ids is None else ids.tolist() for ids in outputs])
        return handle

    def restart(self, tracked: Tracked) -> int:
        """Queues what another engine in this process computed so far, without its KV. Raises CapacityError."""
        self._check_open()
        outputs = [None if ids is None else np.asarray(ids, np.int32) for ids in tracked.outputs]
        wanted = tracked.prompt_logprobs is not None
        handle = self._add(tracked.request, Start(), tracked.deadline_ms, outputs, prompt_logprobs=wanted)
        self._inflight.adopt(handle, tracked)
        return handle

    def _start(self, request: ValidatedRequest, how: Start) -> int:
        """One request as the core knows it."""
        deadline_ms = _deadline_of(request)
        handle = self._add(request, how, deadline_ms)
        seed = how.seed
        if seed is None:
            given = request.params.seed
            seed = given if given is not None else choice_seed(self.config.seed, self._num_added + 1)
        self._num_added += 1
        self._inflight.add(handle, request, seed, deadline_ms=deadline_ms, captured=how.captured)
        return handle

    def _add(
        self,
        request: ValidatedRequest,
        how: Start,
        deadline_ms: int,
        outputs: Sequence[NDArray[np.int32] | None] | None = None,
        *,
        prompt_logprobs: bool = True,
    ) -> int:
        tenant, now_ms = request.options.tenant, _now_ms()
        try:
            if request.segment is not None:
                return self._core.add_segment(
                    request.prompt_ids,
                    tenant=tenant,
                    pinned=request.segment.pinned,
                    deadline_ms=deadline_ms,
                    now_ms=now_ms,
                )
            params = request.params
            return self._core.add(
                request.prompt_ids,
                n=params.n,
                max_tokens=request.max_tokens,
                min_tokens=params.min_tokens,
                stop_token_ids=sorted(request.stop_ids),
                priority=request.options.priority if how.is_urgent else self._last_level,
                deadline_ms=deadline_ms,
                tenant=tenant,
                use_cache=how.use_cache and request.reuse.mode is not ReuseMode.OFF,
                prompt_logprobs=prompt_logprobs and params.prompt_logprobs is not None,
                now_ms=now_ms,
                blend=self._blend_of(request),
                outputs=outputs,
            )
        except _core.InvalidArgument as error:
            param = getattr(error, "param", "request")
            raise InvalidRequestError("document.text" if param == "ids" else param, str(error)) from None
        except _core.CapacityError as error:
            raise CapacityError(str(error)) from None

    def _blend_of(self, request: ValidatedRequest) -> Any:
        """The core's words for what is reused; None for a request without segments to reuse."""
        if request.blending is None:
            return None
        method, ratio = request.blending.method, request.blending.ratio
        spans = [(span.start, span.length) for span in request.spans]
        rounds = method.rounds(self.limits.num_layers, ratio)
        scores = None if rounds else method.scores(len(request.prompt_ids), spans)
        method_id = self._runner.methods.intern(method)
        return np.asarray(spans, np.int32), method_id, ratio, list(rounds), scores, method.decode_rows

    def _report_of(self, handle: int, request: ValidatedRequest, cached_len: int) -> ReuseReport | None:
        """What a request that was just admitted takes from the cache."""
        reuse, blending, length = request.reuse, request.blending, len(request.prompt_ids)
        found = None if blending is None else self._core.reuse_report(handle)
        if found is None:
            cached_len = min(cached_len, length)
            hits = [span.start + span.length <= cached_len for span in request.spans]
            outcomes = [SegmentHit.PREFIX if hit else SegmentHit.COMPUTED for hit in hits]
            counts = (cached_len, 0, 0, length - cached_len)
        else:
            outcomes = [SPAN_HITS[outcome] for outcome in found["spans"]]
            counts = (
                found["prefix_tokens"], found["blended_tokens"], found["recomputed_tokens"], found["computed_tokens"],
            )  # fmt: skip
        return ReuseReport(
            reuse.mode,
            counts[1] == 0 and SegmentHit.RECIPE not in outcomes,
            *counts,
            segments=tuple(
                SegmentReport(span.id, span.length, hit) for span, hit in zip(request.spans, outcomes, strict=True)
            ),
            method=reuse.method,
            ratio=None if blending is None else blending.ratio,
            fallback=request.fallback,
        )

    def abort(self, handle: int) -> bool:
        """Ends a request with reason cancelled at the next step; False when it has ended already."""
        return not self._closed and (self._abort(handle) or self._twins.abort(handle))

    def finish(self, handle: int, choice: int, kept_len: int) -> bool:
        """Ends one choice of a raw request with reason stop: its owner found a stop string and keeps `kept_len` ids.

        False when the choice has ended already. Raises InvalidRequestError for a choice that the request has not.
        """
        tracked = self._inflight.get(handle)
        if self._closed or tracked is None:
            return False
        if not 0 <= choice < len(tracked.choices):
            raise InvalidRequestError(
                "choice", f"{choice} is out of range: request {handle} has {len(tracked.choices)}"
            )
        tracked.choices[choice].cut(kept_len)
        return self._core.finish(handle, choice, kept_len, REASONS.index(FinishReason.STOP))

    def _abort(self, handle: int) -> bool:
        return handle in self._inflight and self._core.abort(handle)

    def run_plan(self) -> None:
        """Computes the plan at hand, if there is one."""
        if self._plan is not None:
            result = self._runner.run(self._arenas[self._arena_idx], self._plan)
            self._inflight.computed(self._plan, result)
            self._failed = result.fault is not None

    def make_plan(self) -> list[Delta]:
        """Lets the core commit what was computed and plan the next step; returns what came out."""
        self._check_open()
        self._arena_idx = 1 - self._arena_idx
        try:
            self._core.step(self._arena_idx, _now_ms())
            if self._failed:
                self._core.audit()
                self._failed = False
        except _core.Fault as error:
            self._dead = str(error)
            raise EngineError(f"the core is broken: {error}") from error
        plan = self._arenas[self._arena_idx].read()
        deltas, stopped = self._inflight.outcome(plan)
        deltas = self._twins.sift(deltas)
        for choice in stopped:
            self._core.finish(choice.handle, choice.index, choice.kept_len, REASONS.index(FinishReason.STOP))
        self._plan = plan if plan.num_tokens else None
        self._num_waiting = plan.num_waiting
        return deltas

    def _watch_for_stall(self) -> None:
        """A core that plans nothing while requests live would hang its callers: a fault of ours, said aloud."""
        self._num_idle_steps = self._num_idle_steps + 1 if self._plan is None and len(self._inflight) else 0
        if self._num_idle_steps > IDLE_STEPS_LIMIT:
            self._dead = f"{len(self._inflight)} requests wait and nothing is planned"
            raise EngineError(self._dead)

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now."""
        stats = self._core.stats()
        return EngineStats(
            num_running=stats["num_running"],
            num_waiting=stats["num_waiting"],
            num_blocks=self.startup.num_blocks,
            free_blocks=stats["free_blocks"],
            cached_blocks=stats["cached_blocks"],
            owned_blocks=stats["owned_blocks"],
            host_blocks=stats["host_blocks"],
            host_hit_tokens=stats["host_hit_tokens_total"],
            demoted_blocks=stats["demoted_blocks_total"],
            promoted_blocks=stats["promoted_blocks_total"],
            prompt_tokens=stats["prompt_tokens_total"],
            cached_tokens=stats["prefix_hit_tokens_total"],
            blended_tokens=stats["blended_tokens_total"],
            recomputed_tokens=stats["recomputed_tokens_total"],
            segment_hit_tokens=stats["segment_hit_tokens_total"],
            num_segments=stats["num_segments"],
            segment_blocks=stats["segment_blocks"],
            pinned_blocks=stats["pinned_blocks"],
            num_documents=len(self.documents),
            num_agreement_samples=self._monitor.num_samples,
            agreement=self._monitor.agreement,
            kl_divergence=self._monitor.kl_divergence,
            num_fallbacks=self._monitor.num_fallbacks,
            generated_tokens=stats["generated_tokens_total"],
            num_steps=stats["steps_total"],
            num_failed_steps=stats["failed_plans_total"],
            num_preemptions=stats["preemptions_total"],
            num_migrations_out=stats["migrations_out_total"],
            num_migrations_in=stats["migrations_in_total"],
            num_imports_cancelled=stats["imports_cancelled_total"],
            finished=dict(zip(REASONS, stats["finished_total"], strict=True)),
        )

    def clear_cache(self) -> None:
        """Forgets every cached prefix; running requests keep theirs."""
        self._check_open()
        self._core.clear_cache()

    @property
    def num_unfinished(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._inflight)

    @property
    def num_waiting(self) -> int:
        """Requests that waited for admission when the last plan was made."""
        return self._num_waiting

    @property
    def is_idle(self) -> bool:
        """Whether no plan waits to be computed."""
        return self._plan is None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self, reason: FinishReason = FinishReason.CANCELLED, error: str | None = None) -> list[Delta]:
        """Ends everything and returns the last deltas; later calls raise EngineClosedError. Twice is fine."""
        if self._closed:
            return []
        self._closed = True
        self._plan = None
        return self._twins.end_all(self._inflight.end_all(reason, error))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError
        if self._dead is not None:
            raise EngineError(f"the core is broken: {self._dead}")


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _deadline_of(request: ValidatedRequest) -> int:
    return _now_ms() + int(request.timeout_s * 1000)
