"""The mirror of the core's plan layout, and arenas read as plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvlite import _core
from kvlite.runner.plan import Arena, Header, Layout, Status

LIMITS: dict[str, Any] = {
    "max_num_seqs": 3, "max_num_batched_tokens": 10, "max_model_len": 33, "block_size": 4, "max_num_waiting": 5,
    "max_segments": 4, "host_blocks": 0,
}  # fmt: skip
CORE: dict[str, Any] = LIMITS | {
    "num_blocks": 40, "vocab_size": 100, "enable_prefix_caching": True, "policy": "fcfs", "max_passes": 64,
    "eviction": "lru",
    "attention_cost_tokens": 100, "attention_split_tokens": 256, "group_cost_tokens": 0, "swap_cost_tokens": 0,
    "reserve_tokens": 2, "watermark_ratio": 1.0, "hash_seed": 1,
    "segment_cache_ratio": 0.5, "model_digest": 0, "canonical_prefix": [],
}  # fmt: skip


def test_the_layout_is_the_cores() -> None:
    layout = Layout.of(**LIMITS)
    layout.check(_core.Core.layout(**CORE))
    assert layout.size == _core.Core.arena_len(**CORE)


@pytest.mark.parametrize("limit", sorted(LIMITS))
def test_a_layout_of_other_limits_is_noticed(limit: str) -> None:
    with pytest.raises(AssertionError, match="disagree on"):
        Layout.of(**LIMITS).check(_core.Core.layout(**CORE | {limit: CORE[limit] + 5}))


def test_regions_are_views_of_the_arena_that_do_not_overlap() -> None:
    layout = Layout.of(**LIMITS)
    arena = Arena(layout, torch.device("cpu"))
    for n, view in enumerate(arena.tensors.values()):
        view.fill_(n)
    counts = np.bincount(arena.data)
    assert counts.tolist() == [int(np.prod(shape)) for shape in layout.shapes.values()]


def test_a_plan_of_the_core_reads_as_what_was_asked_and_is_completed_in_place() -> None:
    layout = Layout.of(**LIMITS)
    arenas = [Arena(layout, torch.device("cpu")) for _ in range(2)]
    core = _core.Core(arenas=(arenas[0].data, arenas[1].data), **CORE)
    handle = core.add(
        np.arange(6, dtype=np.int32), n=2, max_tokens=4, min_tokens=0, stop_token_ids=[], priority=0,
        deadline_ms=1500, tenant=0, use_cache=True, prompt_logprobs=False, now_ms=1000,
    )  # fmt: skip
    core.step(0, 1000)
    plan = arenas[0].read()
    assert (plan.num_tokens, plan.num_seqs, plan.num_running, plan.num_waiting) == (6, 1, 2, 0)
    assert plan.next_wake_ms == 500 and plan.plan_id > 0
    assert plan.token_ids.tolist() == plan.positions.tolist() == plan.last_key.tolist() == list(range(6))
    assert plan.query_start.tolist() == [0, 6] and plan.context_len.tolist() == [6]
    assert plan.sample[:, 0].tolist() == [5, 5] and sorted(plan.sample[:, 1].tolist()) == [0, 1]
    assert [row[:2] for row in plan.admitted.tolist()] == [[handle, 0], [handle, 1]]
    plan.sampled[:] = [7, 8]
    arenas[0].complete(plan.plan_id, Status.OK)
    core.step(1, 1001)
    after = arenas[1].read()
    assert sorted(row[2] for row in after.committed.tolist()) == [7, 8]
    assert arenas[1].data[Header.NUM_COMMITTED] == 2 and len(after.block_copy) == 1
