"""`Engine`: prompts in, tokens out, in your own process.

Owns the loop: the core plans, the runner computes, the core commits, outputs go out. Keeps per request what its reader
needs (text, log-probabilities, stop strings), never what the core or the runner knows. One thread at a time; the server
reaches it through AsyncEngine. Every request that was added ends exactly once, with a finish reason.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, overload

from kvlite import _core
from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, EngineClosedError, EngineError, InvalidRequestError
from kvlite.inflight import REASONS, InFlight
from kvlite.output import Collector
from kvlite.progress import Bar
from kvlite.request import RequestLimits, ValidatedRequest, validate
from kvlite.reuse_types import Reuse
from kvlite.runner.plan import Plan
from kvlite.runner.sampler import choice_seed
from kvlite.startup import Startup, build
from kvlite.tokenizer import Message, Tokenizer
from kvlite.types import (
    Delta,
    EngineStats,
    FinishReason,
    RequestOptions,
    RequestOutput,
    SamplingParams,
)

Prompt = str | Sequence[int]

IDLE_STEPS_LIMIT = 1000
"""Steps in a row without a plan, while requests live, after which the engine gives up."""


class Engine:
    """A model with its cache. `model` is a directory (default: the small one that ships) or a whole EngineConfig.

    `overrides` are fields of EngineConfig; KVLITE_ variables are read too. Raises ConfigError or ModelLoadError.
    """

    def __init__(
        self, model: str | Path | EngineConfig | None = None, *, progress: bool | None = None, **overrides: Any
    ) -> None:
        if isinstance(model, EngineConfig):
            assert not overrides, "settings come from the EngineConfig or as overrides, not both"
            self.config = model
        else:
            self.config = EngineConfig.from_env(model=None if model is None else str(model), **overrides)
        with Bar("loading", unit="B", wanted=progress) as bar:
            parts = build(self.config, bar.update)
        self.tokenizer: Tokenizer = parts.tokenizer
        self.limits: RequestLimits = parts.limits
        self.startup: Startup = parts.startup
        self._core = parts.core
        self._runner = parts.runner
        self._arenas = parts.arenas
        self._arena_idx = 0
        self._plan: Plan | None = None
        self._inflight = InFlight(parts.tokenizer, parts.runner.sampler, self.config.max_num_seqs)
        self._boxes: dict[int, deque[Delta]] = {}
        """Where deltas of requests go that `stream` or `generate` reads; the others come out of `step`."""
        self._unread: list[Delta] = []
        """Came out for nobody in particular; the next `step` returns them."""
        self._unwanted: set[int] = set()
        """Aborted because their reader left."""
        self._num_waiting = 0
        self._num_idle_steps = 0
        self._num_added = 0
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

    def validate(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> ValidatedRequest:
        """The one wall: text or ids, checked against every limit. Raises InvalidRequestError. Safe in any thread."""
        params = params or SamplingParams()
        if isinstance(prompt, str):
            return validate(self.limits, self.tokenizer.encode(prompt), params, options, text=prompt)
        return validate(self.limits, prompt, params, options)

    def add(self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None) -> int:
        """Queues a request for `step`; returns its handle. Raises InvalidRequestError or CapacityError."""
        return self.add_validated(self.validate(prompt, params, options))

    def add_validated(self, request: ValidatedRequest) -> int:
        """`add` for a request that has passed `validate`."""
        self._check_open()
        params, now_ms = request.params, _now_ms()
        try:
            handle = self._core.add(
                request.prompt_ids,
                n=params.n,
                max_tokens=request.max_tokens,
                min_tokens=params.min_tokens,
                stop_token_ids=sorted(request.stop_ids),
                priority=request.options.priority,
                deadline_ms=now_ms + int(request.timeout_s * 1000),
                tenant=request.options.tenant,
                use_cache=request.options.reuse != Reuse.OFF,
                prompt_logprobs=params.prompt_logprobs is not None,
                now_ms=now_ms,
            )
        except _core.InvalidArgument as error:
            raise InvalidRequestError(getattr(error, "param", "request"), str(error)) from None
        except _core.CapacityError as error:
            raise CapacityError(str(error)) from None
        seed = params.seed if params.seed is not None else choice_seed(self.config.seed, self._num_added + 1)
        self._num_added += 1
        self._inflight.add(handle, request, seed)
        return handle

    def abort(self, handle: int) -> bool:
        """Ends a request with reason cancelled at the next step; False when it has ended already."""
        if self._closed or handle not in self._inflight:
            return False
        return self._core.abort(handle)

    def step(self) -> list[Delta]:
        """One step: computes the plan at hand, commits it, makes the next; returns what came out.

        Requests added while a plan is at hand join the next one. Raises EngineError when the core is broken.
        """
        self._advance()
        deltas, self._unread = self._unread, []
        return deltas

    def _advance(self) -> None:
        """One step; deltas go where their readers look."""
        if self._plan is None:
            self._collect()
        if self._plan is not None:
            self.run_plan()
            self._collect()
        self._watch_for_stall()

    def _collect(self) -> None:
        with _uninterrupted():
            for delta in self.make_plan():
                self._sort(delta)

    def _sort(self, delta: Delta) -> None:
        if delta.handle in self._boxes:
            self._boxes[delta.handle].append(delta)
        elif delta.handle not in self._unwanted:
            self._unread.append(delta)
        elif delta.usage is not None:
            self._unwanted.discard(delta.handle)

    def _watch_for_stall(self) -> None:
        """A core that plans nothing while requests live would hang its callers: a fault of ours, said aloud."""
        self._num_idle_steps = self._num_idle_steps + 1 if self._plan is None and len(self._inflight) else 0
        if self._num_idle_steps > IDLE_STEPS_LIMIT:
            self._dead = f"{len(self._inflight)} requests wait and nothing is planned"
            raise EngineError(self._dead)

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
        for choice in stopped:
            self._core.finish(choice.handle, choice.index, choice.kept_len, REASONS.index(FinishReason.STOP))
        self._plan = plan if plan.num_tokens else None
        self._num_waiting = plan.num_waiting
        return deltas

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  a str is a Sequence[str] too
        self,
        prompts: str | Sequence[int],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        progress: bool | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | None = None,
        *,
        progress: bool | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """One prompt (text or ids) or a list of them; outputs in the order of the prompts, `options` for all.

        All are checked before any starts. A list of any length is fed as the queue has room. Raises
        InvalidRequestError; what goes wrong later is the finish reason of its choice.
        """
        if _is_single(prompts):
            assert params is None or isinstance(params, SamplingParams), "one prompt has one SamplingParams"
            return self._run_all([self.validate(cast("Prompt", prompts), params, options)], progress)[0]
        each = cast("Sequence[Prompt]", prompts)
        every = [params] * len(each) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(every) != len(each):
            raise InvalidRequestError("params", f"{len(every)} for {len(each)} prompts: give one, or one for each")
        checked = [self.validate(prompt, own, options) for prompt, own in zip(each, every, strict=True)]
        return self._run_all(checked, progress)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **variables: Any,
    ) -> RequestOutput:
        """Answers a conversation; `variables` reach the chat template. Raises InvalidRequestError."""
        return self.generate([self.tokenizer.apply_chat_template(messages, **variables)], params, options)[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> Iterator[Delta]:
        """Deltas as they come; the last one has `usage`. The request is checked now and starts at the first `next`.

        Closing the iterator early aborts the request. Several may be open at once; each steps the engine for all.
        """
        return self._stream(self.validate(prompt, params, options))

    def _stream(self, request: ValidatedRequest) -> Iterator[Delta]:
        box: deque[Delta] = deque()
        handle = self.add_validated(request)
        self._boxes[handle] = box
        try:
            while True:
                while box:
                    delta = box.popleft()
                    yield delta
                    if delta.usage is not None:
                        return
                self._advance()
        finally:
            self._forget(handle)

    def _run_all(self, requests: list[ValidatedRequest], progress: bool | None) -> list[RequestOutput]:
        collectors = [Collector(request) for request in requests]
        box: deque[Delta] = deque()
        started: dict[int, Collector] = {}
        at = num_done = 0
        try:
            with Bar("generating", unit="requests", wanted=progress) as bar:
                while num_done < len(requests):
                    while at < len(requests) and (handle := self._try_add(requests[at])) is not None:
                        started[handle] = collectors[at]
                        self._boxes[handle] = box
                        at += 1
                    self._advance()
                    while box:
                        delta = box.popleft()
                        num_done += started[delta.handle].push(delta)
                    bar.update(num_done, len(requests))
        finally:
            for handle in started:
                self._forget(handle)
        return [collector.output() for collector in collectors]

    def _try_add(self, request: ValidatedRequest) -> int | None:
        try:
            return self.add_validated(request)
        except CapacityError:
            return None

    def _forget(self, handle: int) -> None:
        """Nobody reads this request any more: it is aborted if it lives."""
        self._boxes.pop(handle, None)
        if self.abort(handle):
            self._unwanted.add(handle)

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
            prompt_tokens=stats["prompt_tokens_total"],
            cached_tokens=stats["prefix_hit_tokens_total"],
            generated_tokens=stats["generated_tokens_total"],
            num_steps=stats["steps_total"],
            num_failed_steps=stats["failed_plans_total"],
            num_preemptions=stats["preemptions_total"],
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
        self._boxes.clear()
        return self._inflight.end_all(reason, error)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError
        if self._dead is not None:
            raise EngineError(f"the core is broken: {self._dead}")


def _is_single(prompts: Prompt | Sequence[str] | Sequence[Sequence[int]]) -> bool:
    is_list = not isinstance(prompts, str) and isinstance(prompts, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
    return not is_list or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence))


@contextmanager
def _uninterrupted() -> Generator[None]:
    """Holds Ctrl-C back until the block is done: an event that was read half would be lost to its request."""
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
