"""What a prefix group must save to pay for itself, measured on this machine with the model's own heads.

Reading shared keys once costs a second pass over tasks and, on a CPU, partial results that go between the two. How much
that is in keys depends on the device, so it is tried: the shortest prefix at which pairs of sequences are no slower
together than apart. Knows ops and shapes alone. Called by startup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from kvlite.models import ModelConfig
from kvlite.ops import Ops
from kvlite.runner.graphs import CudaRecorder

SPLIT = 256
"""Keys of one split of attention, in every backend: groups share whole ones."""
NEVER = (1 << 31) - 1
"""A cost that no group pays for."""
PREFIXES = (1, 2, 4, 8)
"""Splits that are tried, ascending."""
REPEATS = 9
CUDA_PAIRS = 16
"""Two sequences would leave most of a GPU idle, and its time would be that of a launch."""


@torch.inference_mode()
def measure_group_cost(ops: Ops, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose KV a group must save reading; NEVER where the ops read each sequence's keys anyway.

    On a GPU both ways are replayed, as decode steps are, and timed by its own clock. The first start compiles the
    kernels for this cache; Triton keeps them.
    """
    if not ops.shares_prefixes:
        return NEVER
    is_cuda = device.type == "cuda"
    for splits in PREFIXES:
        ways = _decodes(ops, config, torch.empty(0, dtype=dtype, device=device), splits, CUDA_PAIRS if is_cuda else 1)
        if is_cuda:
            ways = [CudaRecorder(device).record(way) for way in ways]
        best = [math.inf, math.inf]
        for _ in range(REPEATS):
            for n in (1, 0):
                best[n] = min(best[n], _device_seconds(ways[n]) if is_cuda else _seconds(ways[n]))
        apart, together = best
        if together <= apart:
            return (splits - 1) * SPLIT
    return PREFIXES[-1] * SPLIT


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _decodes(
    ops: Ops, config: ModelConfig, like: torch.Tensor, splits: int, num_pairs: int
) -> list[Callable[[], None]]:
    """Attention of pairs of decoding sequences that share `splits` splits and have a key each: apart, and as groups."""
    heads, dim, num_keys, num_seqs = config.num_heads, config.head_dim, splits * SPLIT, 2 * num_pairs
    # A head's vectors lie together in each block, as in the pool.
    cache = like.new_zeros(num_pairs * (splits + 2), 2, config.num_kv_heads, SPLIT, dim).transpose(2, 3)
    q, out = like.new_zeros(num_seqs, heads, dim), like.new_empty(num_seqs, heads, dim)
    lse = like.new_empty(num_seqs, heads, dtype=torch.float32)
    # As wide for every prefix: a kernel is compiled for the splits that a table has room for.
    table = torch.zeros(num_seqs, PREFIXES[-1] + 1, dtype=torch.int32)
    for seq in range(num_seqs):
        table[seq, : splits + 1] = seq // 2 * (splits + 2) + torch.arange(splits + 1)
        table[seq, splits] += seq % 2

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=like.device)

    seqs = list(range(num_seqs))
    apart = partial(
        ops.attention, q, cache[:, 0], cache[:, 1], table.to(like.device), ints([*seqs, num_seqs]),
        ints([num_keys + 1] * num_seqs), ints(seqs), ints([num_keys] * num_seqs), dim**-0.5, 0, out, lse,
    )  # fmt: skip
    groups = ints([value for pair in range(num_pairs) for value in (2 * pair, 2, num_keys)]).view(num_pairs, 3)
    return [apart, partial(apart, groups, ints(seqs))]
