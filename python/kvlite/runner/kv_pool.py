"""`KVPool`: the memory of all KV blocks, the links of reused text, and the device-resident block tables.

Owns the pool tensor `[num_blocks, layers, 2, kv_heads, block_size, head_dim]`, the same in main memory for the host
tier (pinned beside a GPU), the block table `[max_num_seqs + 1, blocks per sequence]` (its last row is reserved for
padding) and the budgets. Decides nothing: the core says which block goes where. Called by model_runner.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvlite.memory import allocate
from kvlite.reuse import NUM_LINKS, ScoreEntry
from kvlite.runner.plan import CopyDirection, Int32, Plan, as_rows
from kvlite.runner.upload import upload

PlaceKv = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(pool, source slots, target slots, positions): `Decoder.place_kv`."""
CPU_CACHE_BYTES_LIMIT = 2 << 30
"""Ceiling of the automatic budget on a CPU: a laptop must stay usable."""
CPU_CACHE_SHARE = 0.25
GPU_CACHE_SHARE = 0.6
HOST_CACHE_SHARE = 0.25
"""Of the free main memory, for the host tier beside a GPU, and no more than so many times the pool."""
HOST_CACHE_POOLS = 4


@dataclass(frozen=True)
class KVShape:
    """What one block of a model holds."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers."""
        values = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return values * self.dtype.itemsize


class KVPool:
    """KV memory of one engine."""

    def __init__(
        self,
        shape: KVShape,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        host_blocks: int = 0,
    ):
        self.shape = shape
        self.num_blocks = num_blocks
        self.host_blocks = host_blocks
        sizes = (shape.num_layers, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        if device.type == "cpu":
            self.data, self.host = allocate([((count, *sizes), shape.dtype) for count in (num_blocks, host_blocks)])
        else:
            self.data = torch.zeros((num_blocks, *sizes), dtype=shape.dtype, device=device)
            self.host = torch.empty((host_blocks, *sizes), dtype=shape.dtype, pin_memory=host_blocks > 0)
        self.links = torch.zeros((num_blocks, shape.block_size, NUM_LINKS), dtype=torch.float32, device=device)
        """By block and offset; of segments and of where they were placed, else 0 (`reuse/links.py`)."""
        blocks_per_seq = -(-max_model_len // shape.block_size)
        self.block_table = torch.zeros((max_num_seqs + 1, blocks_per_seq), dtype=torch.int32, device=device)

    def apply(self, plan: Plan) -> None:
        """Block copies, then changes of the block table: both before anything of this plan is computed or stored."""
        device = self.data.device
        if len(plan.block_copy):
            self._copy_blocks(plan.block_copy)
        if len(plan.block_update):
            updates = upload(plan.block_update, device, torch.int64)
            self.block_table[updates[:, 0], updates[:, 1]] = updates[:, 2].int()
            self.links[updates[:, 2]] = 0

    def _copy_blocks(self, block_copy: Int32) -> None:
        direction = block_copy[:, 0]
        # What goes to the host first: its blocks are given away in this very plan.
        for source, target, length in runs(block_copy[direction == CopyDirection.TO_HOST, 1:]):
            self.host[target : target + length].copy_(self.data[source : source + length], non_blocking=True)
        for source, target, length in runs(block_copy[direction == CopyDirection.FROM_HOST, 1:]):
            self.data[target : target + length].copy_(self.host[source : source + length], non_blocking=True)
        if len(within := block_copy[direction == CopyDirection.ON_DEVICE, 1:]):
            copies = upload(within, self.data.device, torch.int64)
            self.data[copies[:, 1]] = self.data[copies[:, 0]]

    def place(self, plan: Plan, place_kv: PlaceKv) -> None:
        """Copies rows of segments to where sequences use them, keys rotated; after `apply`, before any store."""
        if not len(plan.place):
            return
        device, block_size = self.data.device, self.shape.block_size
        seq_row, start, length, offset, first, _count = plan.place.astype(np.int64).T
        which = np.repeat(np.arange(len(plan.place)), length)
        row = np.arange(len(which)) - np.repeat(np.cumsum(length) - length, length)
        position, source = start[which] + row, offset[which] + row
        source = plan.source_blocks[first[which] + source // block_size] * block_size + source % block_size
        at = upload(np.stack([seq_row[which], position, source]), device)
        target = self.block_table[at[0], at[1] // block_size] * block_size + at[1] % block_size
        place_kv(self.data, at[2].int(), target.int(), at[1].int())
        links = self.links.flatten(0, 1)
        links[target] = links[at[2]]

    def links_of(self, entry: ScoreEntry) -> torch.Tensor:
        """Links of the entry's keys, [keys, 3]."""
        key = torch.arange(entry.keys.start, entry.keys.stop, device=self.links.device)
        size = self.shape.block_size
        return self.links[self.block_table[entry.seq_row, key // size].long(), key % size]


def runs(copies: Int32) -> list[list[int]]:
    """(source, target, length) of the longest runs of `copies` [n, 2] in which both sides go up by one."""
    if not len(copies):
        return []
    copies = copies[np.argsort(copies[:, 0], kind="stable")]
    first = np.flatnonzero(np.append(True, (np.diff(copies, axis=0) != 1).any(axis=1)))
    length = np.diff(np.append(first, len(copies)))
    return as_rows(np.column_stack([copies[first], length]).astype(np.int32))


def host_budget_bytes(wanted: int | None, pool_bytes: int, device: torch.device) -> int:
    """Bytes for the host tier. On a CPU none unless asked for: a larger pool uses the same memory without copies."""
    if wanted is not None:
        return wanted
    if device.type == "cpu":
        return 0
    return min(HOST_CACHE_POOLS * pool_bytes, int(available_memory_bytes() * HOST_CACHE_SHARE))


def cache_budget_bytes(wanted: int | None, device: torch.device) -> int:
    """Bytes for the pool: as configured, else a share of what is free now."""
    if wanted is not None:
        return wanted
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free * GPU_CACHE_SHARE)
    return min(int(available_memory_bytes() * CPU_CACHE_SHARE), CPU_CACHE_BYTES_LIMIT)


def available_memory_bytes() -> int:
    """Main memory that may still be taken: the system's estimate, or the container's limit where that is lower."""
    available = 4 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        return available
    return available
