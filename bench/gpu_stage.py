"""A runner over random weights made on the device, driven by plans written here: `bench gpu` without the core.

Owns one decoder, KV pool, sampler and arena: the engine's own classes, graphs included, so that what is timed is what
an engine runs. What it leaves out is scheduling, which costs microseconds a step (`bench core`). Sequences have blocks
in a shuffled order. Knows no clock and no figure. Called by `gpu_parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvlite.models import FAMILIES, Decoder, ModelConfig
from kvlite.models.config import parse_config
from kvlite.models.decoder import parameters
from kvlite.ops import Ops
from kvlite.runner.graphs import CudaRecorder, graph_sizes
from kvlite.runner.kv_pool import KVPool, KVShape
from kvlite.runner.model_runner import LOGITS_ROWS, ModelRunner, RunResult
from kvlite.runner.plan import Arena, Header, Layout, Plan
from kvlite.runner.sampler import RowSampling, Sampler
from kvlite.types import GenerationDefaults, SamplingParams

from .errors import BenchError
from .make_model import Shape
from .make_model import config as config_values

BLOCK_SIZE = 16
Chunk = tuple[int, int, Sequence[int]]
"""Rows of one sequence: its seq_row, the position of the first row, their ids."""


@dataclass(frozen=True)
class RandomModel:
    """Weights of a shape, joined as the decoder wants them, on one device."""

    values: dict[str, Any]
    """config.json."""
    config: ModelConfig
    params: dict[str, torch.Tensor]

    @classmethod
    def of(cls, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> RandomModel:
        """Equal arguments give equal weights; scales as those of make-model, so that nothing overflows."""
        values = config_values(shape)
        family = FAMILIES[values["architectures"][0]]
        config = parse_config(Path("config.json"), values, family)
        noise = torch.Generator(device).manual_seed(seed)
        params: dict[str, torch.Tensor] = {}
        for param in parameters(config, family.keys):
            tensor = params[param.name] = torch.empty(param.shape, dtype=dtype, device=device)
            if param.name.endswith("norm"):
                tensor.fill_(1)
            else:
                is_small = tensor.ndim == 1 or param.name.startswith(("embedding", "head"))
                tensor.normal_(0, 0.02 if is_small else param.shape[-1] ** -0.5, generator=noise)
        return cls(values, config, params)

    def weights(self) -> dict[str, torch.Tensor]:
        """The same memory under the names of a checkpoint."""
        keys, found = FAMILIES[self.config.architecture].keys, dict[str, torch.Tensor]()
        if self.config.tie_word_embeddings:
            found[keys.head] = self.params["embedding.weight"]
        for param in parameters(self.config, keys):
            parts = torch.split(self.params[param.name], [shape[0] for _, shape in param.parts])
            found |= {name: part for (name, _), part in zip(param.parts, parts, strict=True)}
        return found

    def widened(self) -> RandomModel:
        """A copy in fp32."""
        return replace(self, params={name: tensor.float() for name, tensor in self.params.items()})


@dataclass(frozen=True)
class Room:
    """What a stage must hold."""

    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    kv_tokens: int
    """Over all sequences; blocks filled in part are not counted."""


def rerun(run: Callable[[], object]) -> Callable[[], None]:
    """An `ops.Record` for devices without graphs: a replay calls the function, so all around it is the same."""
    run()

    def replay() -> None:
        run()

    return replay


class Stage:
    """One model, one pool, one arena."""

    def __init__(self, model: RandomModel, ops: Ops, room: Room) -> None:
        c, some = model.config, model.params["norm"]
        self.config, self.device, self.dtype = c, some.device, some.dtype
        decoder = Decoder(c, model.params, max_model_len=room.max_model_len, ops=ops, deterministic=False)
        decoder.reserve(room.max_num_batched_tokens, min(LOGITS_ROWS, room.max_num_seqs))
        shape = KVShape(c.num_layers, BLOCK_SIZE, c.num_kv_heads, c.head_dim, self.dtype)
        self._num_blocks = -(-room.kv_tokens // BLOCK_SIZE) + room.max_num_seqs
        limits = {"max_num_seqs": room.max_num_seqs, "max_model_len": room.max_model_len}
        pool = KVPool(shape, num_blocks=self._num_blocks, **limits, device=self.device)
        # Zeros cost less energy to multiply: a device that is short of power would clock higher than on text.
        pool.data.normal_(generator=torch.Generator(self.device).manual_seed(0))
        sampler = Sampler(
            num_rows=room.max_num_seqs, vocab_size=c.vocab_size, max_logprobs=1, device=self.device, ops=ops
        )
        greedy = SamplingParams(temperature=0).resolved(GenerationDefaults())
        for row in range(room.max_num_seqs):
            sampler.admit(row, RowSampling(greedy, 0, np.zeros(1, np.int32), (), ()))
        self._eager = self._runner = ModelRunner(decoder, pool, sampler)
        layout = Layout.of(
            max_num_batched_tokens=room.max_num_batched_tokens, **limits, block_size=BLOCK_SIZE, max_num_waiting=1
        )
        self._arena = Arena(layout, self.device)
        views = layout.views(torch.from_numpy(self._arena.data))
        self._regions = {name: view.numpy() for name, view in views.items()}
        self._table: NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def record(self) -> None:
        """Decode batches are replayed from now on."""
        record = CudaRecorder(self.device).record if self.device.type == "cuda" else rerun
        self._runner = ModelRunner(self._eager.decoder, self._eager.pool, self._eager.sampler)
        self._runner.record_graphs(record, graph_sizes(self._eager.pool.block_table.shape[0] - 1))

    def lay_out(self, num_seqs: int, length: int) -> None:
        """Gives each of `num_seqs` sequences blocks for `length` tokens, whatever they had before."""
        width = -(-length // BLOCK_SIZE)
        if num_seqs * width > self._num_blocks:
            raise BenchError(
                f"{num_seqs} sequences of {length} tokens need {num_seqs * width} of {self._num_blocks} blocks"
            )
        order = torch.randperm(self._num_blocks, generator=torch.Generator().manual_seed(0))
        table = order[: num_seqs * width].view(num_seqs, width)
        self._eager.pool.block_table[:num_seqs, :width] = table.int().to(self.device)
        self._table = table.numpy()

    def share(self, rows: Sequence[int], num_keys: int) -> None:
        """The sequences `rows` (seq_row) have their first `num_keys` keys, whole blocks, in those of the first."""
        shared = num_keys // BLOCK_SIZE
        self._table[rows, :shared] = self._table[rows[0], :shared]
        self._eager.pool.block_table[list(rows), :shared] = self._eager.pool.block_table[rows[0], :shared].clone()

    def plan(
        self, chunks: Sequence[Chunk], *, sample: bool = True, groups: Sequence[tuple[Sequence[int], int]] = ()
    ) -> Plan:
        """A plan of these rows, in the arena; with `sample` the last row of each sequence gets a token. `groups`:
        sequences, as numbered in `chunks`, and the keys that they share.
        """
        regions, at = self._regions, 0
        regions["header"][:] = 0
        regions["query_start"][0] = 0
        for seq, (row, start, ids) in enumerate(chunks):
            end, positions = at + len(ids), np.arange(start, start + len(ids))
            regions["token_ids"][at:end] = ids
            regions["positions"][at:end] = regions["last_key"][at:end] = positions
            regions["slot_mapping"][at:end] = (
                self._table[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            )
            regions["query_start"][seq + 1] = end
            regions["context_len"][seq] = start + len(ids)
            regions["seq_row"][seq] = row
            regions["sample"][seq] = (end - 1, row, 0)
            at = end
        regions["segment_slot"][:at] = -1
        members = [seq for seqs, _ in groups for seq in seqs]
        regions["group_seqs"][: len(members)] = members
        for n, (seqs, num_keys) in enumerate(groups):
            regions["prefix_group"][n] = (sum(len(some) for some, _ in groups[:n]), len(seqs), num_keys)
        header = {Header.PLAN_ID: 1, Header.NUM_TOKENS: at, Header.NUM_SEQS: len(chunks)}
        header[Header.NUM_PREFIX_GROUPS] = len(groups)
        for field, value in (header | {Header.NUM_SAMPLES: len(chunks) if sample else 0}).items():
            regions["header"][field] = value
        return self._arena.read()

    def run(self, plan: Plan) -> list[int]:
        """Tokens of the sampled rows; when it returns they are on the host. Raises BenchError for a plan that fails."""
        self._carry_out(plan, self._runner)
        return plan.sampled.tolist()

    def logits(self, plan: Plan, *, eager: bool = False) -> torch.Tensor:
        """As `run`, but the raw logits [S, V] fp32 of the sampled rows, on the host; `eager` leaves out the graphs."""
        rows: list[int] = plan.seq_row.tolist()
        runner = self._eager if eager else self._runner
        runner.captured |= set(rows)
        found = self._carry_out(plan, runner).logits
        return torch.stack([found[row] for row in rows])

    def _carry_out(self, plan: Plan, runner: ModelRunner) -> RunResult:
        result = runner.run(self._arena, plan)
        if result.fault is not None:
            raise BenchError(f"the runner failed: {result.fault!r}") from result.fault
        if len(plan.sampled) and plan.sampled.min() < 0:
            raise BenchError(f"row {int(plan.sampled.argmin())} of a plan has no usable logits")
        return result

    def prompt(self, ids: Sequence[int], chunk: int) -> int:
        """The token after a prompt that is computed in chunks, sequence 0."""
        return self.run(self._last_of(ids, chunk))[0]

    def prompt_logits(self, ids: Sequence[int], chunk: int) -> torch.Tensor:
        """As `prompt`, but the logits [V]."""
        return self.logits(self._last_of(ids, chunk))[0]

    def _last_of(self, ids: Sequence[int], chunk: int) -> Plan:
        """Runs all chunks but the last, whose plan it returns."""
        last = (len(ids) - 1) // chunk * chunk
        for start in range(0, last, chunk):
            self.run(self.plan([(0, start, ids[start : start + chunk])], sample=False))
        return self.plan([(0, last, ids[last:])])

    def follow(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, forced: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """(greedy tokens, their logits [num_tokens, V]) of each prompt; with `forced` those tokens are fed instead.

        One more prompt begins with every plan: prompts are computed beside decodes of others.
        """
        self.lay_out(len(prompts), max(map(len, prompts)) + num_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        logits: list[list[torch.Tensor]] = [[] for _ in prompts]
        for turn in range(len(prompts) + num_tokens - 1):
            chunks: list[Chunk] = []
            for row, prompt in enumerate(prompts):
                step = turn - row
                if 0 <= step < num_tokens:
                    fed = tokens if forced is None else forced
                    chunks.append((row, len(prompt) + step - 1, [fed[row][step - 1]]) if step else (row, 0, prompt))
            plan = self.plan(chunks)
            for (row, _, _), found, token in zip(chunks, self.logits(plan), plan.sampled.tolist(), strict=True):
                logits[row].append(found)
                tokens[row].append(token)
        return tokens, [torch.stack(rows) for rows in logits]
