"""An engine in this process, for `decode` and `prefill`: opening it, the correctness gate, timed steps, kernel time.

Owns no figure of its own. The gate compares greedy tokens with transformers' on the same directory and element type
(peer.py says what agreement is).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvlite import Engine, SamplingParams
from kvlite.models import ModelConfig, load_config
from kvlite.ops import Ops

from . import peer
from .errors import BenchError
from .limits import kv_bytes_per_token
from .options import torch_dtype

GATE_PROMPT_LEN = 24
GATE_TOKENS = 16
SPECIAL_IDS = 16
"""Ids below are special in every tokenizer that make-model writes, and in the shipped one."""


@dataclass(frozen=True)
class Setup:
    """One engine to measure."""

    directory: Path
    dtype: str
    threads: int
    max_num_seqs: int
    kv_tokens: int
    """Room in the KV cache, tokens, blocks filled in part not counted."""


@contextmanager
def opened(setup: Setup) -> Generator[Engine]:
    """An engine with the settings that ship, but for its size."""
    config, _family = load_config(setup.directory)
    dtype = torch_dtype(setup.dtype)
    room = setup.kv_tokens + 64 * (setup.max_num_seqs + 1)
    with Engine(
        str(setup.directory),
        device="cpu",
        dtype=str(dtype).removeprefix("torch."),
        num_threads=setup.threads,
        max_num_seqs=setup.max_num_seqs,
        kv_cache_bytes=room * kv_bytes_per_token(config, dtype),
    ) as engine:
        yield engine


def prompts(config: ModelConfig, count: int, length: int, seed: int) -> list[list[int]]:
    """Random ids; two prompts share no first block."""
    draw = random.Random(seed)
    return [[draw.randrange(SPECIAL_IDS, config.vocab_size) for _ in range(length)] for _ in range(count)]


def greedy(num_tokens: int) -> SamplingParams:
    """So many tokens, the most likely ones, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def gate(engine: Engine, transformers: Any, config: ModelConfig) -> int:
    """Greedy tokens of a short prompt must be those of transformers; returns how many were compared."""
    prompt = prompts(config, 1, GATE_PROMPT_LEN, seed=9)[0]
    tokens = list(engine.generate(prompt, greedy(GATE_TOKENS)).token_ids)
    peer.check_tokens(tokens, peer.logits_after(transformers, prompt, tokens), transformers.dtype)
    if len(tokens) != GATE_TOKENS:
        raise BenchError(f"the engine gave {len(tokens)} of {GATE_TOKENS} tokens")
    return len(tokens)


class KernelClock:
    """Seconds spent inside ops, matrix products among them, between `reset` and `stop`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._runs = True

    def reset(self) -> None:
        """Starts over."""
        self.seconds, self._runs = 0.0, True

    def stop(self) -> None:
        """Counts nothing until `reset`."""
        self._runs = False

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = run(*arguments, **named)
            if self._runs:
                self.seconds += time.perf_counter() - start
            return result

        return timed

    def ops(self, ops: Ops) -> Ops:
        """Every op, timed; of recorded ones, the replay as a whole."""
        timed = {n: self.around(v) for n in ops.__dataclass_fields__ if callable(v := getattr(ops, n))}
        if (record := ops.record) is not None:
            timed["record"] = lambda run: self.around(record(run))
        return replace(ops, **timed)


def decode_steps(engine: Engine, batch: list[list[int]], num_steps: int, clock: KernelClock) -> list[float]:
    """Seconds of each of `num_steps` steps in which every sequence decodes one token; `clock` runs meanwhile."""
    engine.clear_cache()
    handles = [engine.add(prompt, greedy(num_steps + len(batch) + 4)) for prompt in batch]
    started: set[int] = set()
    while len(started) < len(batch):
        started |= {delta.handle for delta in engine.step() if delta.token_ids}
    engine.step()
    clock.reset()
    times: list[float] = []
    for _ in range(num_steps):
        start = time.perf_counter()
        deltas = engine.step()
        times.append(time.perf_counter() - start)
        count = sum(len(delta.token_ids) for delta in deltas)
        if count != len(batch):
            raise BenchError(f"a decode step of {len(batch)} sequences gave {count} tokens")
    clock.stop()
    drain(engine, handles)
    return times


def prefill_s(engine: Engine, prompt: list[int]) -> float:
    """Seconds from adding a prompt that the cache does not know to its first token."""
    engine.clear_cache()
    start = time.perf_counter()
    handle = engine.add(prompt, greedy(1))
    while True:
        deltas = engine.step()
        if any(delta.handle == handle and delta.token_ids for delta in deltas):
            elapsed = time.perf_counter() - start
            break
    usage = next((delta.usage for delta in deltas if delta.usage is not None), None)
    if usage is None or usage.cached_tokens:
        raise BenchError(f"a cold prompt ended with {usage}")
    drain(engine, [handle])
    return elapsed


def drain(engine: Engine, handles: list[int]) -> None:
    """Ends what still runs."""
    for handle in handles:
        engine.abort(handle)
    while engine.num_unfinished:
        engine.step()


@contextmanager
def kernel_clock() -> Generator[KernelClock]:
    """Engines that are opened inside run under a KernelClock; one timer costs well under a microsecond."""
    from kvlite import startup

    clock = KernelClock()
    select = startup.select
    startup.select = lambda *arguments: clock.ops(select(*arguments))
    try:
        yield clock
    finally:
        startup.select = select
