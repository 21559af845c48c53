"""Requests for tests of moves, and what a lone engine answers to them: the oracle of every stream.

Owns a tiny random model with room for long streams, made once per test run. All asks bring their seeds, so an engine of
its own, in deterministic mode, gives the very tokens that any fleet must give.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvlite import Engine, SamplingParams
from kvlite.config import EngineConfig
from tests.engines import SHIPPED, VOCAB, essence, ids
from tests.fleet.faults import Ask
from tests.models.make import make

MAX_LEN = 1024
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_num_waiting": 64,
    "kv_cache_bytes": 24 << 20,
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "deterministic": True,
}
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def model() -> Path:
    """Directory of the model."""
    folder = Path(_FOLDER.name) / "llama2"
    make("llama2", folder, vocab_size=VOCAB, max_position_embeddings=MAX_LEN, eos_token_id=6)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / file, folder / file)
    return folder


def config(**changes: Any) -> EngineConfig:
    """Of every engine of a fleet."""
    return EngineConfig(model=str(model()), **(SETTINGS | changes))


def subject(number: int, num_tokens: int = 160) -> Ask:
    """A request that nothing else begins like, long enough to be moved."""
    params = SamplingParams(temperature=0.9, seed=number, max_tokens=num_tokens, ignore_eos=True, n=1 + number % 2)
    return Ask(tuple(ids(90 + number % 40, seed=1000 + number)), params)


def neighbours() -> list[Ask]:
    """Requests of every kind, a few hundred tokens each."""
    common = SamplingParams(temperature=0.8, max_tokens=80, ignore_eos=True)
    kinds = [
        replace(common, temperature=0.0),
        replace(common, n=3, max_tokens=60),
        replace(common, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1),
        replace(common, logprobs=3, min_tokens=20),
        replace(common, prompt_logprobs=2, top_k=20, logit_bias={20: 2.0}),
        replace(common, ignore_eos=False, top_p=0.9),
        replace(common, stop=("\x00",)),
    ]
    asks = [
        Ask(tuple(ids(30 + 17 * number, seed=number)), replace(kind, seed=7 + number))
        for number, kind in enumerate(kinds)
    ]
    return [*asks[:-1], stopping(asks[-1])]


def stopping(ask: Ask) -> Ask:
    """The same with a stop string that comes after about two thirds of its text."""
    text = oracle.engine.generate(list(ask.prompt), ask.params).outputs[0].text
    at = len(text) * 2 // 3
    return replace(ask, params=replace(ask.params, stop=(text[at : at + 5],)))


class Oracle:
    """Answers of a lone engine, each computed once."""

    def __init__(self) -> None:
        self._answers: dict[int, Any] = {}
        self._asks: list[Ask] = []

    @functools.cached_property
    def engine(self) -> Engine:
        """The lone engine."""
        return Engine(model(), **SETTINGS)

    def learn(self, asks: Sequence[Ask]) -> None:
        """Computes what is not known; before a fleet runs, whose event loop would stand still meanwhile."""
        new = [ask for ask in asks if id(ask) not in self._answers]
        if not new:
            return
        outputs = self.engine.generate([list(ask.prompt) for ask in new], [ask.params for ask in new])
        for ask, output in zip(new, outputs, strict=True):
            self._answers[id(ask)] = essence(output)
            self._asks.append(ask)

    def answer(self, ask: Ask) -> Any:
        """As tests.engines.essence."""
        return self._answers[id(ask)]


oracle = Oracle()
