"""The KV pool: shapes, copies before updates, budget."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from kvlite.runner.kv_pool import (
    CPU_CACHE_BYTES_LIMIT,
    KVPool,
    KVShape,
    available_memory_bytes,
    cache_budget_bytes,
    host_budget_bytes,
    runs,
)
from kvlite.runner.plan import Plan

CPU = torch.device("cpu")


def rows(*values: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32).reshape(-1, 3)


def plan(copies: Any = (), updates: Any = ()) -> Plan:
    return cast("Plan", SimpleNamespace(block_copy=rows(*copies), block_update=rows(*updates)))


def pool(dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(KVShape(2, 4, 3, 8, dtype), num_blocks=6, max_num_seqs=2, max_model_len=17, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pool_is_block_major_and_zeroed(dtype: torch.dtype) -> None:
    made = pool(dtype)
    assert made.data.shape == (6, 2, 2, 3, 4, 8) and made.data.is_contiguous() and made.data.dtype == dtype
    assert not made.data.any()
    assert made.data[0].nbytes == made.shape.bytes_per_block == 2 * 2 * 4 * 3 * 8 * dtype.itemsize
    assert made.block_table.shape == (3, 5)


def test_a_plan_copies_whole_blocks_and_changes_table_entries() -> None:
    made = pool()
    made.data.copy_(torch.randn(made.data.shape))
    before = made.data.clone()
    made.apply(plan(copies=[(0, 1, 4), (0, 2, 5)], updates=[(0, 2, 4), (1, 0, 5), (0, 0, 1)]))
    assert torch.equal(made.data[4], before[1]) and torch.equal(made.data[5], before[2])
    assert torch.equal(made.data[:4], before[:4])
    assert made.block_table.tolist() == [[1, 0, 4, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    made.apply(plan())
    assert torch.equal(made.data[4], before[1])


def test_untouched_blocks_take_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    shape = KVShape(8, 16, 8, 64, torch.float32)
    made = KVPool(shape, num_blocks=1024, max_num_seqs=1, max_model_len=16, device=CPU)
    assert made.data.nbytes == 1024 * shape.bytes_per_block == 1 << 29
    assert resident() - before < 1 << 26


def test_the_budget_is_what_was_asked_or_a_modest_capped_share() -> None:
    assert cache_budget_bytes(12345, CPU) == 12345
    automatic = cache_budget_bytes(None, CPU)
    assert 0 < automatic <= CPU_CACHE_BYTES_LIMIT
    assert automatic <= available_memory_bytes()


def test_a_plan_places_rows_of_segments_with_their_links() -> None:
    made = pool()
    made.apply(plan(updates=[(0, 0, 3), (0, 1, 1), (1, 0, 2)]))
    made.links[4:] = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3) + 1
    calls: list[list[list[int]]] = []
    placing = SimpleNamespace(
        place=np.array([[0, 2, 4, 1, 0, 2], [1, 0, 1, 5, 2, 2]], np.int32),
        source_blocks=np.array([4, 5, 4, 5], np.int32),
    )
    made.place(cast("Plan", placing), lambda _, *slots: calls.append([part.tolist() for part in slots]))
    # Rows 1 to 4 of the segment in blocks 4 and 5 go to positions 2 to 5 of row 0, its row 5 to position 0 of row 1.
    assert calls == [[[17, 18, 19, 20, 21], [14, 15, 4, 5, 8], [2, 3, 4, 5, 0]]]
    links = made.links.flatten(0, 1)
    assert torch.equal(links[[14, 15, 4, 5, 8]], links[[17, 18, 19, 20, 21]])
    made.apply(plan(updates=[(1, 0, 3)]))
    assert not made.links[3].any() and bool(made.links[1].any())


def test_blocks_go_to_the_host_before_others_come_into_their_place() -> None:
    made = KVPool(
        KVShape(2, 4, 3, 8, torch.float32), num_blocks=6, max_num_seqs=2, max_model_len=17, device=CPU, host_blocks=5
    )
    made.data.copy_(torch.randn(made.data.shape))
    made.host.copy_(torch.randn(made.host.shape))
    data, host = made.data.clone(), made.host.clone()
    # Blocks 1, 2 and 3 leave as a run; 4 and 0 come from the host, 0 within the pool goes to where 2 was.
    copies = [(2, 4, 1), (0, 0, 2), (1, 3, 2), (1, 2, 1), (1, 1, 0), (2, 3, 3)]
    made.apply(plan(copies=copies))
    assert torch.equal(made.host, torch.stack([data[1], data[2], data[3], host[3], host[4]]))
    assert torch.equal(made.data, torch.stack([data[0], host[4], data[0], host[3], data[4], data[5]]))


def test_copies_are_grouped_into_runs_in_which_both_sides_go_up_by_one() -> None:
    copies = np.array([[7, 3], [6, 2], [5, 1], [1, 9], [9, 5], [8, 8], [2, 8]], np.int32)
    assert runs(copies) == [[1, 9, 1], [2, 8, 1], [5, 1, 3], [8, 8, 1], [9, 5, 1]]
    assert runs(copies[:0]) == []


def test_a_cpu_keeps_no_host_tier_unless_asked_and_a_gpu_a_bounded_one() -> None:
    assert host_budget_bytes(None, 1 << 30, CPU) == 0 and host_budget_bytes(77, 1 << 30, CPU) == 77
    beside = host_budget_bytes(None, 1 << 20, torch.device("cuda"))
    assert beside == min(4 << 20, int(available_memory_bytes() * 0.25))
