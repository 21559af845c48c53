"""`InFlight`: every request between `add` and its last delta, and who holds which row.

Owns what the stream's owner must keep: ids, text, stop strings, log-probabilities. Turns what a plan reports
(committed, finished, admitted) into deltas; a choice ends once, nothing follows its end. Knows neither device
nor clock nor core; stop strings that it finds are handed back for the core to hear of. Called by engine.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from kvlite.output import ChoiceOutput, readable
from kvlite.request import ValidatedRequest
from kvlite.runner.model_runner import RunResult
from kvlite.runner.plan import Cause, Plan, SampleKind, as_rows
from kvlite.runner.sampler import RawLogprobs, RowSampling, Sampler, choice_seed
from kvlite.tokenizer import Tokenizer
from kvlite.types import Delta, FinishReason, TokenLogprobs, Usage

REASONS = (
    FinishReason.STOP,
    FinishReason.LENGTH,
    FinishReason.CANCELLED,
    FinishReason.ERROR,
    FinishReason.TIMEOUT,
)
"""By the core's number."""


class _Request:
    """One request and its choices."""

    def __init__(self, handle: int, request: ValidatedRequest, seed: int, tokenizer: Tokenizer) -> None:
        self.handle = handle
        self.request = request
        self.seed = seed
        self.choices = [ChoiceOutput(request, n, tokenizer) for n in range(request.params.n)]
        self.cached_len = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """Filled as the prompt is computed; None when not asked, or shown already."""
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = list[TokenLogprobs | None]([None]) * len(request.prompt_ids)

    @property
    def ended(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def usage(self) -> Usage:
        completion = sum(len(choice.token_ids) for choice in self.choices)
        return Usage(len(self.request.prompt_ids), completion, self.cached_len)


_Held: TypeAlias = tuple[_Request, ChoiceOutput]


@dataclass(frozen=True, slots=True)
class Stopped:
    """A choice that a stop string ended: what the core must be told."""

    handle: int
    index: int
    kept_len: int


class InFlight:
    """The requests of one engine."""

    def __init__(self, tokenizer: Tokenizer, sampler: Sampler, num_rows: int) -> None:
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._requests: dict[int, _Request] = {}
        self._rows: list[_Held | None] = [None] * num_rows
        self._logprobs: dict[int, RawLogprobs] = {}
        """Of the plan that was computed last, by seq_row."""
        self._fault: Exception | None = None
        """What failed that plan."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, handle: int) -> bool:
        return handle in self._requests

    def add(self, handle: int, request: ValidatedRequest, seed: int) -> None:
        """Starts to follow a request."""
        self._requests[handle] = _Request(handle, request, seed, self._tokenizer)

    def computed(self, plan: Plan, result: RunResult) -> None:
        """Takes what the runner gave beside ids; before the core commits `plan`."""
        self._fault = result.fault
        self._logprobs = {}
        sample = as_rows(plan.sample) if result.logprobs else []
        for n, raw in result.logprobs.items():
            row, seq_row, kind = sample[n]
            held = self._rows[seq_row]
            if kind == SampleKind.SAMPLE:
                self._logprobs[seq_row] = raw
            elif held is not None and held[0].prompt_logprobs is not None:
                held[0].prompt_logprobs[int(plan.last_key[row]) + 1] = readable(raw, self._tokenizer)

    def outcome(self, plan: Plan) -> tuple[list[Delta], list[Stopped]]:
        """What `plan` reports of those before it: committed, then finished, then who holds which row from now on."""
        touched: dict[tuple[int, int], _Held] = {}
        stopped: dict[tuple[int, int], Stopped] = {}
        for seq_row, _position, token in as_rows(plan.committed):
            held = self._rows[seq_row]
            if held is None or held[1].finish_reason is not None:
                continue  # ended by a stop string, which the core hears of a step late
            request, choice = held
            key = (request.handle, choice.index)
            touched[key] = held
            if choice.push(token, self._logprobs.get(seq_row)):
                stopped[key] = Stopped(*key, len(choice.token_ids))
        for handle, index, reason in as_rows(plan.finished):
            stopped.pop((handle, index), None)
            for request, choice in self._ending(handle, index):
                choice.finish(REASONS[reason])
                touched[handle, choice.index] = (request, choice)
        deltas = self._deltas(list(touched.values()))
        for handle, index, seq_row, cause, cached_len in as_rows(plan.admitted):
            self._admit((handle, index), seq_row, Cause(cause), cached_len)
        return deltas, list(stopped.values())

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[Delta]:
        """Ends every choice at once, when the engine closes or breaks."""
        open_choices = [held for handle in self._requests for held in self._ending(handle, -1)]
        for _, choice in open_choices:
            choice.finish(reason)
        deltas = self._deltas(open_choices)
        return deltas if error is None else [replace(delta, error=error) for delta in deltas]

    def _ending(self, handle: int, index: int) -> list[_Held]:
        """The open choices that (handle, index) means; index -1 means all."""
        request = self._requests.get(handle)
        if request is None:
            return []
        choices = request.choices if index < 0 else [request.choices[index]]
        return [(request, choice) for choice in choices if choice.finish_reason is None]

    def _admit(self, key: tuple[int, int], seq_row: int, cause: Cause, cached_len: int) -> None:
        request = self._requests.get(key[0])
        if request is None:
            self._rows[seq_row] = None
            return
        choice = request.choices[key[1]]
        if cause is Cause.NEW:
            request.cached_len = cached_len
        self._rows[seq_row] = (request, choice)
        state = RowSampling(
            params=request.request.params,
            seed=choice_seed(request.seed, choice.index),
            prompt=request.request.prompt_ids,
            outputs=tuple(choice.token_ids),
            banned_ids=tuple(sorted(request.request.stop_ids)),
        )
        self._sampler.admit(seq_row, state)

    def _deltas(self, touched: list[_Held]) -> list[Delta]:
        last = {request.handle: choice for request, choice in touched if request.ended}
        deltas: list[Delta] = []
        for request, choice in touched:
            delta = choice.delta(request.handle)
            if request.prompt_logprobs is not None and choice.index == 0:
                delta = replace(delta, prompt_logprobs=tuple(request.prompt_logprobs))
                request.prompt_logprobs = None
            if delta.finish_reason is FinishReason.ERROR:
                cause = "the model gave no usable logits" if self._fault is None else f"a step failed: {self._fault!r}"
                delta = replace(delta, error=cause)
            if last.get(request.handle) is choice:
                del self._requests[request.handle]
                delta = replace(delta, usage=request.usage())
            deltas.append(delta)
        return deltas
