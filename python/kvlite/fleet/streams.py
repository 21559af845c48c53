"""`Stream`: one request between its client and whichever engine has it.

Owns what survives every engine: the ids that were delivered, their text, stop strings, log-probabilities, and what the
reader has not taken yet. Knows neither engines nor epochs: what comes in here is in order and said once. A slow reader
gets fewer, larger deltas. One event loop. Called by requests.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvlite.errors import KvliteError
from kvlite.fleet.messages import Scores
from kvlite.output import ChoiceOutput, readable
from kvlite.request import ValidatedRequest
from kvlite.reuse_types import ReuseReport
from kvlite.runner.sampler import RawLogprobs
from kvlite.tokenizer import Tokenizer
from kvlite.types import Delta, FinishReason, TokenLogprobs, Usage


class Stream:
    """Choices that grow, and a reader. `name` is what its answer is called in the API."""

    def __init__(self, id: int, name: str, request: ValidatedRequest, seed: int, tokenizer: Tokenizer) -> None:
        self.id = id
        self.name = name
        self.request = request
        self.seed = seed
        """Fixed here, so that every engine draws the same tokens from (seed, position)."""
        self.deadline = time.monotonic() + request.timeout_s
        self.ready = asyncio.Event()
        """Set while there is something to take."""
        self.done = False
        """Whether the last delta may go out: every choice has ended, and nothing more will be learnt of the request."""
        self.token_at: float | None = None
        """When the last tokens came, on the clock of time.monotonic; as `ended_at`."""
        self.ended_at: float | None = None
        """When the last open choice ended."""
        self.num_replays = 0
        self._tokenizer = tokenizer
        self._choices = [ChoiceOutput(request, n, tokenizer) for n in range(request.params.n)]
        self._touched: list[int] = []
        self._last: int | None = None
        """The choice that ended last, once all have."""
        self._errors: dict[int, str] = {}
        self._error: KvliteError | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._wants_prompt_logprobs = request.params.prompt_logprobs is not None
        self._reuse: ReuseReport | None = None
        self._stopped: dict[int, int] = {}

    @property
    def ended(self) -> bool:
        """Whether every choice has ended."""
        return self._last is not None

    @property
    def num_tokens(self) -> int:
        """Output tokens so far, over all choices."""
        return sum(len(choice.token_ids) for choice in self._choices)

    @property
    def time_left_s(self) -> float:
        """Until its deadline; at least a millisecond."""
        return max(self.deadline - time.monotonic(), 0.001)

    @property
    def stopped(self) -> dict[int, int]:
        """Choices that a stop string ended, with the output tokens that each keeps: its engine cannot know."""
        return dict(self._stopped)

    def length(self, index: int) -> int:
        """Output tokens of one choice."""
        return len(self._choices[index].token_ids)

    def is_open(self, index: int) -> bool:
        """Whether a choice has not ended."""
        return self._choices[index].finish_reason is None

    def outputs(self) -> list[bytes | None]:
        """Ids of every choice as int32, what a replay begins with; None for a choice that has ended."""
        return [
            np.asarray(choice.token_ids, "<i4").tobytes() if choice.finish_reason is None else None
            for choice in self._choices
        ]

    def push(self, index: int, ids: Sequence[int], scores: Sequence[Scores] | None) -> int | None:
        """Takes the next ids of an open choice; when a stop string ends it here, how many tokens it keeps.

        `scores`: one per id when log-probabilities are asked.
        """
        choice = self._choices[index]
        self._touch(index)
        self.token_at = time.monotonic()
        for n, token in enumerate(ids):
            if choice.push(token, None if scores is None else _raw(scores[n])):
                self._stopped[index] = len(choice.token_ids)
                self._close(index)
                return len(choice.token_ids)
        return None

    def show_prompt(self, scores: Sequence[Scores | None]) -> None:
        """Log-probabilities of the prompt; they go out with the next delta of choice 0, once."""
        if self._wants_prompt_logprobs:
            self._wants_prompt_logprobs = False
            self._prompt_logprobs = tuple(
                None if one is None else readable(_raw(one), self._tokenizer) for one in scores
            )

    def end(self, index: int, reason: FinishReason, error: str | None = None) -> None:
        """Ends a choice that is open."""
        self._choices[index].finish(reason)
        if error is not None:
            self._errors[index] = error
        self._touch(index)
        self._close(index)

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends every open choice, and the request."""
        for choice in self._choices:
            if choice.finish_reason is None:
                self.end(choice.index, reason, error)
        self.close(None)

    def settle(self) -> None:
        """Ends the choices whose tokens say that they are over, when the engine died before it could."""
        for choice in self._choices:
            if choice.finish_reason is not None or not choice.token_ids:
                continue
            if choice.token_ids[-1] in self.request.stop_ids:
                self.end(choice.index, FinishReason.STOP)
            elif len(choice.token_ids) >= self.request.max_tokens:
                self.end(choice.index, FinishReason.LENGTH)

    def close(self, reuse: ReuseReport | None) -> None:
        """Nothing more will be learnt of a request whose choices have all ended."""
        assert self.ended, "every choice has ended"
        self._reuse = reuse
        self.done = True
        self.ready.set()

    def fail(self, error: KvliteError) -> None:
        """The request was not taken: its reader gets `error` instead of deltas."""
        self._error = error
        self.ready.set()

    def take(self) -> list[Delta]:
        """Everything since the last call; the request's last delta, which has `usage`, comes last and when `done`.

        Raises what `fail` was given.
        """
        self.ready.clear()
        if self._error is not None:
            raise self._error
        held = [] if self._last is None or self._last not in self._touched else [self._last]
        deltas = [self._delta(index) for index in self._touched if index not in held]
        self._touched = held
        if self.done and held:
            self._touched = []
            deltas.append(replace(self._delta(held[0]), usage=self._usage(), reuse=self._reuse))
        return deltas

    def _touch(self, index: int) -> None:
        if index not in self._touched:
            self._touched.append(index)
        self.ready.set()

    def _close(self, index: int) -> None:
        if all(choice.finish_reason is not None for choice in self._choices):
            self._last = index
            self.ended_at = time.monotonic()

    def _delta(self, index: int) -> Delta:
        delta = self._choices[index].delta(self.id)
        if index == 0 and self._prompt_logprobs is not None:
            delta = replace(delta, prompt_logprobs=self._prompt_logprobs)
            self._prompt_logprobs = None
        if delta.finish_reason is FinishReason.ERROR:
            delta = replace(delta, error=self._errors.get(index, "the engine gave no reason"))
        return delta

    def _usage(self) -> Usage:
        cached = 0 if self._reuse is None else self._reuse.cached_tokens
        return Usage(len(self.request.prompt_ids), self.num_tokens, cached)


def _raw(scores: Scores) -> RawLogprobs:
    return RawLogprobs(scores.token_id, scores.logprob, scores.rank, scores.top_ids, scores.top_logprobs)
