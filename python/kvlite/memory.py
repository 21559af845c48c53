"""Main memory for what every step reads whole: weights and KV, in huge pages where the system grants them.

With pages of 4 KiB a read of either spends much of its time on page walks, most of all on a virtual machine, where
each is a walk of walks. Called by `models.weights` and `runner.kv_pool`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

ALIGNMENT = 64
"""Bytes: a cache line, and what every vector load likes."""


def allocate(wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """A contiguous tensor of zeros for each (shape, dtype), side by side in one mapping.

    The system zeroes a page when it is first touched, and hands it out then: what nobody uses costs nothing. The
    memory is free again when the last of the tensors is. Raises OSError when there is no room in the address space.
    """
    starts, end = list[int](), 0
    for shape, dtype in wanted:
        starts.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    # Private: what mmap makes unless told, memory to share with children, has no huge pages on most systems.
    mapped = mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # of nothing there is no mapping
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return [
        torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=start).view(*shape)
        if math.prod(shape)
        else torch.zeros(*shape, dtype=dtype)
        for start, (shape, dtype) in zip(starts, wanted, strict=True)
    ]
