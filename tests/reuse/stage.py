"""A runner over a tiny random model, driven by plans that a test writes by hand: the core without its decisions.

Sequences have blocks in a shuffled order in a pool full of NaN; segments lie in blocks of the same pool.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvlite import SamplingParams
from kvlite.models import Decoder, load_model
from kvlite.ops import select
from kvlite.reuse import ReuseMethod
from kvlite.runner.kv_pool import KVPool, KVShape
from kvlite.runner.model_runner import ModelRunner, RunResult
from kvlite.runner.plan import Arena, Header, Layout
from kvlite.runner.sampler import RowSampling, Sampler
from kvlite.types import GenerationDefaults
from tests.models.alone import rows_alone
from tests.models.make import make
from tests.reuse.conftest import INTERPRETED

MAX_LEN = 96
BLOCK_SIZE = 4
NUM_ROWS = 6
SEGMENT_BLOCKS = 40
PREFIX = [1, 7]
"""The canonical prefix of these tests."""
TINY: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48}
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def checkpoint(name: str) -> tuple[Path, PreTrainedModel]:
    """A tiny model of a family, on disk and in transformers."""
    folder = Path(_FOLDER.name) / name
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if INTERPRETED else {}
    changes = TINY | heads | ({"sliding_window": 9} if "window" in name or name == "mistral" else {})
    return folder, make(name, folder, **changes)


@functools.cache
def decoder(name: str, backend: str, deterministic: bool = True) -> Decoder:
    """The same model, loaded; the references compute attention row by row where bits matter."""
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    return load_model(
        checkpoint(name)[0], device=device, dtype=torch.float32, max_model_len=MAX_LEN,
        ops=rows_alone() if backend == "reference" and deterministic else select(device, backend),
        deterministic=deterministic,
    )  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """Where KV before RoPE lies."""

    ids: list[int]
    blocks: list[int]


@dataclass(frozen=True)
class Rows:
    """Some rows of one sequence in a plan."""

    row: int
    positions: Sequence[int]
    ids: Sequence[int]
    """One per position."""
    sample: bool = False
    into: Segment | None = None
    """A segment that the last rows make, from its row `into_from` on."""
    into_from: int = 0
    score: tuple[ReuseMethod, Sequence[int], range, int] | None = None
    """method, scoring rows as indices into `positions`, keys, round."""
    last_keys: Sequence[int] | None = None
    """Where they differ from the positions."""


@dataclass(frozen=True)
class Place:
    """Rows [offset, offset + length) of a segment go to `position` of a sequence."""

    row: int
    position: int
    segment: Segment
    offset: int = 0
    length: int | None = None


@dataclass
class Answer:
    """What came of one plan."""

    result: RunResult
    tokens: list[int]
    """Sampled, in the order of the plan."""
    scores: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """(weight, value) of each score row."""


class Stage:
    """Pool, sampler, runner and arena over one decoder."""

    def __init__(self, decoder: Decoder, *, seed: int = 0) -> None:
        c, device = decoder.config, decoder.device
        shape = KVShape(c.num_layers, BLOCK_SIZE, c.num_kv_heads, c.head_dim, decoder.dtype)
        per_seq = MAX_LEN // BLOCK_SIZE
        num_blocks = NUM_ROWS * per_seq + SEGMENT_BLOCKS
        self.pool = KVPool(shape, num_blocks=num_blocks, max_num_seqs=NUM_ROWS, max_model_len=MAX_LEN, device=device)
        self.pool.data.fill_(float("nan"))
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
        self.pool.block_table[:NUM_ROWS] = order[SEGMENT_BLOCKS:].view(NUM_ROWS, per_seq)
        self._free: list[int] = order[:SEGMENT_BLOCKS].tolist()
        sampling = select(device, "reference")
        sampler = Sampler(num_rows=NUM_ROWS, vocab_size=c.vocab_size, max_logprobs=1, device=device, ops=sampling)
        greedy = SamplingParams(temperature=0).resolved(GenerationDefaults())
        for row in range(NUM_ROWS):
            sampler.admit(row, RowSampling(greedy, 0, np.array([3], np.int32), (), ()))
        self.runner = ModelRunner(decoder, self.pool, sampler, canonical_len=len(PREFIX))
        layout = Layout.of(
            max_num_batched_tokens=256, max_num_seqs=NUM_ROWS, max_model_len=MAX_LEN, block_size=BLOCK_SIZE,
            max_num_waiting=1,
        )  # fmt: skip
        self.arena = Arena(layout, device)
        self._regions = {
            name: self.arena.data[at : at + int(np.prod(layout.shapes[name]))].reshape(layout.shapes[name])
            for name, at in layout.offsets.items()
        }
        self._plan_id = 0

    def run(self, rows: Iterable[Rows], places: Iterable[Place] = ()) -> Answer:
        """One plan."""
        self._regions["header"][:] = 0
        self._regions["query_start"][0] = 0
        for one in rows:
            self._write_rows(one)
        for place in places:
            self._write_place(place)
        self._plan_id += 1
        self._regions["header"][Header.PLAN_ID] = self._plan_id
        plan = self.arena.read()
        plan.scored[:] = np.nan
        result = self.runner.run(self.arena, plan)
        if result.fault is not None:
            raise result.fault
        assert not len(plan.sampled) or plan.sampled.min() >= 0, "a row had no usable logits"
        scores, at = [], 0
        for _, _, _, start, end, *_ in plan.score.tolist():
            weight, value = plan.scored[at : at + end - start].T.copy()
            scores.append((weight, value))
            at += end - start
        return Answer(result, plan.sampled.tolist(), scores)

    def _count(self, header: Header, by: int) -> int:
        before = int(self._regions["header"][header])
        self._regions["header"][header] += by
        return before

    def _write_rows(self, one: Rows) -> None:
        regions, n = self._regions, len(one.positions)
        first, seq = self._count(Header.NUM_TOKENS, n), self._count(Header.NUM_SEQS, 1)
        at = slice(first, first + n)
        last_keys = list(one.positions if one.last_keys is None else one.last_keys)
        regions["token_ids"][at], regions["positions"][at], regions["last_key"][at] = one.ids, one.positions, last_keys
        regions["slot_mapping"][at] = self.slots(one.row, last_keys)
        regions["segment_slot"][at] = -1
        if one.into is not None:
            made = range(one.into_from, min(len(one.into.ids), one.into_from + n))
            slots = [one.into.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in made]
            regions["segment_slot"][first + n - len(slots) : first + n] = slots
        regions["query_start"][seq + 1] = first + n
        regions["context_len"][seq] = max(last_keys) + 1
        regions["seq_row"][seq] = one.row
        if one.sample:
            regions["sample"][self._count(Header.NUM_SAMPLES, 1)] = (first + n - 1, one.row, 0)
        if one.score is not None:
            method, scoring, keys, number = one.score
            entry = (seq, first + scoring[0], len(scoring), keys.start, keys.stop, self.runner.methods.intern(method))
            regions["score"][self._count(Header.NUM_SCORES, 1)] = (*entry, number)

    def _write_place(self, place: Place) -> None:
        length = len(place.segment.ids) - place.offset if place.length is None else place.length
        count = len(place.segment.blocks)
        first = self._count(Header.NUM_SOURCE_BLOCKS, count)
        self._regions["source_blocks"][first : first + count] = place.segment.blocks
        at = self._count(Header.NUM_PLACES, 1)
        self._regions["place"][at] = (place.row, place.position, length, place.offset, first, count)

    def slots(self, row: int, keys: Iterable[int]) -> list[int]:
        """Where the keys of a sequence lie."""
        blocks = self.pool.block_table[row].tolist()
        return [blocks[key // BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE for key in keys]

    def kv(self, row: int, keys: Iterable[int]) -> torch.Tensor:
        """A copy of keys and values, [layers, 2, n, KH, D]."""
        slots = torch.tensor(self.slots(row, keys), device=self.pool.data.device)
        return self.pool.data[slots // BLOCK_SIZE, :, :, :, slots % BLOCK_SIZE].permute(1, 2, 0, 3, 4).clone()

    def stored(self, segment: Segment) -> torch.Tensor:
        """A copy of a segment's keys before RoPE, and values, [layers, 2, n, KH, D]."""
        kv = self.pool.data[torch.tensor(segment.blocks, device=self.pool.data.device)]
        return kv.permute(1, 2, 0, 4, 3, 5).flatten(2, 3)[:, :, : len(segment.ids)].clone()

    def links(self, row: int, keys: Iterable[int]) -> torch.Tensor:
        """A copy of a sequence's links, [n, 3]."""
        return self.pool.links.flatten(0, 1)[self.slots(row, keys)].cpu()

    def segment(self, ids: list[int]) -> Segment:
        """Blocks for a segment that a plan will make."""
        count = -(-len(ids) // BLOCK_SIZE)
        taken, self._free = self._free[:count], self._free[count:]
        return Segment(ids, taken)

    def make(self, ids: list[int], *, row: int = NUM_ROWS - 1, prefix: Sequence[int] = PREFIX) -> Segment:
        """A segment computed alone behind the canonical prefix, in a sequence of its own."""
        segment = self.segment(ids)
        tokens = [*prefix, *ids]
        self.run([Rows(row, range(len(tokens)), tokens, into=segment)])
        return segment

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Answer:
        """tokens[start:] at their positions, sampled."""
        return self.run([Rows(row, range(start, len(tokens)), tokens[start:], sample=True)])
