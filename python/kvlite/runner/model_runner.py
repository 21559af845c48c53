"""`ModelRunner`: carries out one plan: block changes, places, forward pass, scores, logits of sampled rows, samples.

Owns the KV pool, the sampler's tables, the reuse methods by number, the last token of every row and, on a GPU, the
graphs of decode batches; decides nothing. A row without usable logits ends that row's request; an exception ends the
plan, and the engine goes on. Called by engine.py once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kvlite.models import Decoder, ForwardBatch, Probe, rows_to_the_end
from kvlite.ops import Record
from kvlite.reuse import LinkProbe, MethodTable, ScoreEntry, Tools
from kvlite.runner.graphs import DecodeGraphs
from kvlite.runner.kv_pool import KVPool
from kvlite.runner.plan import Arena, Int32, Plan, SampleKind, Status, as_rows
from kvlite.runner.sampler import RawLogprobs, Sampler
from kvlite.runner.upload import upload

LOGITS_ROWS = 256
"""Rows of logits at once: bounds memory when a long prompt asks for log-probabilities."""


@dataclass(frozen=True)
class RunResult:
    """What a run gave beside the ids in the arena."""

    logprobs: dict[int, RawLogprobs]
    """By index of the sample row."""
    fault: Exception | None = None
    """Why the plan failed, if it did."""
    logits: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    """By seq_row: raw logits [V] fp32 on the CPU of a row that was in `ModelRunner.captured`."""


class ModelRunner:
    """One model on one device, with its KV pool and sampler."""

    def __init__(self, decoder: Decoder, pool: KVPool, sampler: Sampler, *, canonical_len: int = 0) -> None:
        self.decoder = decoder
        self.pool = pool
        self.sampler = sampler
        self.canonical_len = canonical_len
        """Rows of the canonical prefix, which every segment is computed behind."""
        self.methods = MethodTable()
        """What the method ids of score rows mean."""
        self.captured: set[int] = set()
        """Sequences (seq_row) whose next logits are wanted; a row leaves when they are handed out."""
        rows = pool.block_table.shape[0]
        self._last_token = torch.zeros(rows, dtype=torch.int32, device=decoder.device)
        self._graphs: DecodeGraphs | None = None

    def record_graphs(
        self, record: Record, sizes: Sequence[int], *, lazily: bool = False, grouped: bool = True
    ) -> None:
        """Decode batches of up to the largest of `sizes` rows, ascending, are replayed from now on; after
        `Decoder.reserve`, before the first plan. `lazily`: each is recorded when it is first needed. `grouped`: plans
        may have prefix groups.
        """
        self._graphs = DecodeGraphs(
            self.decoder, self.pool, self._last_token, record, sizes, lazily=lazily, grouped=grouped
        )

    def run(self, arena: Arena, plan: Plan) -> RunResult:
        """Computes `plan`, which lies in `arena`, and completes it there. Never raises an Exception."""
        try:
            result = self._run(arena, plan)
        except Exception as error:  # a fault of a step ends that batch, not the engine
            arena.complete(plan.plan_id, Status.FAILED)
            return RunResult({}, error)
        arena.complete(plan.plan_id, Status.OK)
        return result

    @torch.inference_mode()
    def _run(self, arena: Arena, plan: Plan) -> RunResult:
        self.pool.apply(plan)
        self.pool.place(plan, self.decoder.place_kv)
        scoring, making = self._probes(plan), self._makers(plan)
        hidden = None if self._graphs is None else self._graphs.forward(plan)
        if hidden is None:
            arena.upload()
            hidden = self.decoder.forward(self._batch(arena, plan), self.pool.data, [*scoring, *making])
        result = self._sample(plan, hidden, rows_to_the_end(scoring, plan.num_tokens))
        _answer(plan, scoring)
        for probe in making:
            slots = plan.segment_slot[probe.rows.start : probe.rows.stop]
            self.pool.links.flatten(0, 1)[upload(slots, hidden.device, torch.int64)] = probe.links()
        self._remember(plan)
        if not len(plan.sample) and hidden.device.type == "cuda":
            # Sampled ids were waited for. Without any, the device may still read the arena, which the core overwrites.
            torch.cuda.current_stream(hidden.device).synchronize()
        return result

    def _sample(self, plan: Plan, hidden: torch.Tensor, kept: NDArray[np.int64] | None) -> RunResult:
        """`kept`: the rows of the plan that `hidden` has, None = all."""
        result = RunResult({})
        for start in range(0, len(plan.sample), LOGITS_ROWS):
            part = plan.sample[start : start + LOGITS_ROWS]
            rows, seq_rows, kinds = part[:, 0], part[:, 1], part[:, 2]
            where = rows if kept is None else np.searchsorted(kept, rows)
            logits = self.decoder.logits(hidden[upload(where, hidden.device, torch.int64)])
            if self.captured:
                self._capture(seq_rows, kinds, logits, result)
            sampled = self.sampler.sample(logits, seq_rows, kinds, plan.last_key[rows])
            plan.sampled[start : start + len(part)] = sampled.tokens
            result.logprobs.update({start + n: found for n, found in sampled.logprobs.items()})
        return result

    def _capture(self, seq_rows: Int32, kinds: Int32, logits: torch.Tensor, result: RunResult) -> None:
        for n in np.flatnonzero(kinds == SampleKind.SAMPLE):
            seq_row = int(seq_rows[n])
            if seq_row in self.captured:
                self.captured.remove(seq_row)
                result.logits[seq_row] = logits[n].cpu().float().clone()

    def _probes(self, plan: Plan) -> list[Probe]:
        probes: list[Probe] = []
        tools = Tools(self.decoder.key_mass, self.pool.links_of)
        for seq, first, count, start, end, method_id, number in as_rows(plan.score):
            entry = ScoreEntry(range(first, first + count), int(plan.seq_row[seq]), range(start, end), number)
            probes.append(self.methods[method_id].probe(entry, tools))
        return probes

    def _makers(self, plan: Plan) -> list[LinkProbe]:
        """One per sequence that makes a segment: its rows that are part of it, the last ones."""
        making = np.flatnonzero(plan.segment_slot >= 0)
        if not len(making):
            return []
        seqs = np.searchsorted(plan.query_start, making, side="right") - 1
        probes: list[LinkProbe] = []
        for seq in np.unique(seqs):
            rows = making[seqs == seq]
            start, end = int(plan.positions[rows[0]]), int(plan.positions[rows[-1]])
            where = range(int(rows[0]), int(rows[-1]) + 1)
            probes.append(LinkProbe(where, int(plan.seq_row[seq]), self.canonical_len, range(start, end + 1)))
        return probes

    def _batch(self, arena: Arena, plan: Plan) -> ForwardBatch:
        tokens, seqs = plan.num_tokens, plan.num_seqs
        views = arena.tensors
        token_ids = views["token_ids"][:tokens]
        ahead = np.flatnonzero(plan.token_ids < 0)
        if len(ahead):
            seq = np.searchsorted(plan.query_start, ahead, side="right") - 1
            where = upload(ahead, token_ids.device)
            rows = upload(plan.seq_row[seq], token_ids.device, torch.int64)
            token_ids = token_ids.index_put((where,), self._last_token[rows])
        return ForwardBatch(
            token_ids=token_ids,
            positions=views["positions"][:tokens],
            last_key=views["last_key"][:tokens],
            slot_mapping=views["slot_mapping"][:tokens],
            query_start=views["query_start"][: seqs + 1],
            context_len=views["context_len"][:seqs],
            seq_row=views["seq_row"][:seqs],
            block_table=self.pool.block_table,
            prefix_group=views["prefix_group"][: len(plan.prefix_group)] if len(plan.prefix_group) else None,
            group_seqs=views["group_seqs"][:seqs] if len(plan.prefix_group) else None,
            segment_slot=views["segment_slot"][:tokens] if (plan.segment_slot >= 0).any() else None,
        )

    def _remember(self, plan: Plan) -> None:
        """Keeps the sampled ids on the device for a plan that is made before they are committed."""
        if len(plan.sample):
            device = self._last_token.device
            self._last_token[upload(plan.sample[:, 1], device, torch.int64)] = upload(
                np.maximum(plan.sampled, 0), device
            )


def _answer(plan: Plan, probes: list[Probe]) -> None:
    """Writes weight and value of every key that was scored, in the order of the score rows."""
    at = 0
    for probe in probes:
        weight, value = probe.result()
        plan.scored[at : at + len(weight), 0] = weight.cpu().numpy()
        plan.scored[at : at + len(weight), 1] = value.cpu().numpy()
        at += len(weight)
