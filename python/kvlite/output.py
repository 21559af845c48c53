"""`ChoiceOutput`: one choice on its way out: ids to text, stop strings, log-probabilities, deltas.

Owns what was generated and what was shown of it. Text that may be the beginning of a stop string is held back, so no
part of one is ever shown. `Collector` and `Throughput` add deltas up: of one request, of many. Knows neither core nor
device. Called by engine.py and its users.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvlite.request import ValidatedRequest
from kvlite.reuse_types import ReuseReport
from kvlite.runner.sampler import RawLogprobs
from kvlite.tokenizer import Detokenizer, Tokenizer
from kvlite.types import CompletionOutput, Delta, FinishReason, Logprob, RequestOutput, TokenLogprobs, Usage


class StopMatcher:
    """Finds the first of several stop strings in text that comes in pieces. O(text) for bounded stop strings."""

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held: str = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was found). After a find nothing more may be pushed."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[: at + len(stop) if self._include else at], stop
        kept = self._held_len(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], None

    def flush(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held

    def _held_len(self, text: str) -> int:
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - size :]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


class ChoiceOutput:
    """What one choice has produced. `finish_reason` is set once; nothing is accepted afterwards."""

    def __init__(self, request: ValidatedRequest, index: int, tokenizer: Tokenizer) -> None:
        params = request.params
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._request = request
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stops = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._text: list[str] = []
        self._num_shown = 0
        self._logprobs: list[TokenLogprobs] = []

    def resume(self, outputs: Sequence[int] | None) -> None:
        """Of a raw request that lived elsewhere: continues behind `outputs`; None for a choice that has ended."""
        assert self._request.raw and not self.token_ids, "text begins where the request did"
        if outputs is None:
            self.finish_reason = FinishReason.STOP
            return
        self.token_ids = list(outputs)
        self._num_shown = len(self.token_ids)

    def cut(self, kept_len: int) -> None:
        """Forgets the ids behind the first `kept_len`: the stream's owner ended the choice there."""
        del self.token_ids[kept_len:]
        self._num_shown = min(self._num_shown, kept_len)

    def push(self, token: int, raw: RawLogprobs | None) -> bool:
        """Takes the next id; True when its text completes a stop string, which ends the choice here."""
        self.token_ids.append(token)
        if raw is not None:
            self._logprobs.append(readable(raw, None if self._request.raw else self._tokenizer))
        if self._request.raw:
            return False
        params = self._request.params
        if token in self._request.stop_ids:
            self.stop_reason = None if token in self._request.eos_ids else token
            if not params.include_stop_str_in_output:
                return False
        text = self._detokenizer.push(token)
        if len(self.token_ids) <= params.min_tokens:
            self._text.append(text)
            return False
        shown, stop = self._stops.push(text)
        self._text.append(shown)
        if stop is None:
            return False
        self.stop_reason = stop
        self.finish(FinishReason.STOP)
        return True

    def finish(self, reason: FinishReason) -> None:
        """Ends the choice; held text comes out unless a stop string ended it."""
        self.finish_reason = reason
        if not self._request.raw and not isinstance(self.stop_reason, str):
            self._text.append(self._stops.flush() + self._detokenizer.flush())

    def delta(self, handle: int) -> Delta:
        """Everything since the last delta."""
        text = "".join(self._text)
        ids, logprobs = tuple(self.token_ids[self._num_shown :]), tuple(self._logprobs)
        self._text.clear()
        self._logprobs.clear()
        self._num_shown = len(self.token_ids)
        reason = self.finish_reason
        stop_reason = self.stop_reason if reason is FinishReason.STOP else None
        return Delta(handle, self.index, text, ids, logprobs, reason, stop_reason)


class Collector:
    """Deltas of one request put together again."""

    def __init__(self, request: ValidatedRequest) -> None:
        self._request = request
        self._parts: list[list[Delta]] = [[] for _ in range(request.params.n)]
        self._usage: Usage | None = None
        self._reuse: ReuseReport | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def push(self, delta: Delta) -> bool:
        """Takes the next delta; True when it was the last."""
        self._parts[delta.index].append(delta)
        self._usage, self._reuse = delta.usage, delta.reuse
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        return delta.usage is not None

    def output(self) -> RequestOutput:
        """The finished request."""
        assert self._usage is not None, "the last delta was pushed"
        return RequestOutput(
            prompt_token_ids=tuple(self._request.prompt_ids.tolist()),
            outputs=tuple(_completion(parts) for parts in self._parts),
            usage=self._usage,
            prompt=self._request.text,
            prompt_logprobs=self._prompt_logprobs,
            reuse=self._reuse,
        )


def _completion(parts: list[Delta]) -> CompletionOutput:
    last = parts[-1]
    assert last.finish_reason is not None, "every choice ends"
    return CompletionOutput(
        index=last.index,
        text="".join(part.text for part in parts),
        token_ids=tuple(id for part in parts for id in part.token_ids),
        finish_reason=last.finish_reason,
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        stop_reason=last.stop_reason,
        error=last.error,
    )


def readable(raw: RawLogprobs, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """Log-probabilities with the text of their tokens; None: without."""

    def text(id: int) -> str:
        return "" if tokenizer is None else tokenizer.token_text(id)

    pairs = zip(raw.top_ids, raw.top_logprobs, strict=True)
    top = tuple(Logprob(id, text(id), value, rank) for rank, (id, value) in enumerate(pairs, 1))
    return TokenLogprobs(Logprob(raw.token_id, text(raw.token_id), raw.logprob, raw.rank), top)


def unreadable(logprobs: TokenLogprobs) -> RawLogprobs:
    """What `readable` made them from."""
    chosen, top = logprobs.chosen, logprobs.top
    ids, values = tuple(each.token_id for each in top), tuple(each.logprob for each in top)
    return RawLogprobs(chosen.token_id, chosen.logprob, chosen.rank, ids, values)


class Throughput:
    """Tokens of the requests of one run, since it was made: what their progress bar says beside their number."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.output_tokens = 0
        self.prompt_tokens = 0
        """Of requests that have ended, as `cached_tokens`."""
        self.cached_tokens = 0
        """Prompt tokens that were not computed: their KV came from the cache."""

    def add(self, delta: Delta) -> None:
        """Counts one delta of any request."""
        self.output_tokens += len(delta.token_ids)
        if delta.usage is not None:
            self.prompt_tokens += delta.usage.prompt_tokens
            self.cached_tokens += delta.usage.cached_tokens

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def saved_ratio(self) -> float:
        """Share of the prompt tokens that came from the cache, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def note(self) -> str:
        """Rates over the whole run, and the share saved."""
        seconds = max(self.seconds, 1e-9)
        rates = f"{self.prompt_tokens / seconds:.0f} prompt + {self.output_tokens / seconds:.0f} output tokens/s"
        return f"{rates}, {self.saved_ratio:.0%} of the prompts from the cache"
