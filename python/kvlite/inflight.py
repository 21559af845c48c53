"""`InFlight`: every request between `add` and its last delta, and who holds which row.

Owns what the stream's owner must keep: ids, text, stop strings, log-probabilities. Turns what a plan reports
(committed, finished, admitted) into deltas; a choice ends once, nothing follows its end. Knows neither device
nor clock nor core; stop strings that it finds are handed back for the core to hear of. Called by loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from kvlite.output import ChoiceOutput, readable
from kvlite.request import ValidatedRequest
from kvlite.reuse_types import ReuseReport
from kvlite.runner.model_runner import RunResult
from kvlite.runner.plan import Cause, Plan, SampleKind, as_rows
from kvlite.runner.sampler import RawLogprobs, RowSampling, Sampler, choice_seed
from kvlite.tokenizer import Tokenizer
from kvlite.types import Delta, FinishReason, TokenLogprobs, Usage

if TYPE_CHECKING:
    import torch

REASONS = (
    FinishReason.STOP,
    FinishReason.LENGTH,
    FinishReason.CANCELLED,
    FinishReason.ERROR,
    FinishReason.TIMEOUT,
)
"""By the core's number."""


NO_ROOM = "there is no room for it beside what is pinned"
"""Why a segment could not be made, when no step failed."""


class Tracked:
    """One request and its choices."""

    def __init__(
        self,
        handle: int,
        request: ValidatedRequest,
        seed: int,
        tokenizer: Tokenizer,
        *,
        deadline_ms: int,
        captured: bool = False,
    ) -> None:
        self.handle = handle
        self.request = request
        self.seed = seed
        self.deadline_ms = deadline_ms
        """On the clock of the core's steps."""
        self.choices = [ChoiceOutput(request, n, tokenizer) for n in range(request.params.n)]
        self.captured = captured
        self.reuse: ReuseReport | None = None
        """Set when the request is admitted."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """Filled as the prompt is computed; None when not asked, or shown already."""
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = list[TokenLogprobs | None]([None]) * len(request.prompt_ids)

    @property
    def ended(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def outputs(self) -> list[list[int] | None]:
        """Ids of each choice so far; None for one that has ended."""
        return [None if choice.finish_reason is not None else choice.token_ids for choice in self.choices]

    def resume(self, outputs: Sequence[Sequence[int] | None]) -> None:
        """Continues behind what a raw request produced elsewhere; choices that ended there are empty in its usage."""
        for choice, ids in zip(self.choices, outputs, strict=True):
            choice.resume(ids)
        if self.choices[0].token_ids or self.choices[0].finish_reason is not None:
            self.prompt_logprobs = None

    def usage(self) -> Usage:
        completion = sum(len(choice.token_ids) for choice in self.choices)
        cached = 0 if self.reuse is None else self.reuse.cached_tokens
        return Usage(len(self.request.prompt_ids), completion, cached)


_Held: TypeAlias = tuple[Tracked, ChoiceOutput]


@dataclass(frozen=True, slots=True)
class Stopped:
    """A choice that a stop string ended: what the core must be told."""

    handle: int
    index: int
    kept_len: int


ReportOf = Callable[[int, ValidatedRequest, int], ReuseReport | None]
"""(handle, request, cached_len) of a request that was just admitted."""


class InFlight:
    """The requests of one engine. `captured` is the runner's set of rows whose next logits are wanted."""

    def __init__(self, tokenizer: Tokenizer, sampler: Sampler, captured: set[int], report_of: ReportOf) -> None:
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._captured = captured
        self._report_of = report_of
        self.first_logits: dict[int, torch.Tensor] = {}
        """By handle: what the first token of choice 0 was chosen from, [V] fp32. Whoever asked for it takes it out."""
        self._requests: dict[int, Tracked] = {}
        self._rows: dict[int, _Held] = {}
        """By seq_row."""
        self._logprobs: dict[int, RawLogprobs] = {}
        """Of the plan that was computed last, by seq_row."""
        self._fault: Exception | None = None
        """What failed that plan."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, handle: int) -> bool:
        return handle in self._requests

    def get(self, handle: int) -> Tracked | None:
        """The request of that handle; None when it has ended, or was never here."""
        return self._requests.get(handle)

    def add(
        self, handle: int, request: ValidatedRequest, seed: int, *, deadline_ms: int, captured: bool = False
    ) -> Tracked:
        """Starts to follow a request; `captured`: its first logits are wanted."""
        tracked = Tracked(handle, request, seed, self._tokenizer, deadline_ms=deadline_ms, captured=captured)
        self._requests[handle] = tracked
        return tracked

    def release(self, handle: int) -> Tracked:
        """Lets go of a request that lives elsewhere from now on; no plan names it. Nothing of it comes out any more."""
        tracked = self._requests.pop(handle)
        for row in [row for row, held in self._rows.items() if held[0] is tracked]:
            del self._rows[row]
            self._captured.discard(row)
        self.first_logits.pop(handle, None)
        return tracked

    def adopt(self, handle: int, tracked: Tracked) -> None:
        """Goes on with what another InFlight released: its choices continue where they are."""
        tracked.handle = handle
        tracked.captured = False
        self._requests[handle] = tracked

    def computed(self, plan: Plan, result: RunResult) -> None:
        """Takes what the runner gave beside ids; before the core commits `plan`."""
        self._fault = result.fault
        self._logprobs = {}
        sample = as_rows(plan.sample) if result.logprobs else []
        for n, raw in result.logprobs.items():
            row, seq_row, kind = sample[n]
            held = self._rows.get(seq_row)
            if kind == SampleKind.SAMPLE:
                self._logprobs[seq_row] = raw
            elif held is not None and held[0].prompt_logprobs is not None:
                held[0].prompt_logprobs[int(plan.last_key[row]) + 1] = readable(raw, self._tokenizer)

        for seq_row, logits in result.logits.items():
            held = self._rows.get(seq_row)
            if held is not None and held[1].index == 0:
                self.first_logits[held[0].handle] = logits

    def outcome(self, plan: Plan) -> tuple[list[Delta], list[Stopped]]:
        """What `plan` reports of those before it: committed, then finished, then who holds which row from now on."""
        touched: dict[tuple[int, int], _Held] = {}
        stopped: dict[tuple[int, int], Stopped] = {}
        for seq_row, _position, token in as_rows(plan.committed):
            held = self._rows.get(seq_row)
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
        self._rows.pop(seq_row, None)
        self._captured.discard(seq_row)
        request = self._requests.get(key[0])
        if request is None or request.request.segment is not None:
            return
        choice = request.choices[key[1]]
        if cause is Cause.NEW or request.reuse is None:
            request.reuse = self._report_of(request.handle, request.request, cached_len)
        if request.captured and choice.index == 0 and not choice.token_ids:
            self._captured.add(seq_row)
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
                delta = replace(delta, error=self._cause(request))
            if last.get(request.handle) is choice:
                del self._requests[request.handle]
                delta = replace(delta, usage=request.usage(), reuse=request.reuse)
            deltas.append(delta)
        return deltas

    def _cause(self, request: Tracked) -> str:
        if self._fault is not None:
            return f"a step failed: {self._fault!r}"
        if request.request.segment is not None:
            return NO_ROOM
        return "the model gave no usable logits"
