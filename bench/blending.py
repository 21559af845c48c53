"""Prompts of documents for blend benches, and what one request over them costs: time, tokens by source, token-layers.

Owns no figure of its own. Prompts are token ids: a head that no other prompt shares, documents in a new order each
time, a question; so no prompt begins like another one and only segments can be reused. Called by `blend` and
`blend_serving`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvlite import Engine, RequestOptions
from kvlite.models import ModelConfig
from kvlite.reuse import resolve
from kvlite.reuse.base import Scope
from kvlite.reuse_types import Reuse, ReuseReport, Segment, SegmentHit

from .embedded import drain, greedy
from .errors import BenchError
from .workloads import FIRST_ID, tokens

HEAD_LEN = 32
QUESTION_LEN = 32
DOCUMENT_LEN = 256

Part = list[int] | Segment


@dataclass(frozen=True)
class Choice:
    """One way to serve a blended request."""

    method: str
    ratio: float

    @property
    def name(self) -> str:
        """As in the keys of figures: `query_15`; a method that recomputes nothing has no ratio."""
        return "none" if self.method == "none" else f"{self.method.replace('-', '_')}_{round(self.ratio * 100)}"

    @property
    def reuse(self) -> Reuse:
        """What a request asks."""
        return Reuse.blend(self.ratio, self.method)


@dataclass(frozen=True)
class Asked:
    """One request that was served alone."""

    ttft_s: float
    token: int
    report: ReuseReport
    cached_tokens: int

    @property
    def reused_tokens(self) -> int:
        """Rows that came out of segments, recomputed ones among them."""
        return self.report.blended_tokens + self.report.recomputed_tokens


def documents(vocab: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Random ids, `count` documents of `length`; all differ."""
    return [list(tokens(f"document {seed} {idx}", length, vocab)) for idx in range(count)]


def prompts(vocab: int, library: Sequence[list[int]], per_prompt: int, seed: int) -> Iterator[list[Part]]:
    """Endless prompts over `per_prompt` documents of the library each, in random order, heads and questions new."""
    draw = random.Random(seed)
    serial = 0
    while True:
        chosen = draw.sample(range(len(library)), per_prompt)
        head = list(tokens(f"head {seed} {serial}", HEAD_LEN, vocab))
        question = list(tokens(f"question {seed} {serial}", QUESTION_LEN, vocab))
        yield [head, *(Segment(library[idx], f"d{idx}") for idx in chosen), question]
        serial += 1


def flat(prompt: Sequence[Part]) -> list[int]:
    """The prompt's ids."""
    return [token for part in prompt for token in (part.content if isinstance(part, Segment) else part)]  # type: ignore[union-attr]


def ask(engine: Engine, prompt: Sequence[Part], reuse: Reuse) -> Asked:
    """One token, nothing else running; seconds from adding the prompt. Raises BenchError when it ends otherwise."""
    start = time.perf_counter()
    handle = engine.add(prompt, greedy(1), RequestOptions(reuse=reuse))
    while True:
        deltas = [delta for delta in engine.step() if delta.handle == handle]
        if any(delta.token_ids for delta in deltas):
            ttft_s = time.perf_counter() - start
            break
        if any(delta.finish_reason is not None for delta in deltas):
            raise BenchError(f"a request over documents ended without a token: {deltas[-1].error}")
    ids = [token for delta in deltas for token in delta.token_ids]
    end = next((delta for delta in deltas if delta.finish_reason is not None), None)
    drain(engine, [handle])
    if end is None or end.usage is None or end.reuse is None:
        raise BenchError("a request of one token ended without usage or without its report on reuse")
    return Asked(ttft_s, ids[0], end.reuse, end.usage.cached_tokens)


def warm(engine: Engine, vocab: int, library: Sequence[list[int]]) -> None:
    """Puts every document of the library into the store. Raises BenchError when the store does not keep them."""
    for first in range(0, len(library), 8):
        some = library[first : first + 8]
        prompt = next(prompts(vocab, some, len(some), seed=-1 - first))
        ask(engine, prompt, Reuse.blend(0.0, "none"))
    for first in range(0, len(library), 8):
        some = library[first : first + 8]
        found = ask(engine, next(prompts(vocab, some, len(some), seed=-2 - first)), Reuse.blend(0.0, "none"))
        missed = [segment.id for segment in found.report.segments if segment.hit is not SegmentHit.DEVICE]
        if missed:
            raise BenchError(f"documents {', '.join(missed)} did not stay in the store: the KV cache is too small")


def token_layers(config: ModelConfig, choice: Choice, asked: Asked) -> dict[str, float]:
    """What was computed, in token-layers over those of the reused rows: recomputed rows, selection, and all of it.

    `computed` has the one pass over new text as well, over the prompt's tokens: 1 is a full prefill.
    """
    reused, new = asked.reused_tokens, asked.report.computed_tokens
    method = resolve(choice.method, {}, config.num_layers)
    selection, kept = 0.0, float(reused)
    for round in method.rounds(config.num_layers, choice.ratio):
        # The head before the first document is done after a round over new rows; what follows it runs again.
        selection += round.cost * (new - HEAD_LEN if round.scope is Scope.NEW else kept + new)
        kept = round.ratio * reused
    recomputed = asked.report.recomputed_tokens
    return {
        "recomputed": round_(recomputed / reused),
        "selection": round_(selection / reused),
        "computed": round_((recomputed + selection + new) / (reused + new)),
    }


def round_(share: float) -> float:
    """Four decimals."""
    return round(share, 4)


def vocabulary(config: ModelConfig) -> int:
    """Upper end of the ids in prompts. Raises BenchError for a model with hardly any."""
    if config.vocab_size <= FIRST_ID:
        raise BenchError(f"vocab_size is {config.vocab_size}: must be above {FIRST_ID}")
    return config.vocab_size
