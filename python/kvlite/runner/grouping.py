"""What a prefix group must save to pay for itself, measured on this machine with the model's own heads.

Reading shared keys once costs a second pass over tasks, and partial results that go between the two. How much that is
in keys depends on threads, caches and instruction set, so it is tried: the shortest prefix at which two sequences are
no slower together than apart. Knows ops and shapes alone. Called by startup.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from kvlite.models import ModelConfig
from kvlite.ops import Ops

SPLIT = 256
"""Keys of one split of attention, in every backend: groups share whole ones."""
NEVER = (1 << 31) - 1
"""A cost that no group pays for."""
PREFIXES = (1, 2, 4, 8)
"""Splits that are tried, ascending."""
REPEATS = 9


@torch.inference_mode()
def measure_group_cost(ops: Ops, config: ModelConfig, dtype: torch.dtype) -> int:
    """Tokens whose KV a group must save reading; NEVER where the ops read each sequence's keys anyway."""
    if not ops.shares_prefixes:
        return NEVER
    for splits in PREFIXES:
        apart, together = _decodes(ops, config, dtype, splits * SPLIT)
        best: dict[Callable[[], None], float] = {}
        for _ in range(REPEATS):
            for run in (together, apart):
                start = time.perf_counter()
                run()
                best[run] = min(best.get(run, start), time.perf_counter() - start)
        if best[together] <= best[apart]:
            return (splits - 1) * SPLIT
    return PREFIXES[-1] * SPLIT


def _decodes(
    ops: Ops, config: ModelConfig, dtype: torch.dtype, num_keys: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Attention of two decoding sequences that share `num_keys` keys and have one each: apart, and as a group."""
    heads, dim = config.num_heads, config.head_dim
    splits = num_keys // SPLIT
    cache = torch.zeros(splits + 2, 2, SPLIT, config.num_kv_heads, dim, dtype=dtype)
    q, out, lse = (
        torch.zeros(2, heads, dim, dtype=dtype),
        torch.empty(2, heads, dim, dtype=dtype),
        torch.empty(2, heads),
    )
    table = torch.arange(splits + 1, dtype=torch.int32).repeat(2, 1)
    table[1, splits] += 1

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    apart = partial(
        ops.attention, q, cache[:, 0], cache[:, 1], table, ints(0, 1, 2), ints(num_keys + 1, num_keys + 1), ints(0, 1),
        ints(num_keys, num_keys), dim**-0.5, 0, out, lse,
    )  # fmt: skip
    return apart, partial(apart, ints(0, 2, num_keys).view(1, 3), ints(0, 1))
