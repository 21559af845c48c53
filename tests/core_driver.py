"""A core with its arenas, driven by hand; what the tests of the binding share."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvlite import _core

CONFIG: dict[str, Any] = {
    "num_blocks": 64,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
    "max_num_waiting": 2,
    "vocab_size": 100,
    "enable_prefix_caching": True,
    "policy": "fcfs",
    "max_passes": 64,
    "eviction": "reuse-weighted",
    "attention_cost_tokens": 1000,
    "attention_split_tokens": 256,
    "group_cost_tokens": 0,
    "host_blocks": 0,
    "swap_cost_tokens": 0,
    "reserve_tokens": 4,
    "watermark_ratio": 0.95,
    "segment_cache_ratio": 0.5,
    "model_digest": 0,
    "canonical_prefix": [],
    "max_segments": 4,
    "hash_seed": 1,
}
REQUEST: dict[str, Any] = {
    "n": 1,
    "max_tokens": 3,
    "min_tokens": 0,
    "stop_token_ids": [],
    "priority": 0,
    "deadline_ms": None,
    "tenant": 0,
    "use_cache": True,
    "prompt_logprobs": False,
    "now_ms": 0,
}


class Driver:
    """A core with its arenas, and a device that answers every sample with the same token."""

    def __init__(self, **changes: Any) -> None:
        config = CONFIG | changes
        self.layout = _core.Core.layout(**config)
        self.arenas = tuple(np.full(_core.Core.arena_len(**config), -9, np.int32) for _ in range(2))
        self.core = _core.Core(arenas=self.arenas, **config)
        self.idx = 1
        self.now_ms = 0

    def add(self, prompt: list[int], **changes: Any) -> int:
        return self.core.add(np.array(prompt, np.int32), **(REQUEST | changes))

    def region(self, name: str) -> np.ndarray:
        offset, shape = self.layout[name]
        return self.arenas[self.idx][offset : offset + int(np.prod(shape))].reshape(shape)

    def step(self) -> None:
        self.idx = 1 - self.idx
        self.core.step(self.idx, self.now_ms)

    def complete(self, token: int = 7) -> None:
        self.region("sampled")[: self.region("header")[3]] = token
        self.region("status")[0] = 0
        self.region("done_plan_id")[0] = self.region("header")[0]

    def counted(self, name: str, field: int) -> list[list[int]]:
        return self.region(name)[: self.region("header")[field]].tolist()

    def run(self, limit: int = 20) -> tuple[list[list[int]], list[list[int]]]:
        committed: list[list[int]] = []
        finished: list[list[int]] = []
        for _ in range(limit):
            self.step()
            header = self.region("header")
            committed += self.region("committed")[: header[11]].tolist()
            finished += self.region("finished")[: header[12]].tolist()
            self.complete()
        return committed, finished
