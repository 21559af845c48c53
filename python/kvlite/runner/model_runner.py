"""`ModelRunner`: carries out one plan: block changes, forward pass, logits of the sampled rows, sampling, the answer.

Owns the KV pool, the sampler's tables and the last token of every row; decides nothing. A row without usable logits
ends that row's request; an exception ends the plan, and the engine goes on. Called by engine.py once per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvlite.models import Decoder, ForwardBatch
from kvlite.runner.kv_pool import KVPool
from kvlite.runner.plan import Arena, Plan, Status
from kvlite.runner.sampler import RawLogprobs, Sampler

LOGITS_ROWS = 256
"""Rows of logits at once: bounds memory when a long prompt asks for log-probabilities."""


@dataclass(frozen=True)
class RunResult:
    """What a run gave beside the ids in the arena."""

    logprobs: dict[int, RawLogprobs]
    """By index of the sample row."""
    fault: Exception | None = None
    """Why the plan failed, if it did."""


class ModelRunner:
    """One model on one device, with its KV pool and sampler."""

    def __init__(self, decoder: Decoder, pool: KVPool, sampler: Sampler) -> None:
        self.decoder = decoder
        self.pool = pool
        self.sampler = sampler
        rows = pool.block_table.shape[0]
        self._last_token = torch.zeros(rows, dtype=torch.int32, device=decoder.device)

    def run(self, arena: Arena, plan: Plan) -> RunResult:
        """Computes `plan`, which lies in `arena`, and completes it there. Never raises an Exception."""
        try:
            logprobs = self._run(arena, plan)
        except Exception as error:  # a fault of a step ends that batch, not the engine
            arena.complete(plan.plan_id, Status.FAILED)
            return RunResult({}, error)
        arena.complete(plan.plan_id, Status.OK)
        return RunResult(logprobs)

    @torch.inference_mode()
    def _run(self, arena: Arena, plan: Plan) -> dict[int, RawLogprobs]:
        self.pool.apply(plan)
        arena.upload()
        hidden = self.decoder.forward(self._batch(arena, plan), self.pool.data)
        logprobs: dict[int, RawLogprobs] = {}
        for start in range(0, len(plan.sample), LOGITS_ROWS):
            part = plan.sample[start : start + LOGITS_ROWS]
            rows, seq_rows, kinds = part[:, 0], part[:, 1], part[:, 2]
            picked = torch.tensor(rows, dtype=torch.int64, device=hidden.device)
            logits = self.decoder.logits(hidden[picked])
            sampled = self.sampler.sample(logits, seq_rows, kinds, plan.last_key[rows])
            plan.sampled[start : start + len(part)] = sampled.tokens
            logprobs |= {start + n: found for n, found in sampled.logprobs.items()}
        self._remember(plan)
        return logprobs

    def _batch(self, arena: Arena, plan: Plan) -> ForwardBatch:
        tokens, seqs = plan.num_tokens, plan.num_seqs
        views = arena.tensors
        token_ids = views["token_ids"][:tokens]
        ahead = np.flatnonzero(plan.token_ids < 0)
        if len(ahead):
            seq = np.searchsorted(plan.query_start, ahead, side="right") - 1
            where = torch.tensor(ahead, device=token_ids.device)
            rows = torch.tensor(plan.seq_row[seq], dtype=torch.int64, device=token_ids.device)
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
        )

    def _remember(self, plan: Plan) -> None:
        """Keeps the sampled ids on the device for a plan that is made before they are committed."""
        if len(plan.sample):
            rows = torch.tensor(plan.sample[:, 1], dtype=torch.int64, device=self._last_token.device)
            self._last_token[rows] = torch.tensor(np.maximum(plan.sampled, 0), device=self._last_token.device)
