"""How OpenAI's endpoints spell one choice: whole, or as the pieces of a stream.

Owns the JSON shapes of chat.completion(.chunk) and text_completion, and `Call`, what an answer repeats of its request.
Knows neither HTTP nor the engine. Called by stream.py; one wire object holds the state of one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvlite.request import ValidatedRequest
from kvlite.server.protocol import Options
from kvlite.types import Delta, FinishReason, Logprob, SamplingParams, TokenLogprobs

LOGPROB_FLOOR = -9999.0
"""JSON has no -inf."""

Chunk = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a call, checked; `text` is there when the answer must echo it."""

    request: ValidatedRequest
    text: str = ""

    @property
    def ids(self) -> list[int]:
        """Token ids, as JSON shows them."""
        return self.request.prompt_ids.tolist()


@dataclass(frozen=True)
class Call:
    """One HTTP request, checked and tokenised, with what its answer repeats."""

    id: str
    created: int
    model: str
    options: Options
    prompts: tuple[Prompt, ...]
    echo: bool = False

    @property
    def params(self) -> SamplingParams:
        """Sampling of every prompt."""
        return self.options.params


class Wire(Protocol):
    """How one endpoint spells choices. Holds the state of one answer."""

    object: str
    chunk_object: str

    def opening(self, index: int) -> Chunk | None:
        """The choice of a first chunk that goes before any token."""
        ...

    def piece(self, index: int, delta: Delta) -> Chunk | None:
        """One delta as the choice of a chunk; None when there is nothing to say."""
        ...

    def whole(self, index: int, choice: Gathered) -> Chunk:
        """A finished choice."""
        ...


@dataclass
class Gathered:
    """One choice as it grows."""

    text: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def add(self, delta: Delta) -> None:
        """Take in the next delta of this choice."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LOGPROB_FLOOR)


def prompt_logprobs_body(entries: Sequence[TokenLogprobs | None]) -> list[Chunk | None]:
    """Per prompt position {token id: {logprob, rank, decoded_token}}; null for the first, as vLLM spells it."""

    def one(item: Logprob) -> Chunk:
        return {"logprob": finite(item.logprob), "rank": item.rank, "decoded_token": item.text}

    return [
        None if entry is None else {str(item.token_id): one(item) for item in (entry.chosen, *entry.top)}
        for entry in entries
    ]


class ChatWire:
    """chat.completion: messages, role first, logprobs with bytes."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call, token_bytes: Callable[[int], bytes]) -> None:
        self._call = call
        self._token_bytes = token_bytes

    def opening(self, index: int) -> Chunk:
        """The role, alone."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, delta: Delta) -> Chunk | None:
        """Text of one delta; nothing while a character or a stop string is undecided."""
        ids = self._call.options.return_token_ids and delta.token_ids
        if not (delta.text or delta.finish_reason or delta.logprobs or ids):
            return None
        chunk: Chunk = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            chunk["stop_reason"] = delta.stop_reason
        if ids:
            chunk["token_ids"] = ids
        return chunk

    def whole(self, index: int, choice: Gathered) -> Chunk:
        """One finished choice."""
        body: Chunk = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._call.options.return_token_ids:
            body |= {"token_ids": choice.token_ids, "prompt_token_ids": self._call.prompts[0].ids}
        if choice.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_body(choice.prompt_logprobs)
        return body

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> Chunk | None:
        if self._call.params.logprobs is None:
            return None
        content = [self._entry(entry.chosen) | {"top_logprobs": list(map(self._entry, entry.top))} for entry in entries]
        return {"content": content, "refusal": None}

    def _entry(self, item: Logprob) -> Chunk:
        return {
            "token": item.text,
            "logprob": finite(item.logprob),
            "bytes": list(self._token_bytes(item.token_id)),
        }


class TextWire:
    """text_completion: plain text, echo, logprobs with text offsets."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, call: Call, token_text: Callable[[int], str]) -> None:
        self._call = call
        self._token_text = token_text
        self._offset: dict[int, int] = {}
        self._echoed: dict[int, tuple[TokenLogprobs | None, ...]] = {}

    def opening(self, index: int) -> Chunk | None:
        """Nothing: the prompt, when echoed, goes with the first piece, which has its log-probabilities."""
        return None

    def piece(self, index: int, delta: Delta) -> Chunk | None:
        """Text of one delta, behind the prompt when it is the first and the prompt is wanted."""
        first = index not in self._offset
        ids = self._call.options.return_token_ids and delta.token_ids
        if not ((first and self._call.echo) or delta.text or delta.finish_reason or delta.logprobs or ids):
            return None
        chunk = self._choice(index, delta.text, delta.logprobs, delta.prompt_logprobs, first)
        chunk["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            chunk["stop_reason"] = delta.stop_reason
        if ids:
            chunk["token_ids"] = ids
        return chunk

    def whole(self, index: int, choice: Gathered) -> Chunk:
        """One finished choice."""
        body = self._choice(index, "".join(choice.text), choice.logprobs, choice.prompt_logprobs, True)
        body |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if self._call.options.return_token_ids:
            body |= {"token_ids": choice.token_ids, "prompt_token_ids": self._prompt(index).ids}
        if self._call.options.show_prompt_logprobs and choice.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_body(choice.prompt_logprobs)
        return body

    def _prompt(self, index: int) -> Prompt:
        return self._call.prompts[index // self._call.params.n]

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprobs],
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
        first: bool,
    ) -> Chunk:
        """A choice with the prompt in front where it belongs."""
        start = self._offset.setdefault(index, 0)
        rows = [_Row.of(entry) for entry in logprobs]
        if first and self._call.echo:
            text = self._prompt(index).text + text
            rows = self._prompt_rows(index, prompt_logprobs) + rows
        chunk: Chunk = {"index": index, "text": text, "logprobs": None}
        if self._call.params.logprobs is not None:
            offsets = [start]
            for row in rows:
                offsets.append(offsets[-1] + len(row.token))
            self._offset[index] = offsets.pop()
            chunk["logprobs"] = {
                "text_offset": offsets,
                "tokens": [row.token for row in rows],
                "token_logprobs": [row.logprob for row in rows],
                "top_logprobs": [row.top for row in rows],
            }
        return chunk

    def _prompt_rows(self, index: int, entries: Sequence[TokenLogprobs | None] | None) -> list[_Row]:
        """The prompt's tokens; the choices of one prompt share what the first was told."""
        number = index // self._call.params.n
        if entries is not None:
            self._echoed[number] = tuple(entries)
        pairs = zip(self._prompt(index).ids, self._echoed.get(number, ()), strict=False)
        return [_Row(self._token_text(token)) if entry is None else _Row.of(entry) for token, entry in pairs]


@dataclass(frozen=True)
class _Row:
    """One token of a text completion's parallel lists; the first token of a prompt has no probability."""

    token: str
    logprob: float | None = None
    top: dict[str, float] | None = None

    @classmethod
    def of(cls, entry: TokenLogprobs) -> _Row:
        items = (entry.chosen, *entry.top)
        return cls(entry.chosen.text, finite(entry.chosen.logprob), {i.text: finite(i.logprob) for i in items})
