"""Engines over tiny random models with the shipped tokenizer, for tests of everything above the decoder."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvlite import Engine, RequestOutput, SamplingParams
from tests.models.make import make

SHIPPED = Path(__file__).parent.parent / "python" / "kvlite" / "model"
VOCAB = 1394
MAX_LEN = 256
SMALL: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_num_waiting": 64,
    "kv_cache_bytes": 16 << 20,
    "dtype": "float32",
    "device": "cpu",
    # Several test processes share few cores, and the work is tiny.
    "num_threads": 1,
}
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def tiny(name: str = "llama2") -> Path:
    """Directory of a random model of the family `name` with a tokenizer; made once per test run."""
    folder = Path(_FOLDER.name) / name
    make(name, folder, vocab_size=VOCAB, max_position_embeddings=MAX_LEN, eos_token_id=6)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / file, folder / file)
    return folder


def engine(name: str = "llama2", **overrides: Any) -> Engine:
    """A small engine over `tiny(name)`."""
    return Engine(tiny(name), **(SMALL | overrides))


def ids(num_tokens: int, seed: int = 0) -> list[int]:
    """A random prompt without special tokens."""
    return torch.randint(8, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def pool_of(engine_blocks: int, name: str = "llama2") -> int:
    """kv_cache_bytes for so many blocks of 16 tokens in fp32."""
    with engine(name) as probe:
        return engine_blocks * probe.startup.kv_cache_bytes // probe.startup.num_blocks


def essence(output: RequestOutput) -> Any:
    """Everything of an output that must not depend on how it was computed."""
    return output.prompt_logprobs, [
        (choice.text, choice.token_ids, choice.logprobs, choice.finish_reason) for choice in output.outputs
    ]


def alone(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Any]:
    """Each request by itself."""
    return [essence(engine.generate(prompt, one)) for prompt, one in zip(prompts, params, strict=True)]


def together(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Any]:
    """All requests at once."""
    return [essence(output) for output in engine.generate(list(prompts), list(params))]


def single(params: SamplingParams) -> SamplingParams:
    """The same with one choice."""
    return replace(params, n=1)
