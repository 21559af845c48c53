"""Small paged batches with poison everywhere that no row may look, and a float64 oracle that loops.

Used by the tests of attention, key_mass and store_kv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

NAN = float("nan")
# The interpreter of Triton 3.9 multiplies the bit patterns of bf16 and truncates when it converts to it.
INTERPRETER_DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, NAN, dtype=dtype)


@dataclass(frozen=True)
class Shape:
    """Heads, sizes and element type of one batch; window 0 = none."""

    num_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int = 0


@dataclass(frozen=True)
class Batch:
    """Arguments of `attention`, with the keys and values of each sequence as plain lists beside the cache."""

    shape: Shape
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    seq_row: torch.Tensor
    last_key: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def run(self, ops: Any, *groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out [T, H, D] and lse [T, H] of the batch, poisoned before; on the CPU. `groups` as the op takes them."""
        out, lse = poison(*self.q.shape, dtype=self.q.dtype), poison(*self.q.shape[:2])
        tensors = [self.q, self.k_cache, self.v_cache, self.block_table, self.query_start, self.context_len]
        tensors += [self.seq_row, self.last_key, out, lse, *groups]
        if ops.backend == "triton" and torch.cuda.is_available():
            tensors = [x.cuda() for x in tensors]
        ops.attention(*tensors[:8], self.scale, self.shape.window, *tensors[8:])
        return tensors[8].cpu(), tensors[9].cpu()

    def alone(self, s: int) -> Batch:
        """Sequence s as a batch of its own, in the same cache."""
        first, end = self.query_start[s : s + 2].tolist()
        return replace(
            self,
            q=self.q[first:end],
            last_key=self.last_key[first:end],
            query_start=ints(0, end - first),
            context_len=self.context_len[s : s + 1],
            seq_row=self.seq_row[s : s + 1],
            keys=self.keys[s : s + 1],
            values=self.values[s : s + 1],
        )


def visible(context: int, last: int, window: int) -> range:
    """Indices of the keys that a row may see."""
    return range(max(0, last - window + 1) if window else 0, min(last + 1, context))


def make_batch(shape: Shape, sequences: list[tuple[int, list[int]]], seed: int = 0) -> Batch:
    """One sequence per (context_len, last_key of each row); slots before and after all that any row sees stay NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    blocks = max(1, *(math.ceil(context / shape.block_size) for context, _ in sequences))
    num_blocks = blocks * len(sequences) + 3
    pool = poison(num_blocks, 2, 2, shape.kv_heads, shape.block_size, shape.head_dim, dtype=shape.dtype)
    k_cache, v_cache = pool[:, 1].transpose(2, 3).unbind(1)
    order = torch.randperm(num_blocks - 1, generator=generator)
    block_table = torch.full((len(sequences) + 2, blocks), num_blocks - 1, dtype=torch.int32)
    seq_row = torch.randperm(len(sequences) + 2, generator=generator)[: len(sequences)].to(torch.int32)
    keys, values = [], []
    for s, (context, lasts) in enumerate(sequences):
        used = math.ceil(context / shape.block_size)
        block_table[seq_row[s], :used] = order[s * blocks : s * blocks + used].to(torch.int32)
        k, v = (normal(context, shape.kv_heads, shape.head_dim) for _ in range(2))
        seen = {n for last in lasts for n in visible(context, last, shape.window)}
        for n in range(min(seen, default=0), max(seen, default=-1) + 1):
            block = block_table[seq_row[s], n // shape.block_size]
            k_cache[block, n % shape.block_size], v_cache[block, n % shape.block_size] = k[n], v[n]
        keys.append(k)
        values.append(v)
    lasts = [last for _, rows in sequences for last in rows]
    starts = np.cumsum([0] + [len(rows) for _, rows in sequences]).tolist()
    return Batch(
        shape=shape,
        q=normal(len(lasts), shape.num_heads, shape.head_dim),
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        query_start=ints(*starts),
        context_len=ints(*(context for context, _ in sequences)),
        seq_row=seq_row,
        last_key=ints(*lasts),
        keys=keys,
        values=values,
    )


def oracle(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """out and lse in float64: one loop over rows, heads and keys."""
    shape = batch.shape
    q = batch.q.double().numpy()
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    starts = batch.query_start.tolist()
    for s, (first, end) in enumerate(pairwise(starts)):
        k, v = batch.keys[s].double().numpy(), batch.values[s].double().numpy()
        for m in range(first, end):
            seen = visible(int(batch.context_len[s]), int(batch.last_key[m]), shape.window)
            for h in range(shape.num_heads) if len(seen) else ():
                kv_head = h // (shape.num_heads // shape.kv_heads)
                scores = np.array([float(q[m, h] @ k[n, kv_head]) * batch.scale for n in seen])
                weights = np.exp(scores - scores.max())
                lse[m, h] = scores.max() + math.log(weights.sum())
                out[m, h] = sum(w * v[n, kv_head] for w, n in zip(weights / weights.sum(), seen, strict=True))
    return out, lse
