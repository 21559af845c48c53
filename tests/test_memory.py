"""Memory of weights and KV: zeroed, aligned, apart from each other, and of a kind that has huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kvlite.memory import ALIGNMENT, allocate

SMAPS = Path("/proc/self/smaps")
HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WANTED = [((3, 5), torch.float32), ((0, 4), torch.float32), ((7,), torch.bfloat16), ((2, 1 << 20), torch.float32)]


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping around an address, as proc(5) names them."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_tensors_are_zeros_of_their_own_at_whole_cache_lines() -> None:
    made = allocate(WANTED)
    for tensor, (shape, dtype) in zip(made, WANTED, strict=True):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert not tensor.any()
    for n, tensor in enumerate(made):
        tensor.fill_(n + 1)
    assert [float(tensor.float().mean()) for tensor in made if tensor.numel()] == [1.0, 3.0, 4.0]


@pytest.mark.skipif(not (SMAPS.exists() and HAS_HUGE_PAGES.exists()), reason="a system without huge pages")
def test_the_memory_may_have_huge_pages() -> None:
    # Shared memory takes the advice and ignores it, unless the system was told otherwise.
    made = allocate(WANTED)
    flags = flags_of(made[-1].data_ptr())
    assert "hg" in flags and "sh" not in flags
