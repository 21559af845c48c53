"""`KVCopier`: blocks of an engine's KV pool as bytes, out to a link and in from one.

Owns no memory but its staging; decides nothing: the core holds the blocks that are read and the places that are
written. On a CPU a block is read where it lies. Links between rows of reused text (`KVPool.links`) stay behind: they
are read while a blend scores, and that ends before its KV may move. Called by mover.py, from threads beside the
engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from kvlite.errors import EngineError

Blocks: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


class Memory(Protocol):
    """What the copier needs of a `KVPool`."""

    data: torch.Tensor
    """[num_blocks, ...], contiguous."""


class KVCopier:
    """Copies whole blocks; any thread, while nobody computes with the same blocks."""

    def __init__(self, pool: Memory) -> None:
        if not pool.data.is_contiguous():
            raise EngineError(f"the KV pool has strides {pool.data.stride()}, must be contiguous by block")
        self._bytes = pool.data.view(torch.uint8).view(len(pool.data), -1)
        self._lock = threading.Lock()
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(pool.data.device) if pool.data.device.type == "cuda" else None

    @property
    def block_bytes(self) -> int:
        """Of one block in a payload."""
        return self._bytes.shape[1]

    def payload(self, blocks: Blocks) -> Sequence[memoryview]:
        """The bytes of `blocks` [K] in that order, as pieces for `Link.send`.

        On a CPU the pool's own memory, one piece per run of neighbours: valid while the blocks are held. On a GPU a
        copy in pinned memory. Raises EngineError when a block is out of range.
        """
        self._check(blocks)
        if self._stream is not None:
            return [self._to_host(blocks).numpy().data.cast("B")]
        rows = self._bytes.numpy()
        cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
        runs = zip([0, *cuts.tolist()], [*cuts.tolist(), len(blocks)], strict=True)
        return [rows[blocks[low] : blocks[low] + high - low].data.cast("B") for low, high in runs if high > low]

    def pool_rows(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The pool as [num_blocks, block_bytes], where it lies; for digests. Raises EngineError on a GPU."""
        if self._stream is not None:
            raise EngineError("the KV pool is on a GPU: digests are taken of the payload")
        return self._bytes.numpy()

    def store(self, blocks: Blocks, payload: memoryview) -> None:
        """Writes a payload to `blocks`, in order. Raises EngineError unless it has exactly their bytes."""
        self._check(blocks)
        if len(set(blocks.tolist())) != len(blocks):
            raise EngineError("a block is named twice as the target of a payload")
        expected = len(blocks) * self.block_bytes
        if payload.nbytes != expected:
            raise EngineError(f"a payload for {len(blocks)} blocks has {payload.nbytes} bytes, must have {expected}")
        source = np.frombuffer(payload, np.uint8).reshape(len(blocks), -1)
        if self._stream is not None:
            self._to_device(blocks, source)
            return
        rows = self._bytes.numpy()
        for row, block in enumerate(blocks.tolist()):
            np.copyto(rows[block], source[row])

    def _check(self, blocks: Blocks) -> None:
        if blocks.ndim != 1 or (len(blocks) and not 0 <= blocks.min() <= blocks.max() < len(self._bytes)):
            raise EngineError(f"blocks {blocks.min()} to {blocks.max()} are not all below {len(self._bytes)}")

    def _to_host(self, blocks: Blocks) -> torch.Tensor:
        """A fresh pinned tensor: the caller sends it while the next is filled."""
        assert self._stream is not None
        host = torch.empty((len(blocks), self.block_bytes), dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            index = torch.tensor(blocks.tolist(), device=self._bytes.device)
            host.copy_(self._bytes[index], non_blocking=True)
        self._stream.synchronize()
        return host

    def _to_device(self, blocks: Blocks, source: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        assert self._stream is not None
        with self._lock, torch.cuda.stream(self._stream):
            if self._staging.numel() < source.size:
                self._staging = torch.empty(source.size, dtype=torch.uint8, pin_memory=True)
            staged = self._staging[: source.size].view(source.shape)
            np.copyto(staged.numpy(), source)
            index = torch.tensor(blocks.tolist(), device=self._bytes.device)
            self._bytes[index] = staged.to(self._bytes.device, non_blocking=True)
            self._stream.synchronize()
